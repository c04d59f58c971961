"""Cross-scale local attention (§3.3)."""

from msvq_fast.ops.local_attention.decode import local_attention_at
from msvq_fast.ops.local_attention.op import local_attention

__all__ = ["local_attention", "local_attention_at"]
