"""What the Triton kernels are given: where rows lie; the launches of a search and of its sums."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from msvq_fast.ops.vector_quantize import triton_codes, triton_outputs, triton_search
from msvq_fast.ops.vector_quantize.layout import row_strides
from msvq_fast.ops.vector_quantize.triton_shapes import (
    CODES,
    STEPS,
    added_parts,
    block_codes,
    block_width,
    filter_rows,
    filter_stages,
    filter_warps,
    gathered_rows,
    piece_bits,
)

__all__ = [
    "MOST_WIDTH",
    "Strides",
    "code_statistics",
    "key_dtype",
    "placed",
    "search",
    "uniform",
]

MOST_WIDTH = 256
_MOST_KEYS = 2**15 - 1  # of 16 bits, which take half as long to sort as those of 32
Strides = tuple[int, int, int]


def _programs(tensor: Tensor) -> int:
    """Programs of the float64 kernel: a number that does not depend on how many rows it gets."""
    if tensor.device.type != "cuda":
        return 1
    return 8 * torch.cuda.get_device_properties(tensor.device).multi_processor_count


def search(
    z: Tensor,
    inner: int,
    strides: Strides,
    codebook: Tensor,
    codes: Tensor,
    keys: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Fill ``codes``: the filter, then float64 for the rows that it lists.

    ``keys`` become the codes too, K for a row that is not finite; ``copy`` the rows of ``z``.
    """
    num_codes, width = codebook.shape
    count = codes.numel()
    padded = block_width(width)
    rows = filter_rows(padded)
    tiles = triton.cdiv(num_codes, CODES)
    sizes = {"BN": CODES, "BK": block_codes(padded), "BD": padded}
    other = codes.new_empty(count, dtype=torch.int32)
    pending = torch.empty_like(other)
    counters, finite = other.new_empty(2), other.new_empty(tiles)
    totals = codebook.new_empty(tiles, 3, padded, dtype=torch.float64)
    shift, scale, norms = (codebook.new_empty(size) for size in (padded, 1, 4))
    half = codebook.new_empty(tiles * CODES, padded, dtype=torch.float16)
    seeds = codebook.new_empty(tiles * CODES)
    turned = codebook.new_empty(width, tiles * CODES)
    triton_codes.measure_codes[(tiles,)](
        codebook, totals, finite, norms, counters, num_codes, width, **sizes, num_warps=8
    )
    triton_codes.pack_codes[(tiles,)](
        codebook,
        totals,
        finite,
        shift,
        scale,
        half,
        seeds,
        turned,
        norms,
        num_codes,
        width,
        tiles,
        **sizes,
        num_warps=8,
    )
    triton_search.filter_codes[(triton.cdiv(count, rows),)](
        z,
        shift,
        half,
        seeds,
        scale,
        norms,
        codes,
        other if keys is None else keys,
        z if copy is None else copy,
        other,
        pending,
        counters,
        count,
        inner,
        *strides,
        width,
        tiles,
        triton.next_power_of_2(4 * tiles) - 1,
        UNIFORM=uniform(rows, count, inner, strides),
        KEYS=keys is not None,
        COPY=copy is not None,
        BM=rows,
        BN=CODES,
        BD=padded,
        num_warps=filter_warps(padded),
        num_stages=filter_stages(padded),
    )
    triton_search.resolve_codes[(_programs(z),)](
        z,
        codebook,
        turned,
        codes,
        other if keys is None else keys,
        other,
        pending,
        counters,
        count,
        inner,
        *strides,
        width,
        num_codes,
        tiles * CODES,
        KEYS=keys is not None,
        **STEPS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def key_dtype(num_codes: int) -> torch.dtype:
    """Of the keys that codes, and K for a row that is not finite, are sorted by."""
    return torch.int16 if num_codes < _MOST_KEYS else torch.int32


def code_statistics(
    z: Tensor,
    inner: int,
    strides: Strides,
    codebook: Tensor,
    keys: Tensor,
    z_q: Tensor | None,
    z_q_strides: Strides,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the rows of every code in their order; fill ``z_q`` too if there is one.

    Returns:
        Parts of the sum of (z - e)², ``counts (K,)`` and ``sums (K, D)``.
    """
    num_codes, width = codebook.shape
    count = keys.numel()
    padded = block_width(width)
    # A stable sort puts a code's rows next to each other in their own order: no atomics.
    keys, order = torch.sort(keys, stable=True)
    limits = torch.arange(num_codes + 2, dtype=keys.dtype, device=z.device)
    bounds = torch.searchsorted(keys, limits)  # (K + 2,)
    bits = piece_bits(count)
    slots = triton.cdiv(count, 1 << bits) + num_codes + 1
    parts, errors = codebook.new_empty(slots, width), codebook.new_empty(slots)
    counts, sums = order.new_empty(num_codes), torch.empty_like(codebook)
    triton_outputs.code_sums[(slots,)](
        z,
        codebook,
        order,
        bounds,
        z if z_q is None else z_q,
        parts,
        errors,
        inner,
        *strides,
        *z_q_strides,
        width,
        num_codes,
        bits,
        FLAT=inner >= count,
        WRITE=z_q is not None,
        BM=gathered_rows(padded),
        BD=padded,
    )
    triton_outputs.add_parts[(num_codes,)](
        parts, bounds, counts, sums, width, bits, BM=added_parts(padded), BD=padded
    )
    return errors, counts, sums


def uniform(rows: int, count: int, inner: int, *strides: Strides) -> bool:
    """Whether blocks of ``rows`` share their outer index and reach no further than 32 bits."""
    near = all(rows * s[1] + MOST_WIDTH * s[2] < 2**31 for s in strides)
    return near and (inner >= count or inner % rows == 0)


def placed(dim: int, *tensors: Tensor) -> tuple[int, list[Strides]]:
    """Rows that share an outer index, and per tensor the strides ``(outer, inner, d)``."""
    found = row_strides(dim, *tensors)
    assert found is not None
    return found[0][1], found[1]
