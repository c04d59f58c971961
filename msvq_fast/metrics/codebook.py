"""How much of a codebook is in use, from integer counts over a whole evaluation set."""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops.checks import InputError, check_at_least


def usage(counts: Tensor) -> Tensor:
    """Percent of codes drawn at least once.

    Args:
        counts: ``(..., K)`` integer counts, one histogram per leading index.

    Returns:
        ``(...)`` float64 in [0, 100].

    Raises:
        InputError: If ``counts`` is not an integer tensor with at least one code.
    """
    _check_counts(counts)
    return (counts > 0).double().mean(dim=-1) * 100.0


def perplexity(counts: Tensor) -> Tensor:
    """Effective number of codes, ``exp(-Σ p ln p)`` with ``p = counts / Σ counts``, 0 ln 0 = 0.

    Args:
        counts: ``(..., K)`` integer counts, one histogram per leading index.

    Returns:
        ``(...)`` float64: 1 (one code takes all) to K (all equally often), 0 where nothing was
        counted.

    Raises:
        InputError: As `usage`.
    """
    _check_counts(counts)
    total = counts.sum(dim=-1, keepdim=True)  # (..., 1)
    p = counts.double() / total.clamp_min(1)
    effective = torch.special.entr(p).sum(dim=-1).exp()
    return torch.where(total.squeeze(-1) > 0, effective, 0.0)


class CodeUsage:
    """The histogram of one scale's codes over a whole evaluation set.

    Integer sums: the result is the same however the set is split into batches, which a mean of
    per-batch figures is not.

    Args:
        num_codes: K, size of the codebook.
    """

    def __init__(self, num_codes: int) -> None:
        check_at_least(1, num_codes=num_codes)
        self.counts = torch.zeros(num_codes, dtype=torch.int64)  # (K,), on the CPU

    def update(self, codes: Tensor) -> None:
        """Count ``codes``, int64 of any shape and device, each in ``[0, K)``."""
        if codes.dtype != torch.int64:
            raise InputError(f"codes has dtype {codes.dtype}; expected int64")
        num_codes = len(self.counts)
        if codes.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < 0 or high >= num_codes:
            raise InputError(f"codes range over [{low}, {high}]; expected [0, {num_codes - 1}]")
        self.counts += torch.bincount(codes.flatten(), minlength=num_codes).cpu()

    @property
    def usage(self) -> float:
        """Percent of codes drawn at least once, see `msvq_fast.metrics.usage`."""
        return float(usage(self.counts))

    @property
    def perplexity(self) -> float:
        """Effective number of codes, see `msvq_fast.metrics.perplexity`."""
        return float(perplexity(self.counts))


def _check_counts(counts: Tensor) -> None:
    if counts.dtype.is_floating_point or counts.dtype.is_complex or counts.dtype == torch.bool:
        raise InputError(f"counts has dtype {counts.dtype}; expected integers")
    if counts.dim() == 0 or counts.shape[-1] == 0:
        raise InputError(f"counts has shape {tuple(counts.shape)}; expected (..., K) with K >= 1")
