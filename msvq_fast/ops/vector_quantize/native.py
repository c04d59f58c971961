"""The C++ vector quantization (csrc/vector_quantize); on CUDA tensors the kernel for Hopper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msvq_fast import _C
from msvq_fast.ops.backend import kernel_op
from msvq_fast.ops.vector_quantize.layout import (
    LATENT_TYPES,
    codes_like,
    outputs_like,
    row_strides,
)
from msvq_fast.ops.vector_quantize.reference import ema_update_ as plain_ema_update_

__all__ = [
    "ema_update_",
    "nearest_code",
    "unsupported",
    "vector_quantize",
    "vector_quantize_backward",
]

_MOST_CODES = 2**24  # a score's mantissa holds the number of a vector of four
_PANEL = 32  # the sums' memory first holds the packed codes, a multiple of this many


def unsupported(z: Tensor, codebook: Tensor, dim: int = -1) -> str | None:
    """Why this call cannot run here, or None."""
    if z.device.type == "cuda":
        try:
            from msvq_fast.ops.vector_quantize import native_hopper, triton_kernels  # noqa: F401
        except ImportError as error:
            return f"beside the CUDA kernel it needs Triton: {error}"
        return native_hopper.unsupported(z, codebook, dim)
    if z.device.type != "cpu":
        return f"the C++ kernel runs on CPU and CUDA tensors, z is on {z.device}"
    if z.dtype not in LATENT_TYPES:
        return f"the C++ kernel takes float32, float16 or bfloat16, z is {z.dtype}"
    if codebook.dtype != torch.float32:
        return f"the C++ kernel takes a float32 codebook, it is {codebook.dtype}"
    if codebook.shape[0] > _MOST_CODES:
        return f"the C++ kernel takes up to {_MOST_CODES} codes, there are {codebook.shape[0]}"
    if codebook.shape[1] > 4096:
        return f"the C++ kernel takes D up to 4096, it is {codebook.shape[1]}"
    return None


def nearest_code(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Code of every latent, as the reference defines it."""
    if z.device.type == "cuda":
        from msvq_fast.ops.vector_quantize import native_hopper

        return native_hopper.nearest_code(z, codebook, dim)
    return _nearest_code(z, codebook, dim)


def vector_quantize(
    z: Tensor, codebook: Tensor, dim: int, commitment_weight: float
) -> tuple[Tensor, ...]:
    """``(z_q, codes, commitment_loss, code_counts, code_sums)``, all from one call."""
    if z.device.type == "cuda":
        from msvq_fast.ops.vector_quantize import native_hopper

        return native_hopper.vector_quantize(z, codebook, dim, commitment_weight)
    return _vector_quantize(z, codebook, dim, commitment_weight)


def vector_quantize_backward(
    grad_z_q: Tensor | None,
    grad_loss: Tensor,
    z: Tensor,
    codes: Tensor,
    codebook: Tensor,
    dim: int,
    commitment_weight: float,
) -> Tensor:
    """``grad_z_q + grad_loss 2β/numel(z) (z - e)`` in the layout of ``z``."""
    backward: Any = _backward
    if z.device.type == "cuda":  # bound by memory: Triton's is as fast as any
        from msvq_fast.ops.vector_quantize import triton_kernels

        backward = triton_kernels.vector_quantize_backward
    return backward(grad_z_q, grad_loss, z, codes, codebook, dim, commitment_weight)


def ema_update_(codebook: Tensor, *settings: Any) -> None:
    """As the reference's, in place; on CUDA tensors Triton's, one launch."""
    if codebook.device.type == "cuda":
        from msvq_fast.ops.vector_quantize import triton_kernels

        triton_kernels.ema_update_(codebook, *settings)
    else:  # K x D arithmetic beside the search's N x K x D: torch's loops are enough
        plain_ema_update_(codebook, *settings)


