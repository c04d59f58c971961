"""Ops under torch.func and forward-mode differentiation, where kernels have no rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from msvq_fast.ops import gaussian_blur, local_attention, multiscale_loss, vector_quantize
from msvq_fast.ops.checks import InputError

CODEBOOK = torch.linspace(-1, 1, 8)[:, None].repeat(1, 4)
X = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)


def blurred(z: Tensor, backend: str | None) -> Tensor:
    return gaussian_blur(z.reshape(1, 1, 8, 8), 3, backend=backend).square().sum()


def lost(z: Tensor, backend: str | None) -> Tensor:
    c = z.reshape(1, 1, 8, 8)
    return multiscale_loss([c, c], X.to(c.dtype), kernel_size=3, backend=backend)[0]


def quantized(z: Tensor, backend: str | None) -> Tensor:
    out = vector_quantize(z.reshape(16, 4), CODEBOOK, backend=backend)
    return out.z_q[::2].square().sum() + out.commitment_loss


def attended(z: Tensor, backend: str | None) -> Tensor:
    q = z.reshape(1, 1, 16, 4)
    out = local_attention(q, [q], [q], grids=[(4, 4)], kernels=[3], backend=backend)
    return out.square().sum()


OPS = pytest.mark.parametrize("op", [blurred, lost, quantized, attended])
Op = Callable[[Tensor, str | None], Tensor]


def gradient(op: Op, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    (found,) = torch.autograd.grad(op(z, "reference"), z)
    return found


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_one_by_one_and_of_many(op: Op, dtype: torch.dtype) -> None:
    z = torch.randn(3, 64, dtype=dtype)
    want = torch.stack([gradient(op, row) for row in z])
    torch.testing.assert_close(grad(lambda row: op(row, None))(z[0]), want[0])
    torch.testing.assert_close(vmap(grad(lambda row: op(row, None)))(z), want)


@OPS
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own rules
def test_no_tangent_is_lost(op: Op) -> None:
    z, tangent = torch.randn(2, 64)
    want = gradient(op, z) @ tangent
    found = jvp(lambda row: op(row, None), (z,), (tangent,))[1]
    torch.testing.assert_close(found, want, check_dtype=False)  # torch's of 0.25 * scalar: float64
    with forward_ad.dual_level():
        out = op(forward_ad.make_dual(z, tangent), None)
        found = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, want, check_dtype=False)


def test_a_kernel_that_is_asked_for_says_why_not() -> None:
    pytest.importorskip("msvq_fast.ops.gaussian_blur.native", exc_type=ImportError)
    with pytest.raises(InputError, match=r"torch\.func"):
        grad(lambda z: blurred(z, "native"))(torch.randn(64))
