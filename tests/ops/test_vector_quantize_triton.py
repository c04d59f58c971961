"""vector_quantize in Triton: on a GPU if there is one, else small in Triton's interpreter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ops.test_nearest_code import KINDS, make_data
from ops.test_nearest_code_grid import CODES, WIDTHS, data_sets
from ops.test_vector_quantize import layouts
from parity import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from msvq_fast.ops import InputError, ema_update_, nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

if OP.missing.get("triton") is not None:
    pytest.skip(OP.missing["triton"], allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if OP.why_not(
        "triton", torch.zeros(1, 1, dtype=dtype, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    )
    is None
]
# The interpreter computes with NumPy, which warns where a GPU goes on with Inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def assert_codes_exact(z, codebook):
    want = nearest_code(z, codebook, backend="reference").to(DEVICE)
    z, codebook = z.to(DEVICE), codebook.to(DEVICE)
    got = nearest_code(z, codebook, backend="triton")
    wrong = int((got != want).sum())
    assert wrong == 0, f"{tuple(codebook.shape)}: {wrong} of {len(z)} differ"
    return z, codebook, want


def test_the_types_of_this_device_run():
    assert torch.float32 in DTYPES and torch.float16 in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_exact(kind, dtype):
    assert_codes_exact(*make_data(kind, 66, 130, 8, dtype))


@pytest.mark.parametrize(
    ("k", "d"), (*((k, 64) for k in CODES), *((k, d) for k in (7, 257) for d in WIDTHS if d != 64))
)
def test_codes_are_exact_at_awkward_sizes(k, d):
    # The interpreter needs seconds for a row of many codes that is not certain.
    slow = ("norm_spread", "duplicates", "half_dead", "all_zero", "near_ties", "uncertain")
    quick = ("normal", "init", "offset5", "trained")
    for i, dtype in enumerate(DTYPES):
        for j, (kind, z, codebook) in enumerate(data_sets(12, k, d, dtype)):
            mine = kind in quick if k > 1024 else k < 1000 or kind not in slow
            if DEVICE == "cuda" or ((i + j + k + d) % 2 == 0 and mine):
                assert_codes_exact(z, codebook)


def test_wide_codes():
    assert_codes_exact(*make_data("normal", 40, 70, 200))


def test_rows_between_two_codes():
    # Rows on the bisector of a pair of codes, moved off it by a few units in the last place.
    codebook = torch.randn(64, 16)
    first, second = torch.randint(64, (2, 300))
    middle = (codebook[first].double() + codebook[second].double()) / 2
    step = (codebook[first] - codebook[second]).double()
    for distance in (1e-7, 1e-5, 1e-3):
        z = (middle + step * torch.randn(300, 1).double() * distance).float()
        assert_codes_exact(z, codebook)


def test_order_of_d_decides_the_tie():
    # 2**54 + 1.96 + 1.96 is 2**54 in that order, and more if the small squares come first.
    z = torch.zeros(5, 3)
    codebook = torch.tensor([[2.0**27, 1.4, 1.4], [2.0**27, 0.0, 0.0]])
    assert assert_codes_exact(z, codebook)[2].tolist() == [0] * 5
    assert assert_codes_exact(z, codebook.flip(1))[2].tolist() == [1] * 5


def test_ties_take_the_lowest_index():
    codebook = torch.randn(300, 8)
    codebook[[5, 37, 299]] = codebook[2].clone()
    codebook[250] = codebook[0].clone()  # a pair, in different tiles
    assert_codes_exact(codebook[[2, 5, 37, 299, 250, 0]], codebook)


def test_non_finite_rows_and_codes():
    codebook = torch.randn(40, 8)
    z = codebook[[7, 8, 9, 10, 11]].clone()
    codebook[8, 3], codebook[9, 0], codebook[0, 1] = math.nan, math.inf, -math.inf
    z[3, 2], z[4, 7] = math.nan, -math.inf
    z, codebook, codes = assert_codes_exact(z, codebook)
    assert codes[3:].tolist() == [0, 0]
    out = vector_quantize(z, codebook, backend="triton")
    assert not out.commitment_loss.isfinite()
    assert out.code_counts.sum() == 3 and out.code_counts[0] == 0
    assert torch.equal(out.z_q, codebook[codes])
    assert out.code_sums.isfinite().all()
    assert nearest_code(z, codebook * math.nan, backend="triton").tolist() == [0] * 5


def test_rows_far_longer_than_the_codes():
    """Beyond what float16 holds, where the filter's scores are infinite."""
    codebook = torch.randn(70, 8)
    z = torch.randn(9, 8) * torch.logspace(3, 19, 9)[:, None]
    assert_codes_exact(z, codebook)
    # Of the two codes ahead one keeps its infinite score, and the other is the nearest.
    codebook = torch.tensor([1.0, 2.0] + 6 * [-1.0])[:, None]
    assert assert_codes_exact(torch.full((3, 1), 1e6), codebook)[2].tolist() == [1] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_gives_the_same(dtype):
    codebook = torch.randn(11, 6, device=DEVICE)
    for name, z, dim in layouts(dtype):
        z = z.to(DEVICE).requires_grad_()
        rows = z.detach().movedim(dim, -1)
        out = vector_quantize(z, codebook, dim=dim, backend="triton")
        want = nearest_code(rows, codebook, backend="reference")
        assert torch.equal(out.codes, want), name
        assert torch.equal(nearest_code(z, codebook, dim=dim, backend="triton"), want), name
        z_q = codebook[want].movedim(-1, dim).to(dtype)
        assert torch.equal(out.z_q, z_q) and out.z_q.dtype == dtype, name
        if name != "expanded":  # an expanded tensor has no layout to keep
            assert out.z_q.stride() == torch.empty_like(z).stride(), name
        assert torch.equal(out.code_counts, want.reshape(-1).bincount(minlength=11)), name
        sums = torch.zeros(11, 6, dtype=torch.float64, device=DEVICE)
        sums.index_add_(0, want.reshape(-1), rows.reshape(-1, 6).double())
        assert_close(f"{name} sums", out.code_sums, sums)
        upstream = torch.randn_like(z)
        three = torch.tensor(3.0, device=DEVICE)
        (grad,) = torch.autograd.grad([out.z_q, out.commitment_loss], [z], [upstream, three])
        error = z.detach().double() - codebook[want].movedim(-1, dim).double()
        assert_close(f"{name} loss", out.commitment_loss, 0.25 * error.square().mean())
        want_grad = upstream.double() + 3 * 0.25 * 2 / z.numel() * error
        assert_close(f"{name} grad", grad, want_grad, ulps=2)


