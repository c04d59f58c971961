"""The Triton kernels of vector quantization, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from msvq_fast.ops import ema_update_, nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP
from tests.parity import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = OP.why_not("triton", torch.zeros(1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def data(kind: str, n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    if kind == "init":
        codebook = (torch.rand(k, d) * 2 - 1) / k
    elif kind == "offset":
        z, codebook = z + 1000, codebook + 1000
    elif kind == "duplicates":
        codebook[k // 2 :] = codebook[: k - k // 2].clone()
    elif kind == "ties":
        z, codebook = z.round(), codebook.round()
    elif kind in ("tiny", "huge"):
        scale = 1e-20 if kind == "tiny" else 1e15
        z, codebook = z * scale, codebook * scale
    elif kind == "broken":
        z[1, 0], z[3, d - 1], codebook[k // 3, 0] = float("nan"), float("inf"), float("nan")
    return z.to(DEVICE), codebook.to(DEVICE)


KINDS = ("normal", "init", "offset", "duplicates", "ties", "tiny", "huge", "broken")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "d"), [(70, 257, 64), (33, 7, 9)])
def test_codes_are_exact(kind: str, n: int, k: int, d: int) -> None:
    z, codebook = data(kind, n, k, d)
    want = nearest_code(z, codebook, backend="reference")
    assert torch.equal(nearest_code(z, codebook, backend="triton"), want)


@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 4), (1, 1, 1), (5, 2, 65), (17, 256, 128)])
def test_codes_of_awkward_sizes(n: int, k: int, d: int) -> None:
    z, codebook = data("normal", n, k, d)
    for x in (z, z.half()):
        want = nearest_code(x, codebook, backend="reference")
        assert torch.equal(nearest_code(x, codebook, backend="triton"), want)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_outputs_and_gradient(layout: torch.memory_format) -> None:
    codebook = torch.randn(11, 6, device=DEVICE)
    x = torch.randn(2, 6, 5, 7, device=DEVICE).contiguous(memory_format=layout)
    mine, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    got = vector_quantize(mine, codebook, dim=1, backend="triton")
    want = vector_quantize(truth, codebook.double(), dim=1, backend="reference")
    assert torch.equal(got.codes, want.codes) and torch.equal(got.code_counts, want.code_counts)
    assert torch.equal(got.z_q.double(), want.z_q) and got.z_q.stride() == mine.stride()
    assert_close("loss", got.commitment_loss, want.commitment_loss)
    assert_close("sums", got.code_sums, want.code_sums)
    weight = torch.randn_like(x)
    ((got.z_q * weight).sum() + 3 * got.commitment_loss).backward()
    ((want.z_q * weight.double()).sum() + 3 * want.commitment_loss).backward()
    assert mine.grad is not None and truth.grad is not None
    assert_close("grad_z", mine.grad, truth.grad)
    again = vector_quantize(x, codebook, dim=1, backend="triton")
    assert torch.equal(again.code_sums, got.code_sums)


def test_broken_latents_are_left_out() -> None:
    z, codebook = data("broken", 20, 9, 8)
    got = vector_quantize(z, codebook, backend="triton")
    want = vector_quantize(z, codebook, backend="reference")
    assert torch.equal(got.codes, want.codes) and torch.equal(got.code_counts, want.code_counts)
    assert not got.commitment_loss.isfinite() and got.code_sums.isfinite().all()


def test_ema_update_is_the_references() -> None:
    counts = torch.tensor([0, 3, 5], device=DEVICE)
    state = [torch.randn(3, 4), torch.rand(3) + 1, torch.randn(3, 4)]
    sums = torch.randn(3, 4, device=DEVICE) * counts[:, None]
    mine = [t.to(DEVICE).clone() for t in state]
    truth = [t.to(DEVICE).double() for t in state]
    ema_update_(*mine, counts, sums, backend="triton")
    ema_update_(*truth, counts, sums.double(), backend="reference")
    for name, got, want in zip(("codebook", "mass", "sums"), mine, truth, strict=True):
        assert_close(name, got, want)
    assert torch.equal(mine[0][0], state[0][0].to(DEVICE))  # no latent: bit for bit
