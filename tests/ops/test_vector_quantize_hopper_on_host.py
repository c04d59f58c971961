"""The quantizer's kernel for Hopper run on the host over a model of the block and its warps."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from latent_cases import KINDS, OWN_KINDS, latents
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from msvq_fast.ops import nearest_code
from msvq_fast.ops.vector_quantize import reference
from msvq_fast.ops.vector_quantize.layout import LATENT_TYPES
from msvq_fast.ops.vector_quantize.op import OP

_C = getattr(OP.kernels.get("native"), "_C", None)
needs_model = pytest.mark.skipif(
    not hasattr(_C, "vector_quantize_hopper_on_host"), reason="built without the model of a block"
)
MOST_SUMS = getattr(_C, "hopper_most_sums", 0)
QUICK = ("normal", "init", "trained", "near_ties", *OWN_KINDS[:7])


def sums_of_parts(
    z: Tensor, keys: Tensor, num_codes: int, parts: int, order: int
) -> tuple[Tensor, Tensor]:
    """Counts and sums by the pass over the rows that more than 320 codes need."""
    counts = torch.full((parts, num_codes), -7, dtype=torch.int32)
    sums = torch.full((parts, num_codes, 64), float("nan"))
    _C.sum_rows_hopper_on_host(
        z.data_ptr(), LATENT_TYPES[z.dtype], (z.shape[0], num_codes, parts), z.stride(0),
        keys.data_ptr(), (counts.data_ptr(), sums.data_ptr()), order,
    )  # fmt: skip
    return counts, sums


def on_host(
    z: Tensor, codebook: Tensor, *, vectors: bool = True, blocks: int = 2, order: int = 0
) -> tuple[Tensor, ...]:
    """``(codes, keys)`` and, with ``vectors``, ``(z_q, sum of (z - e)² / 4, counts, sums)``."""
    count, num_codes = z.shape[0], codebook.shape[0]
    size, strides, kind = (count, num_codes), (z.stride(0), 64), LATENT_TYPES[z.dtype]
    codes = torch.full((count,), -7)
    keys = torch.full((count,), -7, dtype=torch.int16)
    z_q = torch.full((count, 64), float("nan"), dtype=z.dtype)
    errors = torch.full((blocks,), float("nan"), dtype=torch.float64)
    part_counts = torch.full((blocks, num_codes), -7, dtype=torch.int32)
    part_sums = torch.full((blocks, num_codes, 64), float("nan"))
    own_parts = (errors.data_ptr(), 0, 0)
    if num_codes <= MOST_SUMS:
        own_parts = (errors.data_ptr(), part_counts.data_ptr(), part_sums.data_ptr())
    outputs = (codes.data_ptr(), keys.data_ptr(), z_q.data_ptr() if vectors else 0)
    _C.vector_quantize_hopper_on_host(
        z.data_ptr(), kind, size, strides, codebook.data_ptr(), *outputs, own_parts, blocks, order
    )
    if not vectors:
        return codes, keys
    loss = torch.tensor(float("nan"))
    counts, sums = torch.full((num_codes,), -7), torch.full((num_codes, 64), float("nan"))
    totals = (loss.data_ptr(), counts.data_ptr(), sums.data_ptr())
    parts = blocks
    if num_codes > MOST_SUMS:
        parts = 3
        part_counts, part_sums = sums_of_parts(z, keys, num_codes, parts, order)
    from_parts = (errors.data_ptr(), part_counts.data_ptr(), part_sums.data_ptr())
    _C.total_hopper_on_host(from_parts, (blocks, parts, num_codes), 0.25, totals)
    return codes, keys, z_q, loss, counts, sums


def check(z: Tensor, codebook: Tensor, **options: int) -> None:
    """Codes equal float64 brute force, and all that follows from them is right."""
    want = reference.nearest_code(z, codebook, 1)
    codes, keys, z_q, loss, counts, sums = on_host(z, codebook, **options)
    assert torch.equal(codes, want)
    finite = z.isfinite().all(1)
    assert torch.equal(keys.long(), want.where(finite, torch.tensor(codebook.shape[0])))
    assert torch.equal(z_q, codebook[want].to(z.dtype))
    exact = (z.double() - codebook[want].to(torch.float64)).square().sum()
    if not exact > 1e36:  # its squares are float32's
        want_loss = (0.25 * exact).float()
        torch.testing.assert_close(loss, want_loss, rtol=2e-6, atol=1e-30, equal_nan=True)
    assert torch.equal(counts, torch.bincount(want[finite], minlength=codebook.shape[0]))
    exact = torch.zeros(codebook.shape, dtype=torch.float64)
    sizes = exact.clone().index_add_(0, want[finite], z[finite].double().abs())
    exact.index_add_(0, want[finite], z[finite].double())
    error = (sums.double() - exact).abs()
    bound = sizes * counts.clamp(min=1)[:, None] * 2.0**-24 + 1e-45
    assert torch.all((error <= bound) | (sizes > 3e38))  # beyond is beyond float32


@needs_model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_codes", [1, 2, 63, 256, 1000])
def test_codes_equal_brute_force(kind: str, num_codes: int) -> None:
    count = 150 if kind in QUICK else 40
    z, codebook = latents(kind, count, num_codes)
    for order in (0, 1):
        check(z, codebook, order=order)


@needs_model
@pytest.mark.parametrize("dtype", list(LATENT_TYPES))
@pytest.mark.parametrize("count", [1, 7, 64, 65, 700])
def test_sizes_types_and_strides(dtype: torch.dtype, count: int) -> None:
    z, codebook = latents("normal", count, 130)
    check(z.to(dtype), codebook)
    wide = torch.zeros(count, 96, dtype=dtype)
    wide[:, :64] = z
    check(wide[:, :64], codebook)


@needs_model
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_the_threads_changes_nothing(order: int) -> None:
    z, codebook = latents("trained", 20 * 64, 96)
    z[:60] = (codebook[:60] + codebook[1:61]) / 2
    z[200:500] = codebook[7]  # rows of one code that lie side by side
    want = on_host(z, codebook, blocks=1)
    got = on_host(z, codebook, blocks=1, order=order)
    assert all(map(torch.equal, got, want))
    assert torch.equal(on_host(z, codebook, vectors=False, blocks=1, order=order)[0], want[0])


# Codes of a row each: side by side, all over, few of them, one, and none for rows not finite.
KEYS = {
    "side by side": lambda count, num_codes: torch.arange(count) * num_codes // count,
    "all over": lambda count, num_codes: torch.randint(num_codes, (count,)),
    "few": lambda count, num_codes: torch.randint(6, (count,)) ** 2 * (num_codes // 26),
    "one": lambda count, num_codes: torch.full((count,), num_codes - 1),
    "not finite": lambda count, num_codes: torch.full((count,), num_codes),
}


@needs_model
@pytest.mark.parametrize("keys_of", KEYS)
@pytest.mark.parametrize(
    ("count", "num_codes", "dtype"),
    [
        (1, 321, torch.float32),
        (33, 512, torch.float16),
        (1500, 1000, torch.bfloat16),
        (2111, 1024, torch.float32),
    ],
)
def test_sums_of_many_codes(keys_of: str, count: int, num_codes: int, dtype: torch.dtype) -> None:
    keys = KEYS[keys_of](count, num_codes)
    keys[5::9] = num_codes
    z = torch.randn(count, 72).to(dtype)[:, :64]
    z[keys == num_codes, 3] = float("nan")
    want = None
    for order in (0, 1, 2):
        counts, sums = sums_of_parts(z, keys.short(), num_codes, 2, order)
        if want is None:
            want = sums
        assert torch.equal(sums, want)
        there = keys < num_codes
        assert torch.equal(counts.sum(0), torch.bincount(keys[there], minlength=num_codes))
        rows = z[there].double()
        exact = torch.zeros(num_codes, 64, dtype=torch.float64)
        sizes = exact.index_add(0, keys[there], rows.abs())
        error = (sums.double().sum(0) - exact.index_add(0, keys[there], rows)).abs()
        assert torch.all(error <= sizes * counts.sum(0)[:, None] * 2.0**-24)


@needs_model
@pytest.mark.parametrize("order", [0, 2])
def test_most_rows_are_open(order: int) -> None:
    z, codebook = latents("normal", 700, 96)
    z = (codebook[torch.randint(48, (700,))] + codebook[torch.randint(48, 96, (700,))]) / 2
    check(z + 1e-5 * torch.randn_like(z), codebook, order=order, blocks=1)


@needs_model
@pytest.mark.parametrize("num_codes", [70, 400])
def test_rows_and_codes_that_are_not_finite(num_codes: int) -> None:
    z, codebook = latents("normal", 100, num_codes)
    z[::7, 3] = float("nan")
    z[1::9, 63] = float("inf")
    codebook[5, 1] = float("nan")
    codebook[6, 2] = -float("inf")
    check(z, codebook)


@needs_model
@pytest.mark.parametrize("num_codes", [70, 400])
def test_far_rows_beside_near_ones_and_codes_left_out(num_codes: int) -> None:
    # rows share what keeps their scores positive; codes left out must be further than any margin
    z, codebook = latents("normal", 300, num_codes)
    z[::3] *= 300
    z[1::5] -= 2e4
    z[2::7] = codebook[2]
    z[4::32] = 1e38
    codebook[::4] = codebook[2]
    codebook[3::8, 9] = float("inf")
    check(z, codebook)


@needs_model
def test_no_finite_code() -> None:
    z, codebook = latents("normal", 10, 3)
    codebook[:, 7] = float("nan")
    assert torch.equal(on_host(z, codebook)[0], torch.zeros(10, dtype=torch.int64))


@pytest.fixture
def launched_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the op launches on a GPU runs on the host."""

    def launch(*arguments: object) -> None:
        *kernel, _device, _stream = arguments
        _C.vector_quantize_hopper_on_host(*kernel, 0)

    def sum_rows(*arguments: object) -> None:
        *kernel, _device, _stream = arguments
        _C.sum_rows_hopper_on_host(*kernel, 0)

    def add_up(*arguments: object) -> None:
        *kernel, _device, _stream = arguments
        _C.total_hopper_on_host(*kernel)

    monkeypatch.setattr(_C, "vector_quantize_hopper", launch, raising=False)
    monkeypatch.setattr(_C, "sum_rows_hopper", sum_rows, raising=False)
    monkeypatch.setattr(_C, "total_hopper", add_up, raising=False)
    processors = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)