@pytest.mark.parametrize("strided", (False, True))
def test_blocks_that_share_an_outer_index(strided):
    """Images of a multiple of a block's rows, one after another and apart from each other."""
    z, codebook = torch.randn(6, 5, 16, 16, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    z = z[::2] if strided else z[:2]
    z.requires_grad_()
    out = vector_quantize(z, codebook, dim=1, backend="triton")
    twin = z.detach().double().requires_grad_()
    want = vector_quantize(twin, codebook.double(), dim=1, backend="reference")
    assert torch.equal(out.codes, want.codes) and torch.equal(out.code_counts, want.code_counts)
    assert_close("z_q", out.z_q.detach(), want.z_q.detach())
    assert_close("sums", out.code_sums, want.code_sums, ulps=16)
    assert_close("loss", out.commitment_loss.detach(), want.commitment_loss.detach(), ulps=16)
    upstream = torch.randn(z.shape, device=DEVICE)
    (out.z_q * upstream).sum().add(out.commitment_loss).backward()
    (want.z_q * upstream).sum().add(want.commitment_loss).backward()
    assert_close("grad", z.grad, twin.grad)


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory is free only where it is untouched")
@pytest.mark.parametrize("stride", ((2**30, 1), (1, 2**30)))
def test_offsets_past_32_bits(stride):
    rows, codebook = torch.randn(4, 3).half(), torch.randn(7, 3)
    memory = torch.from_numpy(np.zeros(2**32, np.float16))
    z = memory.as_strided((4, 3), stride).copy_(rows).requires_grad_()
    twin = rows.double().requires_grad_()
    out = vector_quantize(z, codebook, backend="triton")
    want = vector_quantize(twin, codebook.double(), backend="reference")
    assert torch.equal(out.codes, want.codes)
    assert_close("sums", out.code_sums, want.code_sums)
    upstream = torch.randn(4, 3)
    (out.z_q * upstream).sum().add(out.commitment_loss).backward()
    (want.z_q * upstream.double()).sum().add(want.commitment_loss).backward()
    assert_close("grad", z.grad, twin.grad)


@pytest.mark.parametrize("shape", ((0, 4), (2, 4, 0, 3)))
def test_empty(shape):
    z = torch.randn(shape, device=DEVICE, requires_grad=True)
    out = vector_quantize(z, torch.randn(5, 4, device=DEVICE), dim=1, backend="triton")
    assert out.z_q.shape == shape and out.codes.numel() == 0
    assert out.commitment_loss == 0
    assert out.code_counts.tolist() == [0] * 5 and out.code_sums.abs().sum() == 0
    (out.commitment_loss + out.z_q.sum()).backward()
    assert z.grad.shape == shape


def test_a_popular_code_is_summed_in_parts_and_repeats_bit_for_bit():
    z = torch.randn(3000, 4, device=DEVICE) + 100
    codebook = torch.randn(6, 4, device=DEVICE)
    codebook[3] = 100
    runs = [vector_quantize(z, codebook, backend="triton") for _ in range(2)]
    assert runs[0].code_counts.tolist() == [0, 0, 0, 3000, 0, 0]
    assert_close("sums", runs[0].code_sums[3], z.double().sum(0), ulps=32)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


# Rows of every code, the last that are not finite; a piece is 128 of them.
PIECES = (
    [128, 0, 128, 127, 1, 128],
    [0, 0, 129, 126, 0, 2, 300, 0, 5],
    [1, 0, 0, 0, 700, 1],
    [3, 255, 0, 0, 400],
)


@pytest.mark.parametrize("rows_of_codes", PIECES, ids=str)
@pytest.mark.parametrize("dim", (1, -1))
def test_sums_of_pieces(rows_of_codes, dim):
    """Codes that end where a piece does, have several or none, or begin with an empty one."""
    rows_of_codes = torch.tensor(rows_of_codes)
    num_codes = len(rows_of_codes) - 1
    codebook = 10.0 * torch.arange(num_codes)[:, None] + torch.randn(num_codes, 3)
    of = torch.repeat_interleave(torch.arange(num_codes + 1), rows_of_codes)
    of = of[torch.randperm(len(of))]
    z = codebook[of.clamp(max=num_codes - 1)] + torch.randn(len(of), 3)
    z[of == num_codes] = math.nan
    z = z.to(DEVICE)
    moved = z if dim == -1 else z[None].movedim(1, 2).contiguous()
    out = vector_quantize(moved, codebook.to(DEVICE), dim=dim, backend="triton")
    assert out.code_counts.tolist() == rows_of_codes[:-1].tolist()
    sums = torch.zeros(num_codes + 1, 3, dtype=torch.float64, device=DEVICE)
    sums.index_add_(0, of.to(DEVICE), z.double())
    assert_close("sums", out.code_sums, sums[:-1], ulps=16)
    assert out.commitment_loss.isnan()
    finite = z[of != num_codes]
    loss = vector_quantize(finite, codebook.to(DEVICE), backend="triton").commitment_loss
    error = finite.double() - codebook.to(DEVICE)[of[of != num_codes].to(DEVICE)].double()
    assert_close("loss", loss, 0.25 * error.square().mean(), ulps=16)


@pytest.mark.parametrize("laplace_eps", (0.0, 0.5))
@pytest.mark.parametrize("threshold", (0.0, 0.5, 3.0))
def test_ema_update(laplace_eps, threshold):
    codebook, fresh = torch.randn(2, 70, 3, device=DEVICE)
    state = [codebook, 10 * torch.rand(70, device=DEVICE), codebook.clone()]
    state[1][1] = 0.1
    fresh[5, 1] = math.nan
    truth, mass = [t.double() for t in state], state[1].clone()
    counts = torch.randint(0, 3, (70,), device=DEVICE)
    sums = torch.randn(70, 3, device=DEVICE) * counts[:, None]
    options = {"laplace_eps": laplace_eps, "restart_below": threshold, "decay": 0.9}
    restart = fresh if threshold else None
    before = codebook.clone()
    ema_update_(*state, counts, sums, **options, restart_vectors=restart, backend="triton")
    options |= {"restart_vectors": restart, "backend": "reference"}
    ema_update_(*truth, counts, sums.double(), **options)
    for got, want in zip(state, truth, strict=True):
        assert_close("state", got, want)
    kept = (counts == 0) & (0.9 * mass > threshold)
    assert kept.any() and torch.equal(codebook[kept], before[kept])


def test_opcheck():
    z, codebook = torch.randn(10, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    ops = torch.ops.msvq_fast
    torch.library.opcheck(ops.nearest_code_triton, (z, codebook, 1))
    torch.library.opcheck(ops.vector_quantize_triton, (z, codebook, 1, 0.25))
    codes = nearest_code(z, codebook, backend="triton")
    one = torch.ones((), device=DEVICE)
    args = (z, one, z, codes, codebook, 1, 0.25)
    torch.library.opcheck(ops.vector_quantize_backward_triton, args)
    counts = torch.ones(5, dtype=torch.int64, device=DEVICE)
    mass = torch.ones(5, device=DEVICE)
    args = (codebook, mass, codebook.clone(), counts, codebook.clone(), 0.9, 0.0, 0.0, None)
    torch.library.opcheck(ops.ema_update_triton, args)


def test_compiles_in_one_graph():
    codebook = torch.randn(12, 4, device=DEVICE)

    def step(z):
        out = vector_quantize(z, codebook, dim=1, backend="triton")
        return out.z_q.sum() * 2 + out.commitment_loss, out.codes, out.code_sums

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (6, 7, 9):
        z = torch.randn(batch, 4, 5, 3, device=DEVICE, requires_grad=True)
        twin = z.detach().clone().requires_grad_()
        loss, codes, sums = compiled(z)
        want_loss, want_codes, want_sums = step(twin)
        loss.backward()
        want_loss.backward()
        assert torch.equal(codes, want_codes) and torch.equal(sums, want_sums)
        torch.testing.assert_close(z.grad, twin.grad)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_unsupported_calls_say_why():
    z, codebook = torch.zeros(3, 300, device=DEVICE), torch.zeros(2, 300, device=DEVICE)
    with pytest.raises(InputError, match="D up to 256"):
        nearest_code(z, codebook, backend="triton")
    with pytest.raises(InputError, match="float32 codebook"):
        nearest_code(z[:, :2], codebook[:, :2].double(), backend="triton")