def _strides(dim: int, *tensors: Tensor) -> tuple[list[int], list[tuple[int, int, int]]] | None:
    """As `row_strides`; None also where neither ``d`` nor ``inner`` is dense."""
    if tensors[0].numel() == 0:  # contiguous with any strides, and none is ever followed
        return [0, 0], [(0, 0, 1)] * len(tensors)
    placed = row_strides(dim, *tensors)
    if placed is None:
        return None
    by_row = all(s[2] == 1 for s in placed[1])
    by_column = all(s[1] == 1 and s[2] != 1 for s in placed[1])
    return placed if by_row or by_column else None


def _like(tensor: Tensor, layout: Tensor) -> Tensor:
    """``tensor`` in the memory layout of ``layout``, copied only if it has another."""
    same = tensor.stride() == layout.stride()
    return tensor if same else torch.empty_like(layout).copy_(tensor)


@kernel_op("nearest_code_native", "cpu")
def _nearest_code(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    codes = codes_like(z, codebook, dim)
    codebook = codebook.contiguous()
    placed = _strides(dim, z)
    if placed is None:
        z = z.contiguous()
        placed = _strides(dim, z)
        assert placed is not None
    size, (strides,) = placed
    _C.vector_quantize_cpu(
        z.data_ptr(),
        LATENT_TYPES[z.dtype],
        (*size, codebook.shape[1]),
        strides,
        codebook.data_ptr(),
        codebook.shape[0],
        codes.data_ptr(),
        0,
        (0, 0, 0),
        0,
        0,
        torch.get_num_threads(),
    )
    return codes


torch.library.register_fake(_nearest_code, codes_like)


@kernel_op("vector_quantize_native", "cpu")
def _vector_quantize(
    z: Tensor, codebook: Tensor, dim: int, commitment_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_codes, width = codebook.shape
    codebook = codebook.contiguous()
    codes = codes_like(z, codebook, dim)
    counts = z.new_empty(num_codes, dtype=torch.int64)
    room = z.new_empty(math.ceil(num_codes / _PANEL) * _PANEL * width, dtype=torch.float32)
    sums = room[: num_codes * width].view(num_codes, width)
    z_q = out = torch.empty_like(z)
    placed = _strides(dim, z, out)
    if placed is None:
        z, out = z.contiguous(), torch.empty(z.shape, dtype=z.dtype)
        placed = _strides(dim, z, out)
        assert placed is not None
    size, (z_strides, out_strides) = placed
    squared_error = _C.vector_quantize_cpu(
        z.data_ptr(),
        LATENT_TYPES[z.dtype],
        (*size, width),
        z_strides,
        codebook.data_ptr(),
        num_codes,
        codes.data_ptr(),
        out.data_ptr(),
        out_strides,
        counts.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    if out is not z_q:
        z_q.copy_(out)
    loss = commitment_weight * squared_error / max(z.numel(), 1)
    return z_q, codes, torch.tensor(loss, dtype=torch.float32), counts, sums


torch.library.register_fake(_vector_quantize, outputs_like)


@kernel_op("vector_quantize_backward_native", "cpu")
def _backward(
    grad_z_q: Tensor | None,
    grad_loss: Tensor,
    z: Tensor,
    codes: Tensor,
    codebook: Tensor,
    dim: int,
    commitment_weight: float,
) -> Tensor:
    grad_z = out = torch.empty_like(z)
    if _strides(dim, out) is None:
        out = torch.empty(z.shape, dtype=z.dtype)
    z = _like(z, out)
    grad_z_q = None if grad_z_q is None else _like(grad_z_q, out)
    placed = _strides(dim, out)
    assert placed is not None
    size, (strides,) = placed
    _C.vector_quantize_backward_cpu(
        z.data_ptr(),
        0 if grad_z_q is None else grad_z_q.data_ptr(),
        out.data_ptr(),
        LATENT_TYPES[z.dtype],
        (*size, codebook.shape[1]),
        strides,
        codebook.data_ptr(),
        codes.data_ptr(),
        float(grad_loss) * 2 * commitment_weight / max(z.numel(), 1),
        torch.get_num_threads(),
    )
    return grad_z if out is grad_z else grad_z.copy_(out)


torch.library.register_fake(_backward, lambda grad_z_q, grad_loss, z, *_: torch.empty_like(z))
