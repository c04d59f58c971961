"""The last layer of a decoder: its definition, and the Triton kernel (here in the interpreter)."""

from __future__ import annotations

import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from parity import assert_close, assert_matches_reference
from torch._dynamo.backends.common import aot_autograd

from msvq_fast.ops import InputError, upsample_image
from msvq_fast.ops.upsample_image.op import OP

needs_triton = pytest.mark.skipif("triton" in OP.missing, reason=OP.missing.get("triton", ""))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16] if DEVICE == "cuda" else [torch.float16, torch.float32]

# Columns: fewer than a tile, a tile and its last column, more; rows: one, odd, many strips.
SHAPES = [
    (1, 16, 1, 1),
    (3, 16, 9, 2),
    (2, 32, 3, 5),
    (1, 64, 4, 64),
    (1, 64, 5, 63),
    (2, 64, 2, 130),
    (1, 128, 3, 7),
]


def inputs(shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 3, 4, 4, dtype=dtype) * shape[1] ** -0.5
    return [t.to(device) for t in (x, weight, torch.randn(3, dtype=dtype))]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(tensors, upstream, **options):
    out = upsample_image(*tensors, **options)
    return out, torch.autograd.grad(out, tensors, upstream.to(out.dtype))


def truth(tensors):
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def test_definition_is_the_layer_of_pytorch():
    layer = torch.nn.ConvTranspose2d(5, 3, 4, 2, 1).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert torch.equal(upsample_image(x, layer.weight, layer.bias), layer(x))
    out = upsample_image(x, layer.weight, layer.bias)
    i, j, ky, kx = 1, 2, 3, 0
    moved = x.clone()
    moved[0, 4, i, j] += 1
    change = upsample_image(moved, layer.weight, layer.bias) - out
    assert_close("pixel", change[0, :, 2 * i + ky - 1, 2 * j + kx - 1], layer.weight[4, :, ky, kx])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_definition(shape, dtype):
    tensors = inputs(shape, dtype)
    if DEVICE == "cpu":
        ulps = 4 if dtype == torch.float16 else 16
        assert_matches_reference(upsample_image, tensors, backend="triton", ulps=ulps)
        return
    upstream = torch.randn(shape[0], 3, 2 * shape[2], 2 * shape[3]).to(dtype)
    want, wanted = gradients(truth(tensors), upstream.double(), backend="reference")
    got, grads = gradients(leaves([t.cuda() for t in tensors]), upstream.cuda(), backend="triton")
    assert_close("value", got.cpu(), want)
    for name, grad, right in zip("xwb", grads, wanted, strict=True):
        assert_close(name, grad.cpu(), right)


@needs_triton
def test_many_strips_and_programs(monkeypatch):
    """Strips that end in the middle, and programs with several tiles and with none."""
    from msvq_fast.ops.upsample_image import triton_kernels

    tensors = inputs((2, 16, 11, 5), DTYPES[-1], DEVICE)
    upstream = torch.randn(2, 3, 22, 10).to(DTYPES[-1])
    want, wanted = gradients(truth(tensors), upstream.double(), backend="reference")
    for enough, programs in ((1, 1), (4, 7), (10**6, 396)):
        monkeypatch.setattr(triton_kernels, "ENOUGH", enough)
        monkeypatch.setattr(triton_kernels, "MOST_ROWS", 5)
        monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
        got, grads = gradients(leaves(tensors), upstream.to(DEVICE), backend="triton")
        assert_close("value", got.cpu(), want, ulps=16)
        for name, grad, right in zip("xwb", grads, wanted, strict=True):
            assert_close(name, grad.cpu(), right, ulps=16)


