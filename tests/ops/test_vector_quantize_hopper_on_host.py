"""The quantizer's kernel for Hopper run on the host over a model of the block and its warps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from latent_cases import KINDS, OWN_KINDS, latents
from torch import Tensor

from msvq_fast.ops.vector_quantize import reference
from msvq_fast.ops.vector_quantize.layout import LATENT_TYPES
from msvq_fast.ops.vector_quantize.op import OP

_C = getattr(OP.kernels.get("native"), "_C", None)
needs_model = pytest.mark.skipif(
    not hasattr(_C, "vector_quantize_hopper_on_host"), reason="built without the model of a block"
)
QUICK = ("normal", "init", "trained", "near_ties", *OWN_KINDS[:7])


def on_host(
    z: Tensor, codebook: Tensor, *, vectors: bool = True, blocks: int = 2, order: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(codes, keys, z_q, sum of (z - e)²)``."""
    count = z.shape[0]
    codes = torch.full((count,), -7)
    keys = torch.full((count,), -7, dtype=torch.int16)
    z_q = torch.full_like(z, float("nan"))
    errors = torch.full((blocks,), float("nan"), dtype=torch.float64)
    _C.vector_quantize_hopper_on_host(
        z.data_ptr(),
        LATENT_TYPES[z.dtype],
        (count, codebook.shape[0]),
        (z.stride(0), z_q.stride(0)),
        codebook.data_ptr(),
        codes.data_ptr(),
        keys.data_ptr(),
        z_q.data_ptr() if vectors else 0,
        errors.data_ptr(),
        blocks,
        order,
    )
    return codes, keys, z_q, errors.sum()


def check(z: Tensor, codebook: Tensor, **options: int) -> None:
    """Codes equal float64 brute force, and all that follows from them is right."""
    want = reference.nearest_code(z, codebook, 1)
    codes, keys, z_q, error = on_host(z, codebook, **options)
    assert torch.equal(codes, want)
    finite = z.isfinite().all(1)
    assert torch.equal(keys.long(), want.where(finite, torch.tensor(codebook.shape[0])))
    assert torch.equal(z_q, codebook[want].to(z.dtype))
    exact = (z.double() - codebook[want].to(torch.float64)).square().sum()
    if not exact > 1e36:  # its squares are float32's
        torch.testing.assert_close(error, exact, rtol=2e-6, atol=1e-30, equal_nan=True)


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
    # 20 tiles a block: more than are on their way from the searchers to the assistants
    z, codebook = latents("trained", 20 * 64, 96)
    z[:60] = (codebook[:60] + codebook[1:61]) / 2
    want = on_host(z, codebook, blocks=1)
    got = on_host(z, codebook, blocks=1, order=order)
    assert all(map(torch.equal, got, want))
    assert torch.equal(on_host(z, codebook, vectors=False, blocks=1, order=order)[0], want[0])


@needs_model
def test_rows_and_codes_that_are_not_finite() -> None:
    z, codebook = latents("normal", 100, 70)
    z[::7, 3] = float("nan")
    z[1::9, 63] = float("inf")
    codebook[5, 1] = float("nan")
    codebook[6, 2] = -float("inf")
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

    monkeypatch.setattr(_C, "vector_quantize_hopper", launch, raising=False)
    processors = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)


@needs_model
@pytest.mark.skipif(OP.missing.get("triton") is not None, reason=str(OP.missing.get("triton")))
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU here")
@pytest.mark.parametrize(
    "layout", ["rows", "channels_last", "NCHW", "strided", "unaligned rows", "unaligned"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_op_around_the_kernel(launched_on_host: None, layout: str, dtype: torch.dtype) -> None:
    from msvq_fast.ops.vector_quantize import native_hopper

    codebook = torch.randn(70, 64)
    z = (codebook[torch.randint(70, (2, 9, 11))] + 0.7 * torch.randn(2, 9, 11, 64)).to(dtype)
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
    ):
        assert reason in str(native_hopper.unsupported(*args))
