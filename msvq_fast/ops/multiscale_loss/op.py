"""The multi-scale reconstruction loss (Eq. 5-7): contract, checks, choice of kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

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
    is_in_onnx_export,
    is_transformed,
    without_autocast,
)
from msvq_fast.ops.gaussian_blur.op import BORDERS, blur_taps, pyramid_kernel
from msvq_fast.ops.multiscale_loss import one_pass, reference
from msvq_fast.ops.multiscale_loss.reference import Blur

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
    recompute: bool = False,
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
        recompute: The kernels' forward writes the gradients too and holds them for the backward;
            True holds none and runs the pass again.
        backend: ``None`` picks; ``"reference"`` or ``"native"`` runs or raises.

    Returns:
        The loss ``()`` and the unweighted terms ``(M,)``, coarsest first, without gradient; both
        float32 (float64 for float64 contributions).

    Gradient:
        To every contribution, ``∂L/∂C_i = Σ_{m>=i} 2 w_m (x̂_m - x_m) / count``, from the pass
        that computes the loss. Beyond the inputs and these gradients nothing is held: no target,
        partial sum or difference. The kernels read the upstream gradient on its device, without
        waiting for it. Twice differentiable, by way of the definition, where kernels run and with
        ``backend="reference"``; once elsewhere.

    Raises:
        InputError: For shapes, dtypes or devices that differ, no contribution, weights of another
            number, ``x`` or weights that require a gradient, an unknown reduction, or a blur that
            `gaussian_pyramid` refuses.

    Numerics:
        Targets, sums and the reduction are float32 (float64 for float64 contributions) whatever
        the dtype of the contributions or autocast; kernels add rows in float64. Deterministic, on a
        CPU for any number of threads. Float16 gradients are multiplied by ``1 / count`` and the
        size of the weights only together with the upstream gradient, so that a loss scale keeps
        them from vanishing and overflowing.
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
    if not isinstance(weights, Iterable):
        raise InputError(f"weights={weights!r}; expected one number per scale")
    if any(isinstance(weight, Tensor) and weight.requires_grad for weight in weights):
        raise InputError(
            "weights require a gradient; expected numbers: it reaches contributions only"
        )
    if len(weights) != len(contributions):
        raise InputError(f"weights has {len(weights)} values for {len(contributions)} scales")
    check_choice("border", border, BORDERS)
    kernel = pyramid_kernel(x, kernel_size, sigma, sigma_rule)
    taps, _ = blur_taps(*kernel)
    chosen = OP.pick(contributions, x, taps, border, backend=backend)
    factors = tuple(float(weight) for weight in weights)
    blur = (*kernel, border, backend)
    if chosen == "reference":
        with without_autocast(x.device.type):
            if backend == "reference" or is_transformed() or is_in_onnx_export():
                return _definition(contributions, x, blur, factors, reduction)
            return one_pass.multiscale_loss(contributions, x, blur, factors, reduction)
    # Without a gradient no autograd.Function: torch.compile miscounts the arguments of one with
    # two contributions.
    if not (torch.is_grad_enabled() and any(c.requires_grad for c in contributions)):
        nothing = [False] * len(contributions)
        loss, per_scale, _ = OP.kernels[chosen].multiscale_loss(
            contributions, x, taps, border, factors, reduction, nothing
        )
    else:
        loss, per_scale = _MultiscaleLoss.apply(
            x, blur, taps, border, factors, reduction, recompute, chosen, *contributions
        )
    return loss, per_scale


def _definition(
    contributions: Sequence[Tensor],
    x: Tensor,
    blur: Blur,
    weights: Sequence[float],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(contributions[0].dtype)
    targets = reference.blurred_targets(x, len(contributions), dtype, blur)
    return reference.multiscale_loss(contributions, targets, weights, reduction)


class _MultiscaleLoss(torch.autograd.Function):
    """The kernels' one pass; what it stored is finished in place by the first backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blur: Blur,
        taps: tuple[float, ...],
        border: str,
        weights: tuple[float, ...],
        reduction: str,
        recompute: bool,
        backend: str,
        *contributions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[-len(contributions) :]
        stored = [False] * len(contributions) if recompute else wanted
        loss, per_scale, grads = OP.kernels[backend].multiscale_loss(
            contributions, x, taps, border, weights, reduction, stored
        )
        ctx.save_for_backward(x, *contributions)
        ctx.settings = (blur, taps, border, weights, reduction, backend)
        ctx.wanted, ctx.grads = wanted, None if recompute else grads
        ctx.mark_non_differentiable(per_scale)
        ctx.set_materialize_grads(False)
        return loss, per_scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, *contributions = ctx.saved_tensors
        blur, taps, border, weights, reduction, backend = ctx.settings
        unused = (None,) * (len(ctx.needs_input_grad) - len(contributions))
        if grad_loss is None:
            return (*unused, *(None for _ in contributions))
        kernels = OP.kernels[backend]
        grads, ctx.grads = ctx.grads, None
        if torch.is_grad_enabled():  # for a second derivative
            # Views: no contribution is then another one, nor computed from it.
            views = [c.view_as(c) for c in contributions]
            loss = _definition(views, x, blur, weights, reduction)[0]
            asked = [c for c, w in zip(views, ctx.wanted, strict=True) if w]
            grads = torch.autograd.grad(loss, asked, grad_loss, create_graph=True)
        elif grads is None:
            grads = kernels.multiscale_loss_backward(
                grad_loss, contributions, x, taps, border, weights, reduction, ctx.wanted
            )
        else:
            kernels.scale_(grads, grad_loss, weights, reduction)
        given = iter(grads)
        return (*unused, *(next(given) if w else None for w in ctx.wanted))
