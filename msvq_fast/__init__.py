"""Fast, lean, exact hierarchical vector-quantized autoencoders.

Public names are loaded on first use, so that ``import msvq_fast`` and ``msvq --help`` need not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msvq_fast import nn, ops
    from msvq_fast.models import MSVQVAE, VQVAE2, MSVQVAEConfig, MSVQVAEOutput, VQVAE2Config

__all__ = [
    "MSVQVAE",
    "VQVAE2",
    "MSVQVAEConfig",
    "MSVQVAEOutput",
    "VQVAE2Config",
    "__version__",
    "nn",
    "ops",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name in ("nn", "ops"):
        return importlib.import_module(f"msvq_fast.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'msvq_fast' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("msvq_fast.models"), name)
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
