"""The rotation trick: another gradient for the latents of a quantizer.

Fifty et al. 2024, Restructuring Vector Quantization with the Rotation Trick.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msvq_fast.ops.checks import accumulation_dtype


class _Rotated(torch.autograd.Function):
    """Forward ``z_q``; backward the transpose of the rotation and scaling that takes z to z_q."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, z_q: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(z, z_q)
        ctx.dim = dim
        return z_q.view_as(z_q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dim = ctx.dim
        z, z_q, g = (t.to(accumulation_dtype(t.dtype)) for t in (*ctx.saved_tensors, grad))
        length, length_q = z.norm(dim=dim, keepdim=True), z_q.norm(dim=dim, keepdim=True)
        unit, unit_q = z / length, z_q / length_q
        r = unit + unit_q
        r = r / r.norm(dim=dim, keepdim=True)
        # R = I - 2 r rᵀ + 2 q̂ ẑᵀ turns ẑ into q̂ in their plane and leaves the rest alone.
        turned = g - 2 * r * _dot(r, g, dim) + 2 * unit * _dot(unit_q, g, dim)
        turned = turned * (length_q / length)
        # A zero or opposite vector defines no rotation.
        defined = turned.isfinite().all(dim=dim, keepdim=True)
        return torch.where(defined, turned, g).to(grad.dtype), None, None


def rotate_to(z: Tensor, z_q: Tensor, *, dim: int) -> Tensor:
    """``z_q``, with the gradient of ``z`` rotated and scaled as z is to reach it.

    The angle between a gradient and its vector survives quantization, where the straight-through
    gradient is copied as it stands.

    Args:
        z: Latents, vectors along ``dim``.
        z_q: Their codes' vectors, of the same shape.
        dim: Of the vectors.

    Gradient:
        To ``z``: ``|z_q| / |z| Rᵀ g`` with R the rotation from z to z_q, constant; the gradient
        itself where a vector is zero or the two are opposite. None to ``z_q``. Once.
    """
    return _Rotated.apply(z, z_q.detach(), dim)


def _dot(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (a * b).sum(dim=dim, keepdim=True)
