"""Convolution with bias, residual and ReLU: against float64 on numbers whose sums are exact."""

from __future__ import annotations

import contextlib
import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from msvq_fast.ops import InputError, conv_bias_relu
from msvq_fast.ops.conv_bias_relu.op import OP
from tests.ops.conv_cases import (
    DEVICE,
    LAST,
    LAYERS,
    WANTED,
    inputs,
    leaves,
    needs_triton,
    run,
    small,
)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("want", WANTED)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_equals_the_reference(layer, want: str, dtype: torch.dtype) -> None:
    for residual in (False, True):
        given = inputs(layer, residual, dtype)
        mine, truth = leaves(given), leaves(given, torch.float64)
        got = run(mine, layer, want, "triton")
        expected = run(truth, layer, want, "reference")
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert (a is None) == (b is None) == (WANTED[1 - i] == want)
        pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None]
        loss = other = 0.0
        for a, b in pairs:
            assert a.dtype == dtype and a.is_contiguous(memory_format=LAST)
            assert torch.equal(a.double(), b)
            upstream = small(*b.shape)
            loss, other = loss + (a * upstream.to(dtype)).sum(), other + (b * upstream).sum()
        loss.backward()
        other.backward()
        for name, a, b in zip(("x", "weight", "bias", "residual"), mine, truth, strict=True):
            if a is not None:
                assert a.grad.dtype == dtype and torch.equal(a.grad.double(), b.grad), name


@needs_triton
def test_more_rows_than_a_step_of_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from msvq_fast.ops.conv_bias_relu import triton_kernels

    monkeypatch.setattr(triton_kernels, "_ELEMENTS", 64)
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 3)
    test_equals_the_reference(LAYERS[1], "both", torch.float32)


@needs_triton
def test_one_output_used_and_frozen_tensors() -> None:
    layer = LAYERS[1]
    given = inputs(layer, True)
    for used, frozen in itertools.product((0, 1), range(4)):
        grads = []
        for backend, dtype in (("triton", None), ("reference", torch.float64)):
            tensors = leaves(given, dtype)
            tensors[frozen].requires_grad_(False)
            torch.manual_seed(1)
            out = run(tensors, layer, "both", backend)[used]
            out.backward(small(*out.shape).to(out.dtype))
            grads.append([t.grad for t in tensors])
        for i, (a, b) in enumerate(zip(*grads, strict=True)):
            assert (a is None) == (b is None) == (i == frozen)
            assert a is None or torch.equal(a.double(), b)


@needs_triton
def test_computes_no_more_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(args[-1])
            return func(*args, **(kwargs or {}))

    layer, given = LAYERS[1], inputs(LAYERS[1], True)
    for want in itertools.product((True, False), repeat=2):
        masks: list[list[bool]] = []
        tensors = leaves(given)
        for tensor, wanted in zip(tensors, want, strict=False):
            tensor.requires_grad_(wanted)
        out = run(tensors, layer, "relu", "triton").relu
        with Masks():
            out.sum().backward()
        assert masks == ([[*want, False]] if any(want) else [])
    asked = []
    plain = OP.kernels["triton"].apply_mask
    monkeypatch.setattr(
        OP.kernels["triton"], "apply_mask", lambda *a: (asked.append(a), plain(*a))[1]
    )
    for used in (0, 1):  # no zeros are made and read for the other
        run(leaves(given), layer, "both", "triton")[used].sum().backward()
        assert [t is None for t in asked[-1][1:]] == [used == 1, used == 0]


