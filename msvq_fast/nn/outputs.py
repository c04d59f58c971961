"""Outputs of several tensors in one dataclass."""

from __future__ import annotations

import warnings
from typing import Any

from torch.export import register_dataclass


def register_output(kind: type[Any]) -> None:
    """Let PyTorch find the tensors in a dataclass that a ``forward`` returns.

    DistributedDataParallel(static_graph=True), FSDP and torch.export find them in nothing else.
    """
    with warnings.catch_warnings():  # PyTorch 2.7 warns that it calls a function of its own
        warnings.simplefilter("ignore", FutureWarning)
        register_dataclass(kind, serialized_type_name=f"msvq_fast.{kind.__name__}")
