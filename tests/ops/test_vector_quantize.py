"""vector_quantize: values, gradients, layouts, compilation, bad input, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from parity import assert_close

from msvq_fast.ops import ema_update_, nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

HALF = (torch.bfloat16, torch.float16)


def backends(dtype=torch.float32, codebook_dtype=torch.float32):
    z, codebook = torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2, dtype=codebook_dtype)
    return [b for b in ("reference", "native") if OP.why_not(b, z, codebook) is None]


BACKENDS = backends()
COMPILED = [b for b in BACKENDS if b != "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_rows_and_codes(backend):
    codebook = torch.randn(40, 8)
    z = codebook[[7, 8, 9, 10, 11]].clone()
    codebook[8, 3], codebook[9, 0], codebook[0, 1] = math.nan, math.inf, -math.inf
    z[3, 2], z[4, 7] = math.nan, -math.inf
    codes = nearest_code(z, codebook, backend=backend)
    assert torch.equal(codes, nearest_code(z, codebook, backend="reference"))
    assert codes[0] == 7 and codes[1] != 8 and codes[2] != 9
    assert codes[3:].tolist() == [0, 0]
    out = vector_quantize(z, codebook, backend=backend)
    assert not out.commitment_loss.isfinite()
    assert out.code_counts.sum() == 3 and out.code_counts[0] == 0
    assert torch.equal(out.z_q, codebook[codes])
    assert out.code_sums.isfinite().all()
    out = vector_quantize(z, codebook * math.nan, backend=backend)
    assert out.codes.tolist() == [0] * 5 and out.code_counts.tolist() == [3, *[0] * 39]
    assert out.code_sums.isfinite().all()


def layouts(dtype=torch.float32):
    """(name, z, dim): the same 2 x 6 x 5 x 7 latents, D = 6, in many strides."""
    x = torch.randn(2, 6, 5, 7).to(dtype)
    yield "nchw", x, 1
    yield "channels_last", x.contiguous(memory_format=torch.channels_last), -3
    yield "last", x.permute(0, 2, 3, 1).contiguous(), -1
    yield "last, transposed", x.permute(3, 0, 2, 1), 3
    yield "first", x.permute(1, 0, 2, 3).contiguous(), 0
    yield "channel slice", torch.cat([x, x], 1)[:, 3:9], 1
    yield "pixel slice", x.repeat(1, 1, 1, 2)[..., ::2], 1
    yield "expanded", x[:1].expand(2, -1, -1, -1), 1
    yield "matrix", x.permute(0, 2, 3, 1).reshape(-1, 6), 1
    yield "one latent", x[0, :, 0, 0], 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_every_layout_gives_the_same(backend, dtype):
    codebook = torch.randn(11, 6)
    for name, z, dim in layouts(dtype):
        z = z.detach().requires_grad_()
        rows = z.detach().movedim(dim, -1)
        out = vector_quantize(z, codebook, dim=dim, backend=backend)
        want = nearest_code(rows, codebook, backend="reference")
        assert torch.equal(out.codes, want), name
        assert torch.equal(nearest_code(z, codebook, dim=dim, backend=backend), want), name
        z_q = codebook[want].movedim(-1, dim).to(dtype)
        assert torch.equal(out.z_q, z_q) and out.z_q.dtype == dtype, name
        if name != "expanded":  # an expanded tensor has no layout to keep
            assert out.z_q.stride() == torch.empty_like(z).stride(), name
        assert torch.equal(out.code_counts, want.reshape(-1).bincount(minlength=11)), name
        sums = torch.zeros(11, 6, dtype=torch.float64)
        sums.index_add_(0, want.reshape(-1), rows.reshape(-1, 6).double())
        assert_close(f"{name} sums", out.code_sums, sums)
        upstream = torch.randn_like(z)
        (grad,) = torch.autograd.grad(
            [out.z_q, out.commitment_loss], [z], [upstream, torch.tensor(3.0)]
        )
        error = z.detach().double() - codebook[want].movedim(-1, dim).double()
        assert_close(f"{name} loss", out.commitment_loss, 0.25 * error.square().mean())
        want_grad = upstream.double() + 3 * 0.25 * 2 / z.numel() * error
        assert grad.dtype == dtype and grad.shape == z.shape
        assert_close(f"{name} grad", grad, want_grad, ulps=2)


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
def test_native_says_how_many_codes_it_takes():
    z, codes = torch.zeros(1, 1), torch.zeros(1, 1)
    assert OP.why_not("native", z, codes.expand(2**24, 1)) is None
    assert "codes" in OP.why_not("native", z, codes.expand(2**24 + 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", (False, True))
@pytest.mark.parametrize("shape", ((0, 4), (2, 4, 0, 3), (3, 4, 2, 0, 5)))
def test_empty(backend, shape, strided):
    z = torch.randn(shape)
    if strided:  # as no dense tensor is, and contiguous for all that
        z = torch.randn([2 * size + 1 for size in shape])[tuple(slice(0, 2 * s, 2) for s in shape)]
    z.requires_grad_()
    out = vector_quantize(z, torch.randn(5, 4), dim=1, backend=backend)
    assert out.z_q.shape == shape and out.codes.numel() == 0
    assert out.commitment_loss == 0
    assert out.code_counts.tolist() == [0] * 5 and out.code_sums.abs().sum() == 0
    (out.commitment_loss + out.z_q.sum()).backward()
    assert z.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", (1, 2, 47, 48, 49, 127, 129, 385))
def test_any_number_of_rows(backend, n):
    for shape, dim in (((n, 20), 1), ((1, 20, n), 1)):
        z, codebook = torch.randn(shape), torch.randn(33, 20)
        out = vector_quantize(z, codebook, dim=dim, backend=backend)
        want = nearest_code(z, codebook, dim=dim, backend="reference")
        assert torch.equal(out.codes, want)
        assert torch.equal(out.z_q, codebook[want].movedim(-1, dim))
        assert out.code_counts.sum() == n


def test_gradient_in_float64():
    z, codebook = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    z.requires_grad_()

    def loss(z):
        return vector_quantize(z, codebook, commitment_weight=0.7).commitment_loss

    assert torch.autograd.gradcheck(loss, z)
    out = vector_quantize(z, codebook)
    assert out.commitment_loss.dtype == out.code_sums.dtype == torch.float64
    upstream = torch.randn_like(z)
    (grad,) = torch.autograd.grad(out.z_q, z, upstream)
    assert torch.equal(grad, upstream)
    assert not (out.codes.requires_grad or out.code_counts.requires_grad)
    assert not out.code_sums.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_the_two_gradients(backend):
    codebook = torch.randn(9, 8)
    z = torch.randn(30, 8, requires_grad=True)
    upstream = torch.randn(30, 8)
    out = vector_quantize(z, codebook, backend=backend)
    (grad,) = torch.autograd.grad(out.z_q, z, upstream, retain_graph=True)
    assert torch.equal(grad, upstream)
    (grad,) = torch.autograd.grad(out.commitment_loss, z)
    assert_close("grad", grad, 0.25 * 2 / z.numel() * (z.detach() - out.z_q.detach()).double())
    assert not vector_quantize(z.detach(), codebook, backend=backend).z_q.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_codebook_changed_between_forward_and_backward(backend):
    codebook = torch.randn(9, 8)
    before = codebook.clone()
    z = torch.randn(30, 8, requires_grad=True)
    out = vector_quantize(z, codebook, backend=backend)
    codebook.mul_(2)
    (grad,) = torch.autograd.grad(out.commitment_loss, z)
    want = 0.25 * 2 / z.numel() * (z.detach() - before[out.codes]).double()
    assert_close("grad", grad, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codebook_that_is_not_contiguous(backend):
    codebook = torch.randn(8, 9).t()
    z = torch.randn(30, 8, requires_grad=True)
    out = vector_quantize(z, codebook, backend=backend)
    (grad,) = torch.autograd.grad(out.commitment_loss, z)
    assert torch.equal(out.z_q, codebook[out.codes])
    want = 0.25 * 2 / z.numel() * (z.detach() - codebook[out.codes]).double()
    assert_close("grad", grad, want)


@pytest.mark.parametrize("backend", COMPILED)
def test_second_backward_raises(backend):
    z = torch.randn(30, 8, requires_grad=True)
    loss = vector_quantize(z, torch.randn(9, 8), backend=backend).commitment_loss
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_changes_nothing(backend, dtype):
    z, codebook = torch.randn(200, 16) + 5, torch.randn(64, 16) + 5
    plain = vector_quantize(z, codebook, backend=backend)
    with torch.autocast("cpu", dtype):
        under = vector_quantize(z, codebook, backend=backend)
    for one, other in zip(plain, under, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    z, codebook = torch.randn(3000, 16, requires_grad=True), torch.randn(64, 16)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out = vector_quantize(z, codebook, backend=backend)
            (grad,) = torch.autograd.grad(out.commitment_loss, z)
            runs.append((*out, grad))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        # The reference's sum of squares is torch's, which splits it by threads.
        skip = 2 if backend == "reference" else -1
        assert all(
            torch.equal(a, b)
            for i, (a, b) in enumerate(zip(run, runs[0], strict=True))
            if i != skip
        )


@pytest.mark.parametrize("backend", COMPILED)
def test_a_hundred_runs_are_equal_bit_for_bit(backend):
    z, codebook = torch.randn(500, 16, requires_grad=True), torch.randn(64, 16)
    first = None
    for _ in range(100):
        out = vector_quantize(z, codebook, backend=backend)
        moved, size, sums = codebook.clone(), torch.ones(64), codebook.clone()
        ema_update_(moved, size, sums, out.code_counts, out.code_sums, backend=backend)
        (grad,) = torch.autograd.grad([out.z_q.sum(), out.commitment_loss], [z])
        run = (*out, grad, moved, size, sums)
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_collapsed_codebook(backend):
    z = torch.randn(500, 8) + 100
    codebook = torch.randn(16, 8)
    codebook[3] = 100
    out = vector_quantize(z, codebook, backend=backend)
    assert out.code_counts[3] == 500
    assert_close("sums", out.code_sums[3], z.double().sum(0), ulps=32)