@needs_triton
def test_a_gradient_that_ends_above() -> None:
    class End(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> None:
            return None

    tensors = leaves(inputs(LAYERS[1], True))
    End.apply(run(tensors, LAYERS[1], "relu", "triton").relu).sum().backward()
    assert all(t.grad is None for t in tensors)


@needs_triton
def test_only_plain_calls_pass_by_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = OP.kernels["triton"]
    called = []

    def note(name: str) -> None:
        plain = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a: (called.append(name), plain(*a))[1])

    direct, ops = ["convolve", "apply_mask"], ["conv_bias_relu", "mask_and_sum"]
    for name in (*direct, *ops):
        note(name)
    x, *rest = leaves(inputs(LAYERS[1], False))

    class Adapted(torch.Tensor):
        pass

    for value, mode, wanted in (
        (x, contextlib.nullcontext(), direct),
        (torch.nn.Parameter(x.detach()), contextlib.nullcontext(), direct),
        (x.detach().as_subclass(Adapted), contextlib.nullcontext(), ops),
        (x, FlopCounterMode(display=False), ops),
    ):
        called.clear()
        with mode:
            run([value, *rest], LAYERS[1], "relu", "triton").relu.sum().backward()
        assert called == wanted


@needs_triton
def test_gradients_in_any_layout() -> None:
    layer = LAYERS[2]
    mine, truth = leaves(inputs(layer, False)), None
    truth = leaves(mine, torch.float64)
    out = run(mine, layer, "both", "triton")
    (out.sum + out.relu).sum().backward()  # expanded
    other = run(truth, layer, "both", "reference")
    (other.sum + other.relu).sum().backward()
    for a, b in zip(mine[:3], truth[:3], strict=True):
        assert torch.equal(a.grad.double(), b.grad)


@needs_triton
def test_residuals_and_convolutions_in_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own CUDA convolutions, without cuDNN, keep none."""
    layer = LAYERS[1]
    x, weight, bias, residual = inputs(layer, True)
    want = run([x, weight, bias, residual], layer, "both", "reference")
    plain = torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *a: plain(*a).contiguous())
    for rest in (residual, residual.contiguous()):
        got = run([x, weight, bias, rest], layer, "both", "triton")
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) and a.is_contiguous(memory_format=LAST)


@needs_triton
@pytest.mark.parametrize("want", WANTED)
def test_bias_whose_numbers_are_apart(want: str) -> None:
    layer = LAYERS[1]
    x, weight, *_ = inputs(layer, False)
    for bias in (small(16)[::2], small(1).expand(8)):
        found = [run([x, weight, bias, None], layer, want, b) for b in ("triton", "reference")]
        for a, b in zip(*found, strict=True):
            assert a is None or torch.equal(a, b)


@needs_triton
def test_selective_checkpointing_keeps_whole_results() -> None:
    """Not a convolution's output that a kernel then adds the bias to."""
    layer = LAYERS[1]
    given = inputs(layer, True)
    keep = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default]
    )

    def twice(x: Tensor, *others: Tensor) -> Tensor:
        relu = run([x, *others], layer, "relu", "triton").relu
        return run([relu, *others], layer, "relu", "triton").relu

    found = []
    for kept in (True, False):
        x, weight, bias, residual = leaves(given)
        weight = torch.cat([weight, -weight]).detach().requires_grad_()
        bias = torch.cat([bias, bias + 1]).detach().requires_grad_()
        residual = torch.cat([residual, residual], 1).detach().requires_grad_()
        tensors = (x, weight, bias, residual)
        options = {"use_reentrant": False, "context_fn": keep}
        out = checkpoint(twice, *tensors, **options) if kept else twice(*tensors)
        out.square().sum().backward()
        found.append([t.grad for t in tensors])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_nan_stays_and_lets_gradients_through() -> None:
    layer = (8, 3, (2, 2), 4, 2, 1, True)
    given = inputs(layer, False)
    given[2][1] = float("nan")
    for again in (False, True):
        results = []
        for backend in ("triton", "reference"):
            x, weight, bias, _ = leaves(given)
            relu = run([x, weight, bias, None], layer, "relu", backend).relu
            ones = torch.ones_like(relu)
            grads = torch.autograd.grad(relu, (x, bias), ones, create_graph=again)
            results.append([t.detach() for t in (relu, *grads)])
        assert results[0][0][:, 1].isnan().all()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("want", WANTED)
