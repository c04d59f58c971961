"""The multi-scale reconstruction loss (Eq. 5-7): contract, checks, choice of kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast.ops.backend import Op
from msvq_fast.ops.checks import (
    InputError,
    accumulation_dtype,
    check_choice,
    check_float,
    check_image,
    check_same_device,
    check_same_dtype,
)
from msvq_fast.ops.multiscale_loss import one_pass, reference
from msvq_fast.ops.multiscale_loss.targets import blurred_targets

OP = Op(__package__)


def multiscale_loss(
    contributions: Sequence[Tensor],
    x: Tensor,
    *,
    kernel_size: int | None = None,
    sigma: float | None = None,
    sigma_rule: str = "paper",
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
    border: str = "reflect",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare the running sums of contributions with blurred images (Eq. 5-7).

    ``L = Σ_m w_m |x_m - Σ_{i<=m} C_i|²`` with ``x_{M-1} = x`` and ``x_m = B(x_{m+1})``.

    Args:
        contributions: M tensors ``(B, C, H, W)`` of one float dtype, coarsest first.
        x: ``(B, C, H, W)`` images in [-1, 1], any float dtype, or uint8 in [0, 255] which is read
            as ``x / 127.5 - 1``. Data: it gets no gradient.
        kernel_size: Odd number of blur taps; None takes √r - 1 made odd (§3.2), r = min(H, W).
        sigma: Blur's standard deviation in pixels; None takes ``sigma_rule``.
        sigma_rule: ``"paper"`` is Eq. 8, ``"opencv"`` has 0.3 in place of 1/3.
        weights: M factors w_m, coarsest first; None is all ones.
        reduction: ``"mean"`` over the elements of each scale, or ``"sum"`` (Eq. 6 literally).
        border: The blur's border, see `gaussian_blur`.
        backend: ``None`` picks; ``"reference"``, ``"native"`` or ``"triton"`` runs or raises.

    Returns:
        The loss ``()`` and the unweighted terms ``(M,)``, coarsest first, without gradient; both
        float32 (float64 for float64 contributions).

    Gradient:
        To every contribution, ``∂L/∂C_i = Σ_{m>=i} 2 w_m (x̂_m - x_m) / count``, found in the
        forward: one image per contribution is kept, no target, partial sum or difference.
        Differentiable once, but for ``backend="reference"``.

    Raises:
        InputError: For shapes, dtypes or devices that differ, no contribution, or an ``x`` that
            requires a gradient.

    Numerics:
        Targets, sums and the reduction are float32 (float64 for float64 contributions) whatever
        the dtype of the contributions or autocast.
    """
    if len(contributions) == 0:
        raise InputError("contributions is empty; expected M >= 1 tensors (B, C, H, W)")
    check_image("x", x, allow_uint8=True)
    named = {f"contributions[{m}]": c for m, c in enumerate(contributions)}
    for name, contribution in named.items():
        check_float(name, contribution)
        if contribution.shape != x.shape:
            raise InputError(
                f"{name} has shape {tuple(contribution.shape)} but x has {tuple(x.shape)}"
            )
    check_same_dtype(**named)
    check_same_device(x=x, **named)
    check_choice("reduction", reduction, ("mean", "sum"))
    if x.requires_grad:
        raise InputError("x requires a gradient; the loss differentiates contributions only")
    if weights is None:
        weights = [1.0] * len(contributions)
    if len(weights) != len(contributions):
        raise InputError(f"weights has {len(weights)} values for {len(contributions)} scales")
    OP.pick(contributions[0], backend=backend)
    dtype = accumulation_dtype(contributions[0].dtype)
    blur = (kernel_size, sigma, sigma_rule, border, backend)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if backend == "reference":
            targets = blurred_targets(x, len(contributions), dtype, blur)
            return reference.multiscale_loss(contributions, targets, weights, reduction)
        return one_pass.multiscale_loss(contributions, x, blur, weights, reduction)