@needs_triton
def test_layouts():
    """Memory formats of the result, of weights as `Module.to` leaves them and of gradients."""
    x, weight, bias = inputs((2, 16, 3, 4), DTYPES[0], DEVICE)
    want = upsample_image(x, weight, bias, backend="triton")
    assert want.is_contiguous(memory_format=torch.channels_last)
    last = weight.to(memory_format=torch.channels_last)
    longer = torch.stack([bias, bias], 1).flatten()[::2]
    tensors = [x.requires_grad_(), last.requires_grad_(), longer.requires_grad_()]
    out = upsample_image(*tensors, backend="triton")
    assert torch.equal(out, want)
    upstream = torch.randn_like(out)
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        moved = upstream.contiguous(memory_format=layout)
        results.append(torch.autograd.grad(out, tensors, moved, retain_graph=True))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][1].stride() == last.stride()
    plain = gradients(leaves([x, weight, bias]), upstream, backend="triton")[1]
    for a, b in zip(results[0], plain, strict=True):
        assert torch.equal(a, b)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(out.sum(), tensors)  # of stride 0
    assert_close("bias", grads[2].cpu(), torch.full((3,), 2.0 * 6 * 8, dtype=torch.float64))


@needs_triton
def test_an_empty_batch():
    x, weight, bias = leaves(inputs((0, 16, 3, 4), DTYPES[0], DEVICE))
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = upsample_image(x, weight, bias, backend="triton")
    assert out.shape == (0, 3, 6, 8)
    grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()


@needs_triton
@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_the_gradients_asked_for(wanted, monkeypatch):
    from msvq_fast.ops.upsample_image import triton_kernels

    asked = []
    plain = triton_kernels._empty_grads
    monkeypatch.setattr(
        triton_kernels,
        "_empty_grads",
        lambda x, weight, *needs: (asked.append(needs), plain(x, weight, *needs))[1],
    )
    tensors = inputs((1, 16, 3, 4), DTYPES[0], DEVICE)
    upstream = torch.randn(1, 3, 6, 8).to(DEVICE)
    _, every = gradients(leaves(tensors), upstream, backend="triton")
    some = leaves(tensors)
    for i, tensor in enumerate(some):
        tensor.requires_grad_(bool(wanted >> i & 1))
    out = upsample_image(*some, backend="triton")
    out.backward(upstream.to(out.dtype))
    assert asked[-1] == (bool(wanted & 1), wanted > 1)
    for i, tensor in enumerate(some):
        assert tensor.grad is None if not wanted >> i & 1 else torch.equal(tensor.grad, every[i])


