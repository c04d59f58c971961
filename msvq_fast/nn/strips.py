"""Convolutions of some output rows only: a strip and the rows around it that it depends on.

Rows are half-open ranges ``(first, last)``. Every output row of a chain of convolutions is computed
from exactly the rows that it depends on, zeros only outside of the image, so strips laid side by
side are the whole output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.nn.blocks import Residual
from msvq_fast.ops.checks import InputError

Rows = tuple[int, int]


def flat_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of nested ``nn.Sequential`` in order."""
    if isinstance(module, nn.Sequential):
        return [layer for part in module for layer in flat_layers(part)]
    return [module]


def check_layers(layers: Sequence[nn.Module]) -> None:
    """Raise where a layer does something else with its weights than `run_rows`.

    That runs no hooks and calls no ``forward`` of these layers: pruning and
    ``torch.nn.utils.weight_norm`` set weights in a hook, adapters wrap the layer.
    """
    known = (Residual.forward, nn.Conv2d.forward, nn.ConvTranspose2d.forward)
    for layer in layers:
        for part in (layer, layer.inner) if isinstance(layer, Residual) else (layer,):
            if getattr(part.forward, "__func__", None) in known:
                if part._forward_pre_hooks:
                    raise InputError(
                        f"a {type(part).__name__} has a hook before its forward, which "
                        "memory='strips' does not run; expected 'sequential' or 'default'"
                    )
            elif any(part.state_dict()):
                raise InputError(
                    f"memory='strips' cannot cut a {type(part).__name__}; expected convolutions, "
                    "ReLU and Residual, or 'sequential' or 'default'"
                )


def split_rows(height: int, strips: int) -> list[Rows]:
    """Cut ``height`` rows into ``strips`` ranges (fewer if there are not as many rows)."""
    strips = max(1, min(strips, height))
    return [(i * height // strips, (i + 1) * height // strips) for i in range(strips)]


def output_height(layers: Sequence[nn.Module], height: int) -> int:
    """Rows that ``layers`` make of ``height`` rows."""
    for layer in layers:
        if isinstance(layer, nn.ConvTranspose2d):
            height = (height - 1) * layer.stride[0] - 2 * _padding(layer) + layer.kernel_size[0]
        elif isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0]
            height = (height + 2 * _padding(layer) - kernel) // layer.stride[0] + 1
    return height


def run_rows(layers: Sequence[nn.Module], x: Tensor, height: int, chain: Sequence[Rows]) -> Tensor:
    """Output rows ``chain[-1]`` of ``layers``.

    Args:
        layers: `Residual`, ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``nn.ReLU``.
        x: ``(B, C, rows, W)``, the rows ``chain[0]`` of the input.
        height: Rows of the whole input, so that its border is known.
        chain: What `needed_rows` gave.

    Returns:
        ``(B, C', rows, W')``; autograd differentiates it.
    """
    for layer, have, want in zip(layers, chain, chain[1:], strict=False):
        if isinstance(layer, nn.ConvTranspose2d):
            x = _conv_transpose_rows(layer, x, have, want)
        elif isinstance(layer, nn.Conv2d):
            x = _conv(layer, _bordered(layer, x, height, want))
        elif isinstance(layer, Residual):
            # Borders first: the backward keeps what the ReLU gives, and no bordered copy of it.
            inner = _conv(layer.inner, torch.relu(_bordered(layer.inner, x, height, want)))
            inner = torch.relu(inner)
            start = want[0] - have[0]
            x = x[:, :, start : start + want[1] - want[0]] + layer.outer(inner)
        else:
            x = layer(x)
        height = output_height([layer], height)
    return x


def needed_rows(layers: Sequence[nn.Module], height: int, rows: Rows) -> list[Rows]:
    """Rows before every layer, and last the output's own, that output rows ``rows`` depend on.

    Args:
        layers: As in `run_rows`.
        height: Rows of the whole input.
        rows: Rows of the output.
    """
    heights = [height]
    for layer in layers:
        heights.append(output_height([layer], heights[-1]))
    chain = [rows]
    for layer, height in zip(reversed(layers), reversed(heights[:-1]), strict=True):
        first, last = _reach(layer, chain[-1])
        chain.append((max(first, 0), min(last, height)))
    return chain[::-1]


def strips_of(layers: Sequence[nn.Module], height: int, strips: int) -> Iterator[list[Rows]]:
    """The chain of `needed_rows` of every strip of the output."""
    for rows in split_rows(output_height(layers, height), strips):
        yield needed_rows(layers, height, rows)


def _reach(layer: nn.Module, rows: Rows) -> Rows:
    """Input rows that output ``rows`` touch, those outside of the image included."""
    first, last = rows
    if isinstance(layer, Residual):
        return _reach(layer.inner, rows)
    if isinstance(layer, nn.ConvTranspose2d):
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], _padding(layer)
        return -((kernel - 1 - padding - first) // stride), (last - 1 + padding) // stride + 1
    if isinstance(layer, nn.Conv2d):
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], _padding(layer)
        return first * stride - padding, (last - 1) * stride - padding + kernel
    return rows


def _bordered(layer: nn.Conv2d, x: Tensor, height: int, want: Rows) -> Tensor:
    """``x`` with the rows of zeros that output rows ``want`` reach outside of the image."""
    first, last = _reach(layer, want)
    above, below = max(0, -first), max(0, last - height)
    return F.pad(x, (0, 0, above, below)) if above or below else x


def _conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer`` without its padding of rows."""
    columns = (0, layer.padding[1])
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, columns)  # type: ignore[arg-type]


def _conv_transpose_rows(layer: nn.ConvTranspose2d, x: Tensor, have: Rows, want: Rows) -> Tensor:
    columns = (0, layer.padding[1])
    y = F.conv_transpose2d(x, layer.weight, layer.bias, layer.stride, columns)  # type: ignore[arg-type]
    start = want[0] - (have[0] * layer.stride[0] - _padding(layer))
    return y[:, :, start : start + want[1] - want[0]]


def _padding(layer: nn.Conv2d | nn.ConvTranspose2d) -> int:
    assert not isinstance(layer.padding, str)
    return layer.padding[0]
