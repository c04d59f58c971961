"""Drawing whole hierarchies, and new details for a coarse image that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from msvq_fast.ops.checks import InputError, check_at_least
from msvq_fast.priors.prior import Prior


def sample(
    prior: Prior,
    count: int,
    *,
    seed: int = 0,
    first: int | Tensor = 0,
    coarser: Sequence[Tensor] = (),
    labels: Tensor | None = None,
    fixed: Sequence[Tensor | None] | None = None,
    upto: int | None = None,
    settings: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
) -> list[Tensor]:
    """Draw codes from coarse to fine.

    An image depends on ``seed``, its number and the settings alone, not on the batch it is drawn
    in, up to the rounding of matrix products.

    Args:
        prior: Left in its mode; dropout must be off (`eval`).
        count: B, images.
        seed: Of every draw.
        first: Number of the first image, the others follow; or the numbers of all ``(B,)`` int64.
        coarser: Scales ``(B, h_m, w_m)`` that are kept as they are; those after them are drawn.
        labels: ``(B,)`` int64.
        fixed: Per scale codes to keep ``(B, h_m, w_m)``, negative where free, or None (inpainting).
        upto: Last scale that is drawn; None is the finest.
        settings: Options of the prior's ``draw_scale``, for all scales or one dict per scale.

    Returns:
        Codes ``(B, h_m, w_m)`` int64, coarse to fine, those of ``coarser`` first.
    """
    scales = prior.config.num_scales
    last = scales - 1 if upto is None else upto
    if prior.training:
        raise InputError("prior is in training mode; expected prior.eval()")
    check_at_least(1, count=count)
    if not 0 <= last < scales:
        raise InputError(f"upto={upto}; expected 0 <= upto < {scales}")
    if fixed is not None and len(fixed) != scales:
        raise InputError(f"fixed has {len(fixed)} entries; expected {scales}, one per scale")
    options = (
        [settings or {}] * scales if settings is None or isinstance(settings, dict) else settings
    )
    if len(options) != scales:
        raise InputError(f"settings has {len(options)} entries; expected {scales}, one per scale")
    codes = list(coarser)
    if codes:
        prior.check_codes(codes, labels, name="coarser", batch=count)
    for m in range(len(codes), last + 1):
        codes.append(
            prior.draw_scale(
                m,
                codes,
                batch=count,
                seed=seed,
                first=first,
                labels=labels,
                fixed=None if fixed is None else fixed[m],
                **options[m],
            )
        )
    return codes
