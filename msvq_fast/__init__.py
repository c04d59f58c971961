"""Fast, lean, exact hierarchical vector-quantized autoencoders.

Public names are loaded on first use, so that ``import msvq_fast`` and ``msvq --help`` need not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msvq_fast import nn as nn
    from msvq_fast import ops as ops
    from msvq_fast.models import (
        MSVQVAE as MSVQVAE,
    )
    from msvq_fast.models import (
        VQVAE2 as VQVAE2,
    )
    from msvq_fast.models import (
        MSVQVAEConfig as MSVQVAEConfig,
    )
    from msvq_fast.models import (
        MSVQVAEOutput as MSVQVAEOutput,
    )
    from msvq_fast.models import (
        VQVAE2Config as VQVAE2Config,
    )

_SOURCES = {
    "MSVQVAE": "msvq_fast.models",
    "MSVQVAEConfig": "msvq_fast.models",
    "MSVQVAEOutput": "msvq_fast.models",
    "VQVAE2": "msvq_fast.models",
    "VQVAE2Config": "msvq_fast.models",
    "nn": "msvq_fast",
    "ops": "msvq_fast",
}
__all__ = [*sorted(_SOURCES), "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'msvq_fast' has no attribute {name!r}")
    if _SOURCES[name] == "msvq_fast":
        value: Any = importlib.import_module(f"msvq_fast.{name}")
    else:
        value = getattr(importlib.import_module(_SOURCES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
