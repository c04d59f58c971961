"""The convolution blocks of VQ-VAE 2, of which every model here is built."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from msvq_fast.ops.checks import is_watched
from msvq_fast.ops.conv_bias_relu import conv_bias_relu
from msvq_fast.ops.upsample_image import upsample_image

LEAST_VALUES = 2**22
"""Of an input or output: fewer cost a GPU less in passes than the host in joining them, by an
estimate."""


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size, or halves it with ``stride=2``.

    It starts with weights of variance ``1 / (in_channels * kernel²)`` and without biases. PyTorch's
    own start has smaller weights and random biases. With no normalisation in between, what differs
    between images then shrinks from layer to layer while the biases do not: bfloat16 rounds it
    away, and gradients fall below Adam's ε.
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)
    _start(layer)
    return layer


def _start(layer: nn.Conv2d) -> None:
    assert layer.bias is not None
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    nn.init.zeros_(layer.bias)


class JoinedConv(nn.Conv2d):
    """1x1 `conv` of two maps joined, without a joined copy that its backward would keep."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        _start(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``(B, C, h, w)`` and ``(B, in_channels - C, h, w)`` to ``(B, out_channels, h, w)``.

        Without ``context`` C is all of ``in_channels``.
        """
        if context is None:
            return F.conv2d(x, self.weight, self.bias)
        width = x.shape[1]
        out = F.conv2d(x, self.weight[:, :width], self.bias)
        return out + F.conv2d(context, self.weight[:, width:])


def upsample(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """4x4 transposed convolution of stride 2: doubles height and width.

    It starts as bilinear interpolation between randomly mixed channels, without biases, and keeps
    the variance of what is smooth. With weights drawn one by one its four phases would differ, and
    a grid that short trainings do not get rid of would lie over every image.
    """
    layer = nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1)
    assert layer.bias is not None
    mix = layer.weight.new_empty(in_channels, out_channels).normal_(std=in_channels**-0.5)
    with torch.no_grad():
        for (y, a), (x, b) in itertools.product(enumerate((1, 3, 3, 1)), repeat=2):
            layer.weight[:, :, y, x] = mix * (a * b / 16)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))`` with half the width inside.

    Args:
        width: Channels of the input and output ``(B, width, H, W)``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = conv(width, width // 2, 3)
        self.outer = conv(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width, H, W)`` to the same shape."""
        h = self.outer(F.relu(self.inner(F.relu(x))))
        return x + h


def residual_stack(width: int, count: int) -> list[nn.Module]:
    """``count`` residual blocks and a last ReLU."""
    return [*(Residual(width) for _ in range(count)), nn.ReLU()]


