"""Convolutions with what follows them, at the sizes of a training step of celebahq1024-s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from device.rows import OURS, Bench, Case, Cost, Row, bound, relative_error
from torch import Tensor

from msvq_fast.ops import conv_bias_relu
from msvq_fast.ops.conv_bias_relu import reference

BATCH = 8


class Layer(NamedTuple):
    inputs: int
    outputs: int
    side: int
    kernel: int
    stride: int
    padding: int
    transposed: bool
    residual: bool
    want: str


LAYERS = {
    "3x3, ReLU": Layer(128, 64, 256, 3, 1, 1, False, False, "relu"),
    "1x1, residual, ReLU": Layer(64, 128, 256, 1, 1, 0, False, True, "relu"),
    "1x1, residual, sum and ReLU": Layer(64, 128, 256, 1, 1, 0, False, True, "both"),
    "transposed 4x4, ReLU": Layer(128, 64, 256, 4, 2, 1, True, False, "relu"),
}


def training(bench: Bench, title: str, name: str) -> Case:
    """Forward and all gradients."""
    layer = LAYERS[title]
    side, batch = bench.size(layer.side, 8), bench.size(BATCH, 1)
    inputs, outputs = bench.size(layer[:2], (16, 8))
    steps = (layer.stride, layer.padding, layer.transposed)

    def numbers(*size: int) -> Tensor:
        """Whole ones: no sum has another sign for being rounded, so the masks are the same."""
        x = torch.randint(-2, 3, size, device=bench.device).to(bench.half)
        return x.to(memory_format=torch.channels_last) if len(size) == 4 else x

    size = (inputs, outputs) if layer.transposed else (outputs, inputs)
    x, bias = numbers(batch, inputs, side, side), numbers(outputs)
    weight = numbers(*size, layer.kernel, layer.kernel)
    shape = reference.output_size(x, weight, *steps)
    tensors = [x, weight, bias] + [numbers(*shape)] * layer.residual
    wanted = 2 if layer.want == "both" else 1
    grads = [numbers(*shape) for _ in range(wanted)]

    def ours(*tensors: Tensor) -> Any:
        keys = dict(zip(("stride", "padding", "transposed"), steps, strict=True))
        return conv_bias_relu(*tensors, **keys, want=layer.want, backend=bench.backend)

    def plain(*tensors: Tensor) -> Any:
        return reference.conv_bias_relu(*(*tensors, None)[:4], *steps, layer.want)

    forward = ours if name == OURS else plain
    forward = torch.compile(plain) if name == "torch.compile" else forward

    def run(forward: Callable[..., Any] = forward, tensors: list[Tensor] = tensors) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in tensors]
        out = [t for t in forward(*leaves) if t is not None]
        upstream = [g.to(out[0].dtype) for g in grads]
        return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, upstream)]

    def check() -> dict[str, Any]:
        want = run(plain, [t.detach().double() for t in tensors])
        errors = [relative_error(a, b) for a, b in zip(run(), want, strict=True)]
        assert max(errors) < 2e-2 or name != OURS, f"errors {errors}"
        return {"error": max(errors)}

    image = batch * shape[2] * shape[3] * outputs
    # x is read twice, its gradient written; outputs, their gradients and the mask; the residual and
    # its gradient.
    values = 3 * x.numel() + (2 * wanted + 1) * image + 2 * image * layer.residual
    products = weight.numel() * batch * (side * side if layer.transposed else shape[2] * shape[3])
    return Case(run, check, Cost(2.0 * values, 3 * 2.0 * products))


def rows() -> list[Row]:
    found = []
    for title, layer in LAYERS.items():
        group = f"{layer.inputs} to {layer.outputs}, {layer.side}x{layer.side}, {title}, bfloat16"
        for name, rank in ((OURS, 0), ("torch eager", 1), ("torch.compile", 2)):
            found.append(Row("conv_bias_relu", group, name, bound(training, title, name), rank))
    return found