def test_second_derivatives(monkeypatch: pytest.MonkeyPatch, want: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = LAYERS[0]
    given = inputs(layer, True)
    found = []
    for backend, dtype in (("triton", None), ("reference", torch.float64)):
        tensors = leaves(given, dtype)
        out = [t for t in run(tensors, layer, want, backend) if t is not None]
        loss = sum(((t + 1) ** 2).sum() for t in out)  # its gradient is not 0 where a ReLU is
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        second = sum((g * g).sum() for g in first)
        found.append(torch.autograd.grad(second, tensors[:2]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@needs_triton
def test_autocast_decides_the_dtype() -> None:
    layer = LAYERS[1]
    x, weight, bias, residual = leaves(inputs(layer, True))
    with torch.autocast(DEVICE, torch.float16):
        out = run([x, weight, bias, residual], layer, "both", "triton")
    assert out.sum.dtype == out.relu.dtype == torch.float16
    (out.sum * 2).sum().backward()
    assert {t.grad.dtype for t in (x, weight, bias, residual)} == {torch.float32}
    assert torch.equal(bias.grad, torch.full_like(bias, 2.0 * residual.numel() / len(bias)))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_autocast_takes_what_it_takes_of_pytorch(backend: str) -> None:
    """Any float dtypes, but float64 as it is."""
    layer = LAYERS[1]
    given = inputs(layer, True)
    mixed = [t.to(d) for t, d in zip(given, (torch.half, *[torch.float] * 3), strict=True)]
    with torch.autocast(DEVICE, torch.float16):
        for tensors in (given, mixed, [*given[:2], given[2].half(), given[3]]):
            assert run(tensors, layer, "sum", backend).sum.dtype == torch.float16
        wide = run([t.double() for t in given], layer, "sum", "reference").sum
        assert wide.dtype == torch.float64


@needs_triton
@pytest.mark.parametrize("want", WANTED)
def test_opcheck(want: str) -> None:
    from msvq_fast.ops.conv_bias_relu import triton_kernels

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for layer in (LAYERS[0], LAYERS[3]):
        x, weight, bias, residual = inputs(layer, True)
        arguments = (x, weight, bias, residual, *layer[4:], want)
        torch.library.opcheck(triton_kernels.conv_bias_relu, arguments, test_utils=tests)
        grad_sum, grad_relu = (residual if want != w else None for w in ("relu", "sum"))
        for layout in (LAST, torch.contiguous_format):
            grads = (
                t if t is None else t.contiguous(memory_format=layout)
                for t in (grad_sum, grad_relu)
            )
            arguments = (residual, *grads)
            torch.library.opcheck(triton_kernels.mask_and_sum, arguments, test_utils=tests)


@needs_triton
def test_compiles_whole() -> None:
    layer = LAYERS[1]
    compiled = torch.compile(
        lambda *t: conv_bias_relu(*t, padding=1, want="both", backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    given = inputs(layer, True)
    mine, truth = leaves(given), leaves(given)
    for tensors, function in ((mine, compiled), (truth, None)):
        out = function(*tensors) if function else run(tensors, layer, "both", "triton")
        (out[0] + 2 * out[1]).sum().backward()
    for a, b in zip(mine, truth, strict=True):
        assert torch.equal(a.grad, b.grad)


@needs_triton
def test_no_rows() -> None:
    layer = LAYERS[1]
    tensors = leaves(inputs(layer, False, batch=0))
    out = run(tensors, layer, "both", "triton")
    assert out.sum.shape == out.relu.shape == (0, 8, 5, 7)
    out.relu.sum().backward()
    assert torch.equal(tensors[2].grad, torch.zeros(8, device=DEVICE))


def test_errors_name_the_argument() -> None:
    x, weight, bias, _ = inputs(LAYERS[1], False)
    with pytest.raises(InputError, match="stride=0; expected at least 1"):
        conv_bias_relu(x, weight, bias, stride=0)
    with pytest.raises(InputError, match="padding=-1; expected at least 0"):
        conv_bias_relu(x, weight, bias, padding=-1)
    for rows in (1, 2):
        with pytest.raises(InputError, match=r"x has shape .*, too small for weight .* stride=1"):
            conv_bias_relu(x[:, :, :rows], weight, bias)
    with pytest.raises(InputError, match=r"want='all'"):
        conv_bias_relu(x, weight, bias, want="all")
    with pytest.raises(InputError, match=r"bias has shape \(7,\); expected \(8,\)"):
        conv_bias_relu(x, weight, bias[:7])
    with pytest.raises(InputError, match=r"x has shape \(2, 16, 5, 7\) and weight \(8, 15, 3, 3\)"):
        conv_bias_relu(x, weight[:, :15], bias)
    with pytest.raises(InputError, match=r"weight \(8, 16, 3, 3\); expected .* \(C, C_out, k, l\)"):
        conv_bias_relu(x, weight, bias, transposed=True)
    for arguments in ((x[:, :, 0], weight), (x, weight[..., 0])):
        with pytest.raises(InputError, match=r"\(B, C, H, W\) and \(C_out, C, k, l\)"):
            conv_bias_relu(*arguments, bias)
    with pytest.raises(InputError, match="bias is on meta but x is on"):
        conv_bias_relu(x, weight, bias.to("meta"))
    with pytest.raises(InputError, match=r"x has dtype torch\.int64; expected float32"):
        conv_bias_relu(x.long(), weight.long(), bias.long())
    with pytest.raises(InputError, match=r"weight has dtype torch\.float64"):
        conv_bias_relu(x, weight.double(), bias)
    with pytest.raises(
        InputError, match=r"residual has shape \(2, 8, 1, 1\); expected \(2, 8, 3, 5\)"
    ):
        conv_bias_relu(x, weight, bias, torch.zeros(2, 8, 1, 1, device=DEVICE))
    for name, others in (
        ("bias", (bias.double(),)),
        ("residual", (bias, small(2, 8, 3, 5).half())),
    ):
        with pytest.raises(InputError, match=rf"{name} has dtype torch\.float(64|16)"):
            conv_bias_relu(x, weight, *others)
    with pytest.raises(InputError, match=r"residual has dtype torch\.int64"):
        conv_bias_relu(x, weight, bias, torch.zeros(2, 8, 3, 5, dtype=torch.int64, device=DEVICE))


def test_sizes_alone() -> None:
    given = [t.to("meta") for t in inputs(LAYERS[3], True)]
    for out in run(given, LAYERS[3], "both", "reference"):
        assert out.shape == (2, 5, 6, 8)


@needs_triton
def test_says_why_it_cannot_run() -> None:
    x, weight, bias, _ = inputs(LAYERS[1], False)
    with pytest.raises(InputError, match="x in channels_last, its strides are"):
        conv_bias_relu(x.contiguous(), weight, bias, backend="triton")
    with pytest.raises(InputError, match="at most 2048 channels, not 2056"):
        conv_bias_relu(x, weight.repeat(257, 1, 1, 1), bias.repeat(257), backend="triton")
    unsupported = OP.kernels["triton"].unsupported
    assert unsupported(x, weight.repeat(256, 1, 1, 1), bias, False) is None
    with pytest.raises(InputError, match="on CUDA tensors, x is on meta"):
        conv_bias_relu(*(t.to("meta") for t in (x, weight, bias)), backend="triton")
    if DEVICE == "cpu":
        with pytest.raises(InputError, match="does not round bfloat16"):
            conv_bias_relu(*(t.bfloat16() for t in (x, weight, bias)), backend="triton")
    flipped = weight.transpose(0, 1)
    with pytest.raises(InputError, match="at most 2048 channels, not 2056"):
        more = {"transposed": True, "backend": "triton"}
        conv_bias_relu(x, flipped.repeat(1, 257, 1, 1), bias.repeat(257), **more)
    with pytest.raises(
        InputError, match=r"takes float32, float16 or bfloat16, x is torch\.float64"
    ):
        conv_bias_relu(x.double(), weight.double(), bias.double(), backend="triton")
