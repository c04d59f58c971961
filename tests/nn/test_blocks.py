from __future__ import annotations

import functools

import pytest
import torch
from parity import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import BaseTorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from msvq_fast import models
from msvq_fast.nn import blocks
from msvq_fast.nn.blocks import Chain, conv, upsample
from msvq_fast.ops.conv_bias_relu import conv_bias_relu
from msvq_fast.ops.conv_bias_relu.op import OP
from msvq_fast.ops.upsample_image import upsample_image


def test_upsampling_starts_as_bilinear_interpolation_of_mixed_channels() -> None:
    x = torch.randn(2, 5, 6, 7)
    layer = upsample(5, 3)
    out = layer(x)
    mix = layer.weight.sum((2, 3)) / 4  # every phase of an output takes a quarter of the taps' sum
    mixed = torch.einsum("bihw,io->bohw", x, mix)
    want = F.interpolate(mixed, scale_factor=2, mode="bilinear")
    # Outside the image it takes zeros, where interpolation repeats the border.
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(out[inner], want[inner], rtol=1e-5, atol=1e-5)


def test_layers_start_with_the_variance_of_their_input() -> None:
    x = torch.randn(1, 256, 8, 8)
    for layer, image in (
        (conv(256, 512, 3), x),
        (conv(256, 512, 4, 2), x),
        (conv(256, 512, 1), x),
        (upsample(256, 512), x[:, :, :1, :1].expand(x.shape)),  # what is smooth keeps it
    ):
        assert layer.bias.count_nonzero() == 0
        assert 0.9 < layer(image)[:, :, 2:-2, 2:-2].std() < 1.1


