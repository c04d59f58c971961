"""The search in CUDA C++ for Hopper GPUs (csrc/vector_quantize/quantize_hopper*) on CUDA tensors.

It writes codes, z_q and loss; counts and sums are Triton's, from the keys that it leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast import _C
from msvq_fast.ops.vector_quantize.layout import (
    LATENT_TYPES,
    codes_like,
    outputs_like,
    row_strides,
)
from msvq_fast.ops.vector_quantize.triton_calls import code_statistics

__all__ = ["MOST_CODES", "WIDTH", "nearest_code", "unsupported", "vector_quantize"]

WIDTH = 64
MOST_CODES = 1024  # in half precision they stay in a multiprocessor's shared memory
_TILE = 64  # rows


def unsupported(z: Tensor, codebook: Tensor) -> str | None:
    """Why this call cannot run here, or None."""
    if z.dtype not in LATENT_TYPES:
        return f"the CUDA kernel takes float32, float16 or bfloat16, z is {z.dtype}"
    if codebook.dtype != torch.float32:
        return f"the CUDA kernel takes a float32 codebook, it is {codebook.dtype}"
    if codebook.shape[1] != WIDTH:
        return f"the CUDA kernel takes D = {WIDTH}, it is {codebook.shape[1]}"
    if codebook.shape[0] > MOST_CODES:
        return f"the CUDA kernel takes up to {MOST_CODES} codes, there are {codebook.shape[0]}"
    if z.numel() // WIDTH >= 2**30:
        return f"the CUDA kernel takes fewer than 2**30 latents, z is {tuple(z.shape)}"
    if not hasattr(_C, "vector_quantize_hopper"):
        return (
            "msvq_fast._C has no kernel for Hopper (nvcc 12.0 builds it for CUDA architecture 90)"
        )
    if torch.cuda.get_device_capability(z.device) != (9, 0):
        return f"the CUDA kernel runs on compute capability 9.0, z is on {z.device}"
    return None


def rows_of(z: Tensor, dim: int) -> Tensor | None:
    """``z`` as ``(N, 64)`` rows that the kernel can read where they are, or None."""
    placed = row_strides(dim, z)
    if placed is None:
        return None
    (outer, inner), ((_, stride, d_stride),) = placed
    whole = outer == 1 and d_stride == 1 and WIDTH <= stride < 2**24
    if not whole or (stride * z.element_size()) % 16 or z.data_ptr() % 16:
        return None
    return z.as_strided((inner, WIDTH), (stride, 1))


def _copied(z: Tensor) -> Tensor:
    """As rows of their own; what is contiguous already may lie off a boundary of 16 bytes."""
    return z.clone(memory_format=torch.contiguous_format).view(-1, WIDTH)


def search_codes(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Code of every latent, as the reference defines it."""
    codes = codes_like(z, codebook, dim)
    if codes.numel() == 0:
        return codes
    rows = rows_of(z, dim)
    if rows is None:
        rows = _copied(z.movedim(dim, -1))
    _search(rows, codebook.contiguous(), codes)
    return codes


nearest_code = torch.library.custom_op(
    "msvq_fast::nearest_code_hopper", search_codes, mutates_args=(), device_types="cuda"
)
nearest_code.register_fake(codes_like)


def quantize(
    z: Tensor, codebook: Tensor, dim: int, commitment_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(z_q, codes, commitment_loss, code_counts, code_sums)``, without a host synchronisation."""
    codebook = codebook.contiguous()
    codes = codes_like(z, codebook, dim)
    z_q = torch.empty_like(z)
    if codes.numel() == 0:
        counts = codes.new_zeros(codebook.shape[0])
        return z_q, codes, codebook.new_zeros(()), counts, torch.zeros_like(codebook)
    rows, out = rows_of(z, dim), rows_of(z_q, dim)
    moved = z.movedim(dim, -1)
    in_place = rows is not None and out is not None
    if rows is None or out is None:
        rows = _copied(moved)
        out = torch.empty_like(rows)
    keys = codes.new_empty(codes.numel(), dtype=torch.int16)
    errors = _search(rows, codebook, codes, keys, out)
    strides = (0, rows.stride(0), 1)
    with torch.cuda.device_of(z):
        _, counts, sums = code_statistics(
            rows, codes.numel(), strides, codebook, keys, None, strides
        )
    if not in_place:
        z_q.copy_(out.view(moved.shape).movedim(-1, dim))
    loss = errors.sum() * (commitment_weight / z.numel())
    return z_q, codes, loss.float(), counts, sums


vector_quantize = torch.library.custom_op(
    "msvq_fast::vector_quantize_hopper", quantize, mutates_args=(), device_types="cuda"
)
vector_quantize.register_fake(outputs_like)


def _search(
    rows: Tensor,
    codebook: Tensor,
    codes: Tensor,
    keys: Tensor | None = None,
    z_q: Tensor | None = None,
) -> Tensor:
    """Fill ``codes`` and what else is given; returns parts of the sum of (z - e)² if ``z_q`` is."""
    count = rows.shape[0]
    device = rows.device.index
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = min(processors, -(-count // _TILE))
    errors = torch.empty(blocks, dtype=torch.float64, device=rows.device)
    if codebook.data_ptr() % 16:
        codebook = codebook.clone()
    with torch.cuda.device_of(rows):
        _C.vector_quantize_hopper(
            rows.data_ptr(),
            LATENT_TYPES[rows.dtype],
            (count, codebook.shape[0]),
            (rows.stride(0), 0 if z_q is None else z_q.stride(0)),
            codebook.data_ptr(),
            codes.data_ptr(),
            0 if keys is None else keys.data_ptr(),
            0 if z_q is None else z_q.data_ptr(),
            errors.data_ptr(),
            blocks,
            device,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return errors