@needs_triton
def test_dtypes_of_parameters():
    """Rounded to the dtype of x as they are read; their gradients are in their own."""
    from msvq_fast.ops.upsample_image import triton_kernels

    x, weight, bias = inputs((2, 16, 3, 4), torch.float32, DEVICE)
    x = x.half()
    got = triton_kernels.upsample_image(x, weight, bias)
    assert torch.equal(got, upsample_image(x, weight.half(), bias.half(), backend="triton"))
    upstream = torch.randn_like(got)
    full = triton_kernels.upsample_image_backward(upstream, x, weight, [True] * 3)
    half = triton_kernels.upsample_image_backward(upstream, x, weight.half(), [True] * 3)
    assert full[1].dtype == torch.float32 and half[1].dtype == torch.float16
    assert torch.equal(full[0], half[0]) and torch.equal(full[1].half(), half[1])


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has it")
def test_autocast_of_the_cpu():
    """The interpreter has no bfloat16 products: float16, which CPU autocast takes too."""
    x, weight, bias = inputs((1, 16, 3, 4))
    upstream = torch.randn(1, 3, 6, 8)
    with torch.autocast("cpu", torch.float16):
        got, grads = gradients(leaves([x, weight, bias]), upstream, backend="triton")
        wide = torch.randn(1, 16, 3, 4, dtype=torch.float64)
        with pytest.raises(InputError, match=r"weight has dtype torch.float32 but x has torch.f"):
            upsample_image(wide, weight, bias)
        with pytest.raises(InputError, match=r"weight has dtype torch.int64"):
            upsample_image(x, weight.long(), bias)
        mine = leaves([x, weight, bias])
        out = upsample_image(*mine, backend="triton")
    again = torch.autograd.grad(out, mine, upstream.half(), create_graph=True)
    for name, grad, right in zip("xwb", again, grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, right, rtol=1e-2, atol=1e-2, msg=name)
    rounded = [t.half() for t in (x, weight, bias)]
    want, wanted = gradients(truth(rounded), upstream.half().double(), backend="reference")
    assert got.dtype == torch.float16
    assert_close("value", got, want)
    for i, (name, grad, right) in enumerate(zip("xwb", grads, wanted, strict=True)):
        assert grad.dtype == torch.float32
        # Float32 sums, which are not rounded; that of x went through its float16.
        assert_close(name, grad if i else grad.half(), right, ulps=64 if i else 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert upsample_image(x, weight, bias).dtype == torch.bfloat16  # the reference


@needs_triton
def test_bias_has_its_gradient_in_its_own_dtype():
    """Also where the weight's could not hold it."""
    x = torch.zeros(1, 16, 130, 130, device=DEVICE).to(memory_format=torch.channels_last)
    weight = torch.zeros(16, 3, 4, 4, device=DEVICE, dtype=torch.float16)
    bias = torch.zeros(3, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        out = upsample_image(x, weight, bias, backend="triton")
    out.backward(torch.ones_like(out))
    assert bias.grad.tolist() == [260.0 * 260] * 3


@needs_triton
def test_writes_nothing_behind_the_gradient_of_the_bias(monkeypatch):
    from msvq_fast.ops.upsample_image import triton_kernels

    longer = torch.full((4,), 7.0, device=DEVICE)
    plain = triton_kernels._empty_grads
    monkeypatch.setattr(triton_kernels, "_empty_grads", lambda *a: (*plain(*a)[:2], longer[:3]))
    x, weight, _ = inputs((1, 16, 2, 3), DTYPES[0], DEVICE)
    upstream = torch.ones(1, 3, 4, 6, device=DEVICE, dtype=x.dtype)
    triton_kernels._upsample_image_backward(upstream, x, weight, True, True)
    assert longer.tolist() == [24.0] * 3 + [7.0]


@needs_triton
def test_neighbours_keep_what_is_not_finite_to_themselves():
    """Of every channel: what a patch reads beside its own is channel 2 before, 0 after it."""
    tensors = leaves(inputs((1, 16, 4, 6), DTYPES[0], DEVICE))
    for channel, (column, first) in itertools.product(range(3), ((6, 2), (7, 3))):
        upstream = torch.zeros(1, 3, 8, 12, device=DEVICE)
        upstream[0, channel, 3, column] = float("inf")
        _, (grad, _, _) = gradients(tensors, upstream, backend="triton")
        bad = ~grad.isfinite().all(1)[0]
        want = torch.zeros(4, 6, dtype=torch.bool, device=DEVICE)
        want[1:3, first : first + 2] = True
        assert torch.equal(bad, want)


@needs_triton
def test_repeats_bit_for_bit():
    tensors = inputs((2, 16, 9, 70), DTYPES[0], DEVICE)
    upstream = torch.randn(2, 3, 18, 140).to(DEVICE)
    first, *others = (gradients(leaves(tensors), upstream, backend="triton") for _ in range(3))
    for out, grads in others:
        assert torch.equal(out, first[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, first[1], strict=True))


@needs_triton
def test_second_derivative():
    tensors = leaves(inputs((1, 16, 2, 3), DTYPES[-1], DEVICE))
    exact = truth(tensors)
    results = []
    for mine, backend in ((tensors, "triton"), (exact, "reference")):
        torch.manual_seed(2)
        upstream = torch.randn(1, 3, 4, 6, dtype=torch.float64).to(mine[0]).requires_grad_()
        out = upsample_image(*mine, backend=backend)
        grads = torch.autograd.grad(out, mine, upstream, create_graph=True)
        loss = sum((g * torch.randn(g.shape, dtype=torch.float64).to(g)).sum() for g in grads)
        results.append(torch.autograd.grad(loss, [upstream, *mine[:2]]))
    for name, got, want in zip("gxw", *results, strict=True):
        assert_close(name, got.cpu(), want, ulps=32)


@needs_triton
def test_ops_follow_the_rules_of_pytorch():
    tensors = inputs((1, 16, 2, 3), DTYPES[0], DEVICE)
    torch.library.opcheck(torch.ops.msvq_fast.upsample_image_triton.default, tensors)
    upstream = upsample_image(*tensors, backend="triton")
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.msvq_fast.upsample_image_backward_triton.default,
            (upstream, *tensors[:2], *needs),
        )


@needs_triton
def test_compiled_in_one_graph():
    tensors = inputs((1, 16, 2, 3), DTYPES[0], DEVICE)
    upstream = torch.randn(1, 3, 4, 6).to(DEVICE)
    want, wanted = gradients(leaves(tensors), upstream, backend="triton")
    called = []

    def note(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(
        fw_compiler=lambda g, e: make_boxed_func(note(g, e)),
        bw_compiler=lambda g, e: make_boxed_func(note(g, e)),
    )
    run = torch.compile(
        lambda *t: upsample_image(*t, backend="triton"), fullgraph=True, backend=backend
    )
    mine = leaves(tensors)
    out = run(*mine)
    grads = torch.autograd.grad(out, mine, upstream.to(out.dtype))
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    assert "msvq_fast.upsample_image_triton.default" in called
    assert "msvq_fast.upsample_image_backward_triton.default" in called


@needs_triton
def test_transforms_see_the_definition():
    x, weight, bias = inputs((1, 16, 2, 3), DTYPES[0], DEVICE)
    total = lambda x, backend=None: upsample_image(x, weight, bias, backend=backend).sum()  # noqa: E731
    leaf = x.detach().requires_grad_()
    total(leaf, "triton").backward()
    assert_close("gradient", torch.func.grad(total)(x), leaf.grad)
    with pytest.raises(InputError, match=r"torch.func and forward-mode"):
        torch.func.grad(total)(x, "triton")


def test_bad_input():
    x, weight, bias = inputs((1, 16, 2, 3))
    for arguments, message in (
        ((x[0], weight, bias), r"x has shape \(16, 2, 3\); expected 4 dimensions"),
        ((x[:, :0], weight[:0], bias), "at least one channel"),
        ((x[:, :, :0], weight, bias), "height and width must be at least 1"),
        ((x, weight[:8], bias), r"weight has shape \(8, 3, 4, 4\); expected \(16, 3, 4, 4\)"),
        ((x, weight[..., :3], bias), r"expected \(16, 3, 4, 4\)"),
        ((x, weight, bias[:2]), r"bias has shape \(2,\); expected \(3,\)"),
        ((x.long(), weight, bias), "x has dtype torch.int64"),
        ((x, weight.double(), bias), "weight has dtype torch.float64 but x has torch.float32"),
        ((x, weight, bias.half()), "bias has dtype torch.float16 but x has torch.float32"),
        ((x, weight.to("meta"), bias), "weight is on meta but x is on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            upsample_image(*arguments)
    assert upsample_image(*(t.to("meta") for t in (x, weight, bias))).shape == (1, 3, 4, 6)


@needs_triton
def test_what_the_kernel_does_not_take():
    for shape, change, message in (
        ((1, 24, 2, 3), lambda x: x, "a power of two from 16 to 128 channels, not 24"),
        ((1, 256, 2, 3), lambda x: x, "a power of two from 16 to 128 channels, not 256"),
        ((1, 16, 2, 3), torch.Tensor.contiguous, "takes x in channels_last"),
        ((1, 16, 2, 3), torch.Tensor.double, "takes bfloat16 or float16, x is torch.float64"),
    ):
        x, weight, bias = inputs(shape, torch.float16, DEVICE)
        x = change(x)
        rest = weight.to(x.dtype), bias.to(x.dtype)
        with pytest.raises(InputError, match=message):
            upsample_image(x, *rest, backend="triton")
        assert upsample_image(x, *rest).shape == (1, 3, 4, 6)
    unsupported = OP.kernels["triton"].unsupported
    tensors = inputs((1, 16, 2, 3), torch.float16, DEVICE)
    x, weight, bias = tensors
    assert unsupported(x, weight.float(), bias.float()) is None
    assert "x is on meta" in unsupported(*(t.to("meta") for t in tensors))
    assert "weight of torch.float64" in unsupported(x, weight.double(), bias)
    assert "bias of torch.float64" in unsupported(x, weight, bias.double())
    if DEVICE == "cpu":
        assert "no bfloat16 products" in unsupported(*(t.bfloat16() for t in tensors))