@needs_model
@pytest.mark.parametrize(
    "layout", ["rows", "channels_last", "NCHW", "strided", "unaligned rows", "unaligned"]
)
@pytest.mark.parametrize(
    ("dtype", "num_codes"),
    [(torch.float32, 70), (torch.float16, 70), (torch.bfloat16, 70), (torch.float32, 400)],
)
def test_the_op_around_the_kernel(
    launched_on_host: None, layout: str, dtype: torch.dtype, num_codes: int
) -> None:
    from msvq_fast.ops.vector_quantize import native_hopper

    codebook = torch.randn(num_codes, 64)
    z = (codebook[torch.randint(num_codes, (2, 9, 11))] + 0.7 * torch.randn(2, 9, 11, 64)).to(dtype)
    z[0, 3, 2, 5] = float("nan")
    dim = 3
    if not layout.endswith("rows"):
        z, dim = z.movedim(3, 1), 1
    if layout == "NCHW":
        z = z.contiguous()
    elif layout == "strided":
        z = z[..., ::2]
    elif layout.startswith("unaligned"):  # in memory as before, an element further
        rows = z.movedim(dim, -1).flatten()
        z = torch.cat([rows[:1], rows])[1:].view(2, 9, 11, 64).movedim(-1, dim)
    want = reference.vector_quantize(z, codebook, dim, 0.25)
    got = native_hopper.quantize(z, codebook, dim, 0.25)
    assert torch.equal(native_hopper.search_codes(z, codebook, dim), want[1])
    assert got[0].stride() == z.stride() or not z.is_contiguous()
    for name, x, y in zip(("z_q", "codes", "loss", "counts", "sums"), got, want, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


def test_what_the_kernel_does_not_take_is_said() -> None:
    native_hopper = pytest.importorskip(
        "msvq_fast.ops.vector_quantize.native_hopper", exc_type=ImportError
    )
    z, codebook = torch.zeros(4, 64), torch.zeros(8, 64)
    for args, reason in (
        ((z.double(), codebook), "float64"),
        ((z, codebook.double()), "float32 codebook"),
        ((z[:, :32], codebook[:, :32]), "D = 64, it is 32"),
        ((z, torch.zeros(1025, 64)), "up to 1024 codes, there are 1025"),
        ((torch.zeros(64, 65537), codebook, 0), "up to 65536 latents"),
    ):
        assert reason in str(native_hopper.unsupported(*args))
    built = hasattr(native_hopper._C, "vector_quantize_hopper")
    reason = "capability 9.0" if built else "no kernel for Hopper"
    for args in ((torch.zeros(64, 65536), codebook, 0), (torch.zeros(65537, 64), codebook)):
        assert reason in str(native_hopper.unsupported(*args))


def test_without_triton_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates and gradients of CUDA tensors are Triton's."""
    native = pytest.importorskip("msvq_fast.ops.vector_quantize.native", exc_type=ImportError)
    name = "msvq_fast.ops.vector_quantize"
    with FakeTensorMode():
        z = torch.empty(4, 64, device="cuda:0")
    monkeypatch.setitem(sys.modules, f"{name}.triton_kernels", None)
    monkeypatch.delattr(sys.modules[name], "triton_kernels", raising=False)
    assert "it needs Triton" in str(native.unsupported(z, z))


def test_fake_latents_on_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with FakeTensorMode():
        z = torch.empty(4, 64, device="cuda:0")
        assert nearest_code(z, z).shape == (4,)