def chains() -> list[blocks.Chain]:
    """What the models are made of."""
    stack = blocks.residual_stack(16, 2)
    halves = [conv(3, 8, 3, 2), nn.ReLU(), conv(8, 16, 3, 2), nn.ReLU()]
    return [
        blocks.Chain(*halves, *stack),
        blocks.Chain(conv(8, 16, 3), *stack, upsample(16, 8), nn.ReLU(), upsample(8, 3)),
        blocks.Chain(conv(8, 16, 3), blocks.Residual(16), upsample(16, 8), conv(8, 4, 3)),
        blocks.Chain(nn.ReLU(), nn.ReLU(), blocks.Residual(8)),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_joined_layers_equal_layers_one_by_one(
    monkeypatch: pytest.MonkeyPatch, backend: str, number: int
) -> None:
    if backend in OP.missing:
        pytest.skip(OP.missing[backend])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float64 if backend == "reference" else torch.float32
    chain = chains()[number].to(device, dtype, memory_format=torch.channels_last)
    for parameter in chain.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # biases start as zeros
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(blocks, "LEAST_VALUES", 0)
    calls = functools.partial(conv_bias_relu, backend=backend)
    monkeypatch.setattr(blocks, "conv_bias_relu", calls)
    x = torch.randn(2, 3 if number == 0 else 8, 12, 8, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last)
    found = []
    for function in (lambda t: blocks.run_joined([*chain], t), lambda t: nn.Sequential(*chain)(t)):
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(own)
        out.backward(torch.cos(torch.arange(out.numel(), device=device)).view(out.shape).to(out))
        found.append([out.detach(), own.grad, *(p.grad for p in chain.parameters())])
        chain.zero_grad()
    for got, want in zip(*found, strict=True):
        assert_close("joined", got, want.double(), ulps=256)


def test_small_layers_are_left_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = chains()[1], torch.randn(2, 8, 12, 8)
    joined = []

    def record(*arguments, **keys):
        joined.append(arguments[1].shape[0 if not keys["transposed"] else 1])
        return conv_bias_relu(*arguments, **keys)

    monkeypatch.setattr(blocks, "conv_bias_relu", record)
    found = []
    # Most values of an input or output: five times 3072, 6144, and 9216 of the image.
    for least, wanted in ((3072, [16, 8, 16, 8, 16, 8]), (3073, [8]), (9217, [])):
        monkeypatch.setattr(blocks, "LEAST_VALUES", least)
        joined.clear()
        found.append(blocks.run_joined([*chain], x))
        assert joined == wanted
    for out in found[1:]:
        torch.testing.assert_close(out, found[0], rtol=1e-5, atol=1e-5)
    # Of the larger side: 2048 values become 512, or 128 become 512.
    for layer, x, most in (
        (conv(8, 8, 3, 2), torch.randn(1, 8, 16, 16), 2048),
        (upsample(8, 8), torch.randn(1, 8, 4, 4), 512),
    ):
        for least in (most, most + 1):
            monkeypatch.setattr(blocks, "LEAST_VALUES", least)
            joined.clear()
            blocks.run_joined([layer], x)
            assert len(joined) == (least == most)


@pytest.mark.parametrize(
    "kind",
    [
        *("hook", "pre-hook", "gradient", "gradient pre-hook"),
        *("forward", "class", "weight", "compiled", "mode"),
        *("global", "global pre-hook", "global gradient", "global gradient pre-hook"),
    ],
)
def test_layers_that_somebody_looks_at_run_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a GPU; here x says that it is on one."""
    chain, seen = chains()[0], []
    layer = chain[4].inner

    class Fake(torch.Tensor):
        device = torch.device("cuda")

    def joined(layers, x):
        seen.append("joined")
        return x

    monkeypatch.setattr(blocks, "run_joined", joined)
    x = torch.randn(1, 3, 8, 8).as_subclass(Fake)
    chain(x)
    assert seen == ["joined"]
    chain.joined = False
    chain(x)
    assert seen == ["joined"]
    chain.joined = True
    chain(x[0])
    assert seen == ["joined"]
    hook = (lambda *_: seen.append(kind)) if "gradient" not in kind else (lambda *_: None)
    handle = None
    if kind == "hook":
        handle = layer.register_forward_hook(hook)
    elif kind == "pre-hook":
        handle = layer.register_forward_pre_hook(hook)
    elif kind == "gradient":
        handle = layer.register_full_backward_hook(hook)
    elif kind == "gradient pre-hook":
        handle = layer.register_full_backward_pre_hook(hook)
    elif kind == "forward":
        layer.forward = lambda x: (seen.append(kind), nn.Conv2d.forward(layer, x))[1]
    elif kind == "class":
        layer.__class__ = type("Adapted", (nn.Conv2d,), {})
    elif kind == "weight":
        quantized = type("Quantized", (Fake,), {})
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(quantized))
    elif kind == "compiled":
        layer._compiled_call_impl = lambda x: (seen.append(kind), layer._call_impl(x))[1]
    elif kind == "mode":
        with FlopCounterMode(display=False) as counter:
            chain(x)
        assert counter.get_total_flops() > 0
        with BaseTorchDispatchMode():  # that one has module hooks too, this one has none
            chain(x)
        assert seen == ["joined"]
        return
    elif kind == "global":
        handle = nn.modules.module.register_module_forward_hook(hook)
    elif kind == "global pre-hook":
        handle = nn.modules.module.register_module_forward_pre_hook(hook)
    elif kind == "global gradient":
        handle = nn.modules.module.register_module_full_backward_hook(hook)
    else:
        handle = nn.modules.module.register_module_full_backward_pre_hook(hook)
    chain(x)
    silent = "gradient" in kind or kind in ("class", "weight")
    assert seen.count("joined") == 1 and (silent or kind in seen)
    if handle is not None:
        handle.remove()
        chain(x)
        assert seen.count("joined") == 2


def test_what_joined_layers_do_not_take_runs_layer_by_layer() -> None:
    """An image without a batch, other layers in a block; torch.fx sees all layers."""
    chain = chains()[0]
    assert chain(torch.randn(3, 8, 8)).shape == (16, 2, 2)
    assert len(torch.fx.symbolic_trace(chain).graph.find_nodes(op="call_module", target="0")) == 1
    for part in ("inner", "outer"):
        for other in (nn.ReLU(), upsample(8, 8)):
            block = blocks.Residual(16)
            assert blocks._is_plain(block)
            setattr(block, part, other)
            assert not blocks._is_plain(block)


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (conv(4, 8, 3), True),
        (conv(4, 8, 1), True),
        (nn.Conv2d(4, 8, (1, 3), 2), True),
        (upsample(4, 8), True),
        (nn.ReLU(), True),
        (nn.Conv2d(4, 8, 3, bias=False), False),
        (nn.Conv2d(4, 8, 3, groups=2), False),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), False),
        (nn.Conv2d(4, 8, 3, stride=(1, 2)), False),
        (nn.Conv2d(4, 8, 3, padding=(1, 0)), False),
        (nn.Conv2d(4, 8, 3, padding="same"), False),
        (nn.Conv2d(4, 8, 3, dilation=2), False),
        (nn.ConvTranspose2d(4, 8, 3, 2, 1, output_padding=1), False),
        (nn.GELU(), False),
        (type("Louder", (nn.ReLU,), {})(), False),
        (type("Wider", (blocks.Residual,), {})(4), False),
    ],
    ids=str,
)
def test_layers_that_can_be_joined(layer: nn.Module, plain: bool) -> None:
    assert blocks._is_plain(layer) == plain
    if plain:
        chain = blocks.Chain(layer)
        x = torch.randn(2, 4, 6, 8)
        torch.testing.assert_close(blocks.run_joined([*chain], x), chain(x))


@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (upsample(8, 3), True),
        (upsample(8, 4), False),
        (nn.ConvTranspose2d(8, 3, (4, 2), 2, 1), False),
        (nn.ConvTranspose2d(8, 3, 4, 1, 1), False),
        (nn.ConvTranspose2d(8, 3, 4, 2, 0), False),
    ],
    ids=str,
)
def test_images_are_made_by_their_own_kernel(
    monkeypatch: pytest.MonkeyPatch, layer: nn.ConvTranspose2d, image: bool
) -> None:
    made = []
    monkeypatch.setattr(blocks, "LEAST_VALUES", 0)
    monkeypatch.setattr(
        blocks, "upsample_image", lambda *a: (made.append(a), upsample_image(*a))[1]
    )
    x = torch.randn(2, 8, 3, 5)
    for layers in ([layer], [layer, nn.ReLU()]):
        want = nn.Sequential(*layers)(x)
        torch.testing.assert_close(blocks.run_joined(layers, x), want)
        assert len(made) == image  # not once more for the second, which wants a ReLU


def test_every_convolution_makes_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wants = []

    def record(*arguments, **keys):
        wants.append(keys["want"])
        return conv_bias_relu(*arguments, **keys)

    monkeypatch.setattr(blocks, "LEAST_VALUES", 0)
    monkeypatch.setattr(blocks, "conv_bias_relu", record)
    chain = chains()
    for number, channels, wanted in (
        (0, 3, ["relu", "relu", "relu", "both", "relu", "relu"]),
        (2, 8, ["both", "relu", "sum", "sum", "sum"]),
    ):
        wants.clear()
        blocks.run_joined([*chain[number]], torch.randn(1, channels, 8, 8))
        assert wants == wanted


def test_the_reference_runs_layer_by_layer() -> None:
    for preset in ("tiny", "vqvae2-tiny"):
        for backend, joined in ((None, True), ("native", True), ("reference", False)):
            parts = models.from_preset(preset, backend=backend).modules()
            assert {p.joined for p in parts if isinstance(p, blocks.Chain)} == {joined}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layers_can_be_traced() -> None:
    chain, x = chains()[0], torch.randn(1, 3, 8, 8)
    want = chain(x)
    for traced in (torch.fx.symbolic_trace(chain), torch.jit.trace(chain, x)):
        assert torch.equal(traced(x), want)


def test_a_compiled_chain_keeps_a_forward_of_its_own() -> None:
    class Doubled(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x, calls = torch.ones(1, 1, 2, 2), []
    chain = Chain(nn.ReLU())
    chain.forward = lambda x: calls.append(x) or x
    for module, want in ((Doubled(nn.ReLU()), 2 * x), (chain, x)):
        module.compile(backend="eager")
        assert torch.equal(module(x), want)
    assert calls
