"""vector_quantize and nearest_code: values, gradients, layouts, bad input, on every backend."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from parity import assert_close

from msvq_fast.ops import nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

HALF = (torch.bfloat16, torch.float16)


def backends(dtype=torch.float32, codebook_dtype=torch.float32):
    z, codebook = torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2, dtype=codebook_dtype)
    return [b for b in ("reference", "native") if OP.why_not(b, z, codebook) is None]


BACKENDS = backends()
COMPILED = [b for b in BACKENDS if b != "reference"]


def brute_force(z, codebook):
    """The definition again, written the long way round: one latent and one d at a time."""
    codes = []
    for row in z.double():
        distance = torch.zeros(len(codebook), dtype=torch.float64)
        for d in range(codebook.shape[1]):
            difference = row[d] - codebook[:, d].double()
            distance = distance + difference * difference
        distance[~codebook.isfinite().all(1)] = math.inf
        codes.append(int(distance.argmin()) if row.isfinite().all() else 0)
    return torch.tensor(codes)


def make_data(kind, n, k, d, dtype=torch.float32):
    """The data sets on which expanded, low-precision or thresholded distances go wrong."""
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    if kind == "init":
        codebook = (torch.rand(k, d) * 2 - 1) / k
    elif kind.startswith("offset"):
        offset = float(kind.removeprefix("offset"))
        z, codebook = z + offset, codebook + offset
    elif kind == "trained":
        z = codebook[torch.randint(k, (n,))] + 0.3 * z
    elif kind == "on_codes":
        z = codebook[torch.randint(k, (n,))]
    elif kind.startswith("scale"):
        scale = float(kind.removeprefix("scale"))
        z, codebook = z * scale, codebook * scale
    elif kind == "mixed_rows":
        z = z * 10.0 ** torch.randint(-12, 13, (n, 1)).float()
    elif kind == "norm_spread":
        codebook = codebook * 10.0 ** (6 * torch.rand(k, 1))
    elif kind == "duplicates":
        codebook = codebook[torch.randint(max(k // 8, 1), (k,))]
    elif kind == "half_dead":
        codebook[torch.rand(k) < 0.5] = 0
        z = 0.1 * z
    elif kind == "all_zero":
        codebook = torch.zeros(k, d)
    elif kind == "constant":
        codebook = torch.ones(k, 1) * codebook[:1] + 1e-7 * torch.randn(k, d)
    elif kind == "near_ties":
        codebook = codebook[torch.arange(k) // 2]
        bits = torch.nextafter(codebook[1::2], torch.full(codebook[1::2].shape, math.inf))
        codebook[1::2] = torch.where(torch.rand(bits.shape) < 0.05, bits, codebook[1::2])
    z = z.to(dtype)
    return torch.where(z.isfinite(), z, torch.ones_like(z)), codebook


KINDS = (
    "normal",
    "init",
    "offset5",
    "offset1000",
    "trained",
    "on_codes",
    "scale1e-20",
    "scale1e15",
    "scale1e-38",
    "mixed_rows",
    "norm_spread",
    "duplicates",
    "half_dead",
    "all_zero",
    "constant",
    "near_ties",
)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_definition(kind):
    z, codebook = make_data(kind, 23, 17, 9)
    assert torch.equal(nearest_code(z, codebook, backend="reference"), brute_force(z, codebook))


@pytest.mark.parametrize("dtype", (torch.float64, *HALF))
def test_reference_is_the_definition_in_other_dtypes(dtype):
    z, codebook = make_data("normal", 23, 17, 9, dtype)
    codebook = codebook.double() if dtype == torch.float64 else codebook
    assert torch.equal(nearest_code(z, codebook, backend="reference"), brute_force(z, codebook))


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_d_decides_the_tie(backend):
    # 2**54 + 1.96 + 1.96 is 2**54 in that order, and more if the small squares come first.
    z = torch.zeros(5, 3)
    codebook = torch.tensor([[2.0**27, 1.4, 1.4], [2.0**27, 0.0, 0.0]])
    assert nearest_code(z, codebook, backend=backend).tolist() == [0] * 5
    assert nearest_code(z, codebook.flip(1), backend=backend).tolist() == [1] * 5


def assert_codes_exact(z, codebook, monkeypatch):
    """Every compiled backend, and every instruction set of the C++ one, against the definition."""
    want = nearest_code(z, codebook, backend="reference")
    rows = z.t().contiguous()
    for name, settings in variants().items():
        with monkeypatch.context() as patch:
            if settings:
                native = OP.kernels["native"]
                run = functools.partial(native._C.vector_quantize_cpu, **settings)
                patch.setattr(native._C, "vector_quantize_cpu", run)
            backend = "native" if settings else name
            for got in (
                nearest_code(z, codebook, backend=backend),
                nearest_code(rows, codebook, dim=0, backend=backend),
            ):
                wrong = int((got != want).sum())
                assert wrong == 0, f"{name}, {tuple(codebook.shape)}: {wrong} of {len(z)} differ"


def variants():
    out = {b: {} for b in COMPILED if b != "native"}
    if "native" in COMPILED:
        isas = OP.kernels["native"]._C.cpu_isas()
        out |= {isa: {"isa": isa, "matrix_unit": False} for isa in isas}
        out |= {"matrix unit": {"matrix_unit": True}}
    return out


@pytest.mark.skipif(not COMPILED, reason="only the reference is available")
@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_exact(kind, dtype, monkeypatch):
    for k, n, d in ((1, 5, 8), (7, 67, 1), (257, 130, 8), (256, 129, 64), (1000, 66, 32)):
        assert_codes_exact(*make_data(kind, n, k, d, dtype), monkeypatch)


@pytest.mark.skipif(not COMPILED, reason="only the reference is available")
@pytest.mark.parametrize("k", (2, 255, 1024, 8192, 16384))
@pytest.mark.parametrize("d", (63, 64, 65, 128))
def test_codes_are_exact_at_awkward_sizes(k, d, monkeypatch):
    for kind in ("normal", "init"):
        assert_codes_exact(*make_data(kind, 2**16 // k + 5, k, d), monkeypatch)


@pytest.mark.skipif(not COMPILED, reason="only the reference is available")
def test_rows_between_two_codes(monkeypatch):
    # Rows on the bisector of a pair of codes, moved off it by a few units in the last place.
    codebook = torch.randn(64, 64)
    first, second = torch.randint(64, (2, 2000))
    middle = (codebook[first].double() + codebook[second].double()) / 2
    step = (codebook[first] - codebook[second]).double()
    for distance in (1e-7, 1e-6, 1e-5):
        z = (middle + step * torch.randn(2000, 1).double() * distance).float()
        assert_codes_exact(z, codebook, monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_follow_a_permuted_codebook(backend):
    z, codebook = make_data("trained", 500, 64, 16)
    order = torch.randperm(64)
    want = nearest_code(z, codebook, backend=backend)
    assert torch.equal(order[nearest_code(z, codebook[order], backend=backend)], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_take_the_lowest_index(backend):
    codebook = torch.randn(300, 8)
    codebook[[5, 37, 299]] = codebook[2].clone()
    codebook[298, 0] = 0.0
    codebook[0] = codebook[298].clone()
    codebook[298, 0] = -0.0  # equal to code 0 in distance, not in bits
    z = codebook[[2, 5, 37, 299, 298, 0]]
    assert nearest_code(z, codebook, backend=backend).tolist() == [2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_rows_and_codes(backend):
    codebook = torch.randn(40, 8)
    z = codebook[[7, 8, 9, 10, 11]].clone()
    codebook[8, 3], codebook[9, 0], codebook[0, 1] = math.nan, math.inf, -math.inf
    z[3, 2], z[4, 7] = math.nan, -math.inf
    codes = nearest_code(z, codebook, backend=backend)
    assert torch.equal(codes, brute_force(z, codebook))
    assert codes[0] == 7 and codes[1] != 8 and codes[2] != 9
    assert codes[3:].tolist() == [0, 0]
    out = vector_quantize(z, codebook, backend=backend)
    assert not out.commitment_loss.isfinite()
    assert out.code_counts.sum() == 3 and out.code_counts[0] == 0
    assert torch.equal(out.z_q, codebook[codes])
    assert out.code_sums.isfinite().all()
    assert nearest_code(z, codebook * math.nan, backend=backend).tolist() == [0] * 5


@pytest.mark.parametrize("backend", backends(torch.float16))
def test_large_float16_latents(backend):
    z = (torch.randn(50, 64) * 20000).clamp(-65504, 65504).half()  # |z|^2 overflows float16
    codebook = torch.randn(30, 64) * 20000
    assert torch.equal(nearest_code(z, codebook, backend=backend), brute_force(z, codebook))


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
        want = brute_force(rows.reshape(-1, 6), codebook).view(rows.shape[:-1])
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((0, 4), (2, 4, 0, 3)))
def test_empty(backend, shape):
    z = torch.randn(shape, requires_grad=True)
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


@pytest.mark.parametrize("backend", COMPILED)
def test_second_backward_raises(backend):
    z = torch.randn(30, 8, requires_grad=True)
    loss = vector_quantize(z, torch.randn(9, 8), backend=backend).commitment_loss
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_saved_for_backward_is_small(backend):
    saved = []
    z, codebook = torch.randn(4096, 64, requires_grad=True), torch.randn(128, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vector_quantize(z, codebook, backend=backend)
    assert saved[0] is z
    assert sum(t.nbytes for t in saved[1:]) == 4096 * 8 + codebook.nbytes


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_collapsed_codebook(backend):
    z = torch.randn(500, 8) + 100
    codebook = torch.randn(16, 8)
    codebook[3] = 100
    out = vector_quantize(z, codebook, backend=backend)
    assert out.code_counts[3] == 500
    assert_close("sums", out.code_sums[3], z.double().sum(0), ulps=32)