class Chain(nn.Sequential):
    """``nn.Sequential`` that `conv_bias_relu` and ``compile()`` see whole.

    On a GPU a convolution runs with the residual and the ReLU after it, unless hooks, a class of
    its own or its weight's, or whoever watches PyTorch's operations (selective checkpointing, what
    counts or traces them) want to see a layer alone. torch.compile joins them itself; but it leaves
    code of ``torch.nn`` alone unless other code that it compiles calls it: of PyTorch's own
    ``nn.Sequential`` it would compile only the `Residual` inside.

    Attributes:
        joined: False runs every layer alone everywhere.
    """

    joined = True

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` through every layer."""
        if self.joined and _runs_on_cuda(x) and all(_is_plain(layer) for layer in self):
            return run_joined([*self], x)
        for layer in self:
            x = layer(x)
        return x

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As ``nn.Module.compile``, for this chain alone.

        torch.compile keeps eight variants of one code, and what differs between its calls is no
        constant there. The chains of a model differ in all their sizes: each has code of its own,
        unless somebody gave it another ``forward``.
        """
        if getattr(self.forward, "__func__", None) is _FORWARD:
            code = _FORWARD.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")  # known by it
            own = FunctionType(code, _FORWARD.__globals__, "forward")
            self.forward = MethodType(own, self)  # type: ignore[method-assign]
        super().compile(*args, **kwargs)


_FORWARD, _NUMBERS = Chain.forward, itertools.count()


def run_joined(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What ``layers`` make of ``x``, a convolution together with the residual and ReLU after it.

    Args:
        layers: `Residual`, ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``nn.ReLU``.
        x: ``(B, C, H, W)``.
    """
    total: Tensor | None = x
    relu: Tensor | None = None  # of total, if it is there already
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        want = {nn.ReLU: "relu", Residual: "both"}.get(type(following), "sum")
        if isinstance(layer, nn.ReLU):
            total = relu = _relu(total, relu)
        elif isinstance(layer, Residual):
            _, inner = _convolve(layer.inner, _relu(total, relu), None, "relu")
            total, relu = _convolve(layer.outer, inner, total, want)
        else:
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            total, relu = _convolve(layer, total, None, want)
    assert total is not None
    return total


def _relu(total: Tensor | None, relu: Tensor | None) -> Tensor:
    if relu is not None:
        return relu
    assert total is not None
    return F.relu(total)


def _convolve(
    layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor | None, residual: Tensor | None, want: str
) -> tuple[Tensor | None, Tensor | None]:
    assert x is not None and layer.bias is not None
    transposed, stride = isinstance(layer, nn.ConvTranspose2d), layer.stride[0]
    values = x.shape[0] * x.shape[2] * x.shape[3] * layer.out_channels
    values = values * stride**2 if transposed else values // stride**2
    if max(values, x.numel()) < LEAST_VALUES:
        total = layer(x) if residual is None else residual + layer(x)
        return total, None if want == "sum" else F.relu(total)
    if isinstance(layer, nn.ConvTranspose2d) and want == "sum" and _makes_image(layer):
        return upsample_image(x, layer.weight, layer.bias), None
    return conv_bias_relu(
        x,
        layer.weight,
        layer.bias,
        residual,
        stride=stride,
        padding=int(layer.padding[0]),
        transposed=transposed,
        want=want,
    )


def _makes_image(layer: nn.ConvTranspose2d) -> bool:
    sizes = (layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return sizes == (3, (4, 4), (2, 2), (1, 1))


def _runs_on_cuda(x: Tensor) -> bool:
    """Whether layers run on ``x`` there and now, and nobody looks on; of torch.fx it is none."""
    there = isinstance(x, Tensor) and x.device.type == "cuda" and x.dim() == 4
    return there and not is_watched() and not _has_global_hook()


def _has_global_hook() -> bool:
    """Whether a hook sees the calls of all modules; PyTorch 2.7 has no function that says so."""
    hooks = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return any(hooks)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but what its class says."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    if any(hooks) or "forward" in layer.__dict__ or layer._compiled_call_impl is not None:
        return False
    if type(layer) is Residual:
        both = (layer.inner, layer.outer)
        return all(isinstance(part, nn.Conv2d) and _is_plain(part) for part in both)
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        own = type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
        return own and type(layer.weight) in (Tensor, nn.Parameter) and _is_square(layer)
    return type(layer) is nn.ReLU


def _is_square(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether the convolution is of the kind that `conv` and `upsample` make."""
    return (
        layer.bias is not None
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.stride[0] == layer.stride[1]
        and layer.padding == (layer.padding[0],) * 2
        and layer.dilation == (1, 1)
        and layer.output_padding == (0, 0)
    )


class Encoder(nn.Module):
    """The encoder of VQ-VAE 2: one feature map per scale, coarsest first.

    Args:
        stages: Halvings from the image to the finest scale.
        num_scales: M; every coarser scale is one more halving.
        width: Channels of every feature map; the first stages have half of it per halving further
            from the finest scale, never fewer than ``min(16, width)``.
        num_residual_blocks: Residual blocks per scale.
    """

    def __init__(self, stages: int, num_scales: int, width: int, num_residual_blocks: int) -> None:
        super().__init__()
        finest: list[nn.Module] = []
        channels = 3
        for out in encoder_widths(stages, width):
            finest += [conv(channels, out, 3, stride=2), nn.ReLU()]
            channels = out
        scales = [Chain(*finest, *residual_stack(width, num_residual_blocks))]
        for _ in range(num_scales - 1):
            halve = conv(width, width, 3, stride=2)
            scales.append(Chain(halve, *residual_stack(width, num_residual_blocks)))
        self.scales = nn.ModuleList(scales)  # finest first, as the data flow

    def forward(
        self, x: Tensor, *, run: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Map ``(B, 3, H, W)`` to M feature maps ``(B, width, h_m, w_m)``, coarsest first.

        ``run(part, x)`` runs the part down to the finest features in place of ``part(x)``.
        """
        finest = self.scales[0]
        features = [finest(x) if run is None else run(finest, x)]
        for scale in self.scales[1:]:
            features.append(scale(features[-1]))
        return features[::-1]


def encoder_widths(stages: int, width: int) -> list[int]:
    """Channels after each halving: ``width`` at the end, half of it per stage before."""
    return [max(width >> (stages - k), min(16, width)) for k in range(1, stages + 1)]
