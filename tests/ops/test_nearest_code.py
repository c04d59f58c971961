"""nearest_code: the float64 definition on every backend and instruction set, ties, near ties."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from msvq_fast.ops import nearest_code
from msvq_fast.ops.vector_quantize.op import OP

HALF = (torch.bfloat16, torch.float16)


def backends(dtype=torch.float32, codebook_dtype=torch.float32):
    z, codebook = torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2, dtype=codebook_dtype)
    return [b for b in ("reference", "native") if OP.why_not(b, z, codebook) is None]


BACKENDS = backends()
COMPILED = [b for b in BACKENDS if b != "reference"]


def brute_force(z, codebook):
    """The definition again, in NumPy: a few latents and all codes at a time, in order of d."""
    z, codebook = z.double().numpy(), codebook.double().numpy()
    columns = np.ascontiguousarray(codebook.T)
    codes, step = [], max(2**16 // len(codebook), 1)
    for first in range(0, len(z), step):
        rows = z[first : first + step]
        distance = np.zeros((len(rows), len(codebook)))
        for d, column in enumerate(columns):
            difference = rows[:, d, None] - column
            difference *= difference
            distance += difference
        distance[:, ~np.isfinite(codebook).all(1)] = math.inf
        codes.append(np.where(np.isfinite(rows).all(1), distance.argmin(1), 0))
    return torch.from_numpy(np.concatenate(codes))


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


def assert_codes_exact(z, codebook, monkeypatch, want=None):
    """Every compiled backend, and every instruction set of the C++ one, against the definition."""
    if want is None:
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
        out |= {isa: {"isa": isa, "filter": 0} for isa in isas}
        out |= {"int16": {"filter": 1}, "split bfloat16": {"filter": 2}}
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


@pytest.mark.skipif(not COMPILED, reason="only the reference is available")
@pytest.mark.parametrize("k", (5, 24, 60, 300))
def test_ties_of_different_codes(k, monkeypatch):
    # Small integers: many codes are exactly as far, in any lanes and vectors of a kernel.
    z, codebook = torch.randint(-1, 2, (500, 6)).float(), torch.randint(-1, 2, (k, 6)).float()
    assert_codes_exact(z, codebook, monkeypatch)
    assert_codes_exact(torch.zeros(3, 6), codebook * 2.0**-60, monkeypatch)


@pytest.mark.skipif(not COMPILED, reason="only the reference is available")
@pytest.mark.parametrize("d", (2, 64))
def test_lengths_of_every_size(d, monkeypatch):
    # Rows and codes each from far shorter to far longer than the others.
    lengths = 2.0 ** torch.arange(-40, 41)
    z, codebook = torch.randn(81, d), torch.randn(96, d)
    assert_codes_exact(z * lengths[:, None], codebook, monkeypatch)
    assert_codes_exact(z, codebook * lengths[torch.randint(81, (96, 1))], monkeypatch)
    for far in (3.0, 5.0, 1e3, 1e6, 1e12):
        codebook[17] = far
        assert_codes_exact(z, codebook, monkeypatch)
    # Codes of two lengths, and of one length with ever shorter rows.
    codebook = torch.randn(512, d) * torch.tensor([1.0, *[0.01] * 7]).repeat(64)[:, None]
    assert_codes_exact(0.01 * torch.randn(700, d), codebook, monkeypatch)
    codebook = torch.nn.functional.normalize(torch.randn(512, d))
    for length in (0.03, 0.003, 1e-4):
        assert_codes_exact(length * torch.randn(700, d), codebook, monkeypatch)


@pytest.mark.skipif(not COMPILED, reason="only the reference is available")
@pytest.mark.parametrize("k", (2**15 + 3, 2**17, 2**17 + 5))
def test_codes_are_exact_of_very_many(k, monkeypatch):
    assert_codes_exact(torch.randn(40, 3), torch.randn(k, 3), monkeypatch)


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


@pytest.mark.parametrize("backend", backends(torch.float16))
def test_large_float16_latents(backend):
    z = (torch.randn(50, 64) * 20000).clamp(-65504, 65504).half()  # |z|^2 overflows float16
    codebook = torch.randn(30, 64) * 20000
    assert torch.equal(nearest_code(z, codebook, backend=backend), brute_force(z, codebook))
