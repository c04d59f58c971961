"""Convolution with bias, residual and ReLU: contract, checks, choice of kernel, gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from msvq_fast.ops.backend import Op
from msvq_fast.ops.checks import (
    InputError,
    check_at_least,
    check_choice,
    check_float,
    check_same_device,
    check_same_dtype,
    is_watched,
)
from msvq_fast.ops.conv_bias_relu import reference

OP = Op(__package__, slow_reference=False)


class ConvBiasReluOutput(NamedTuple):
    """What `conv_bias_relu` returns."""

    sum: Tensor | None
    relu: Tensor | None


def conv_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    want: str = "relu",
    backend: str | None = None,
) -> ConvBiasReluOutput:
    """``residual + conv(x) + bias`` and the ReLU of that, as the layers of the models need them.

    Args:
        x: ``(B, C, H, W)`` of any float dtype.
        weight: ``(C', C, k, l)``, or ``(C, C', k, l)`` with ``transposed``.
        bias: ``(C',)``.
        residual: ``(B, C', H', W')``, added before the ReLU.
        stride: Of both dimensions.
        padding: Zeros at every side of both dimensions.
        transposed: A transposed convolution.
        want: ``"sum"``, ``"relu"`` or ``"both"``.
        backend: ``None`` picks; ``"reference"``, which is PyTorch's operations one after another,
            or ``"triton"`` runs or raises.

    Returns:
        ``sum`` and ``relu``, both ``(B, C', H', W')``, None where not wanted. Under autocast of its
        dtype, as PyTorch's convolutions.

    Gradient:
        To all four tensors; that of the bias is summed in float32. Kept for it: ``x``, ``weight``
        and ``relu``. Twice differentiable.

    Raises:
        InputError: For shapes, devices or dtypes that do not fit, or numbers out of range.

    Numerics:
        The Triton backend takes tensors in channels_last. What is added to the convolution is
        added in float32 and rounded once, where cuDNN does it; where one pass over its output does
        it, the convolution is rounded before. NaN in a sum stays NaN in its ReLU and lets gradients
        through, as in PyTorch; cuDNN, which promises nothing, did so where it was tried.
    """
    check_choice("want", want, ("sum", "relu", "both"))
    check_at_least(1, stride=stride)
    check_at_least(0, padding=padding)
    given = {"x": x, "weight": weight, "bias": bias}
    if residual is not None:
        given["residual"] = residual
    for name, tensor in given.items():
        check_float(name, tensor)
    check_same_device(**given)
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[0 if transposed else 1]:
        raise InputError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected "
            f"(B, C, H, W) and {'(C, C_out, k, l)' if transposed else '(C_out, C, k, l)'}"
        )
    channels = weight.shape[1 if transposed else 0]
    if tuple(bias.shape) != (channels,):
        raise InputError(f"bias has shape {tuple(bias.shape)}; expected {(channels,)}")
    size = reference.output_size(x, weight, stride, padding, transposed)
    if min(size[2:]) < 1:
        raise InputError(
            f"x has shape {tuple(x.shape)}, too small for weight {tuple(weight.shape)} with "
            f"stride={stride} and padding={padding}"
        )
    if residual is not None and residual.shape != size:
        raise InputError(f"residual has shape {tuple(residual.shape)}; expected {size}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        residual = residual if residual is None else residual.to(x.dtype)
        given = {"x": x, "weight": weight}  # the bias is rounded where it is added, if at all
    check_same_dtype(**given)
    steps = (stride, padding, transposed, want)
    chosen = OP.pick(x, weight, bias, transposed, backend=backend)
    if chosen == "reference":
        return ConvBiasReluOutput(*reference.conv_bias_relu(x, weight, bias, residual, *steps))
    return ConvBiasReluOutput(*_ConvBiasRelu.apply(x, weight, bias, residual, *steps))


class _ConvBiasRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        stride: int,
        padding: int,
        transposed: bool,
        want: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        kernels: Any = OP.kernels["triton"]
        call = kernels.convolve if _is_direct(x) else kernels.conv_bias_relu
        total, relu = call(x, weight, bias, residual, stride, padding, transposed, want)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, None if want == "sum" else relu)
        ctx.bias_dtype, ctx.steps = bias.dtype, (stride, padding, transposed)
        return None if want == "relu" else total, None if want == "sum" else relu

    @staticmethod
    def backward(
        ctx: Any, grad_sum: Tensor | None, grad_relu: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        none = (None,) * 4
        if grad_sum is None and grad_relu is None:
            return (*none, *none)
        x, weight, relu = ctx.saved_tensors
        stride, padding, transposed = ctx.steps
        if torch.is_grad_enabled():  # to be differentiated again: by operations that can be
            grad = grad_sum
            if grad_relu is not None:
                passed = torch.where(relu <= 0, 0.0, grad_relu)
                grad = passed if grad_sum is None else grad_sum + passed
            assert grad is not None
            grad_bias = grad.sum((0, 2, 3))
        else:
            kernels: Any = OP.kernels["triton"]
            call = kernels.apply_mask if _is_direct(x) else kernels.mask_and_sum
            grad, grad_bias = call(relu, grad_sum, grad_relu)
            grad = grad_sum if grad_relu is None else grad
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_weight = None, None
        if any(wanted):
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1,
                wanted,
            )  # fmt: skip
        grad_residual = grad if ctx.needs_input_grad[3] else None
        return (grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), grad_residual, *none)


def _is_direct(x: Tensor) -> bool:
    """Whether nothing looks at PyTorch's ops: a call by way of one takes the host longer.

    A model has so many of these calls that the host may be what a training step waits for.
    """
    return type(x) in (Tensor, torch.nn.Parameter) and not is_watched()
