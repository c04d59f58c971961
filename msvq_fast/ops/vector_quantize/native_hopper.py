"""The search in CUDA C++ for Hopper GPUs (csrc/vector_quantize/quantize_hopper*) on CUDA tensors.

One kernel writes codes, z_q and every block's part of loss, counts and sums, another adds the parts
up. The sums of more than 320 codes do not fit beside them: then a third reads the rows once more.
"""

from __future__ import annotations

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

__all__ = ["MOST_CODES", "WIDTH", "nearest_code", "unsupported", "vector_quantize"]

WIDTH = 64
MOST_CODES = 1024  # in half precision they stay in a multiprocessor's shared memory
_MOST_SUMS: int = _C.hopper_most_sums  # and so do their sums
_MOST_COPIED = 2**16  # latents; beyond, Triton's kernel, which reads any strides, is quicker
_TILE = 64  # rows
_PART = 1024  # rows of which sums of their own are worth it, at least
# Asked for once: torch.compile cannot trace the question.
_CAPABILITIES = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def unsupported(z: Tensor, codebook: Tensor, dim: int = -1) -> str | None:
    """Why this call cannot run here, or None."""
    if z.dtype not in LATENT_TYPES:
        return f"the CUDA kernel takes float32, float16 or bfloat16, z is {z.dtype}"
    if codebook.dtype != torch.float32:
        return f"the CUDA kernel takes a float32 codebook, it is {codebook.dtype}"
    if codebook.shape[1] != WIDTH:
        return f"the CUDA kernel takes D = {WIDTH}, it is {codebook.shape[1]}"
    if codebook.shape[0] > MOST_CODES:
        return f"the CUDA kernel takes up to {MOST_CODES} codes, there are {codebook.shape[0]}"
    if z.stride(dim) != 1 and z.numel() // WIDTH > _MOST_COPIED:
        return (
            f"the CUDA kernel takes up to {_MOST_COPIED} latents whose {WIDTH} values are apart in "
            f"memory, z is {tuple(z.shape)} with strides {tuple(z.stride())}"
        )
    if z.numel() // WIDTH >= 2**30:
        return f"the CUDA kernel takes fewer than 2**30 latents, z is {tuple(z.shape)}"
    if not hasattr(_C, "vector_quantize_hopper"):
        return (
            "msvq_fast._C has no kernel for Hopper (nvcc 12.0 builds it for CUDA architecture 90)"
        )
    index = z.device.index or 0
    if index >= len(_CAPABILITIES) or _CAPABILITIES[index] != (9, 0):
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


nearest_code = kernel_op("nearest_code_hopper", "cuda")(search_codes)
torch.library.register_fake(nearest_code, codes_like)


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
    loss, counts, sums = _quantize(rows, codebook, codes, out, commitment_weight / z.numel())
    if not in_place:
        z_q.copy_(out.view(moved.shape).movedim(-1, dim))
    return z_q, codes, loss, counts, sums


vector_quantize = kernel_op("vector_quantize_hopper", "cuda")(quantize)
torch.library.register_fake(vector_quantize, outputs_like)


def _quantize(
    rows: Tensor, codebook: Tensor, codes: Tensor, z_q: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``codes`` and ``z_q``; returns ``factor`` times the sum of (z - e)², counts and sums."""
    count, num_codes = rows.shape[0], codebook.shape[0]
    device = rows.device.index
    kind, stream = LATENT_TYPES[rows.dtype], torch.cuda.current_stream(device).cuda_stream
    parts = blocks = _blocks(count, device)
    keys = None
    if num_codes > _MOST_SUMS:  # two blocks a part
        keys = codes.new_empty(count, dtype=torch.int16)
        parts = min(max(_processors(device) // 2, 1), -(-count // _PART))
    errors = codebook.new_empty(blocks, dtype=torch.float64)
    part_counts = codes.new_empty(parts, num_codes, dtype=torch.int32)
    part_sums = codebook.new_empty(parts, num_codes, WIDTH)
    counts, sums = codes.new_empty(num_codes), torch.empty_like(codebook)
    loss = codebook.new_empty(())
    with_search = (None, None) if keys is not None else (part_counts, part_sums)
    _search(rows, codebook, codes, keys, z_q, (errors, *with_search))
    with torch.cuda.device_of(rows):
        if keys is not None:
            _C.sum_rows_hopper(
                rows.data_ptr(),
                kind,
                (count, num_codes, parts),
                rows.stride(0),
                keys.data_ptr(),
                _addresses(part_counts, part_sums),
                device,
                stream,
            )
        _C.total_hopper(
            _addresses(errors, part_counts, part_sums),
            (blocks, parts, num_codes),
            factor,
            _addresses(loss, counts, sums),
            device,
            stream,
        )
    return loss, counts, sums


def _search(
    rows: Tensor,
    codebook: Tensor,
    codes: Tensor,
    keys: Tensor | None = None,
    z_q: Tensor | None = None,
    parts: tuple[Tensor | None, ...] = (None, None, None),
) -> None:
    """Fill ``codes`` and what else is given: every block's part of loss, counts and sums."""
    device = rows.device.index
    if codebook.data_ptr() % 16:
        codebook = codebook.clone()
    with torch.cuda.device_of(rows):
        _C.vector_quantize_hopper(
            rows.data_ptr(),
            LATENT_TYPES[rows.dtype],
            (rows.shape[0], codebook.shape[0]),
            (rows.stride(0), 0 if z_q is None else z_q.stride(0)),
            codebook.data_ptr(),
            codes.data_ptr(),
            *_addresses(keys, z_q),
            _addresses(*parts),
            _blocks(rows.shape[0], device),
            device,
            torch.cuda.current_stream(device).cuda_stream,
        )


def _blocks(count: int, device: int) -> int:
    """One for every multiprocessor, if there are tiles enough."""
    return min(_processors(device), -(-count // _TILE))


def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
