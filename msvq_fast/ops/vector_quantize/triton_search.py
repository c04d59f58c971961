"""The nearest code on a GPU: a half-precision filter with a certified bound, then float64."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["filter_codes", "resolve_codes"]


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Element offset of the first value of every row, in 64 bits."""
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner


@triton.jit
def largest_of(values_ptr, count, BLOCK: tl.constexpr):
    """The largest of ``count`` values >= 0."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(values_ptr + at, mask=at < count, other=0.0))
    return tl.max(largest, 0)


# Neither N nor K may choose the code that is compiled.
@triton.jit(do_not_specialize=["count", "tiles", "id_mask"])
def filter_codes(
    z_ptr,
    mean_ptr,  # (BD,)
    half_ptr,  # (tiles * BN, BD) float16 codes, centred and scaled
    seed_ptr,  # (tiles * BN,) half their squared norms
    scale_ptr,  # (1,)
    norm_ptr,  # (3, tiles) largest norm, rounded norm and rounding error of every tile
    codes_ptr,
    other_ptr,
    pending_ptr,
    counter_ptr,
    count,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    width,
    tiles,
    id_mask,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Code of every row that the filter can certify; the others go on one of two lists.

    A score is ``|c|²/2 - x.c`` with the tile's number in its lowest bits. Rows with two codes
    within the bound are listed from the front of ``pending``, with more from its back.
    """
    # First, while no row is in registers.
    code_norm = largest_of(norm_ptr, tiles, BN)
    half_norm = largest_of(norm_ptr + tiles, tiles, BN)
    code_error = largest_of(norm_ptr + 2 * tiles, tiles, BN)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    lanes = tl.arange(0, BN)
    inside = rows < count
    offsets = row_offsets(rows, inner, stride_outer, stride_inner)
    z = tl.load(
        z_ptr + offsets[:, None] + d.to(tl.int64)[None, :] * stride_d,
        mask=inside[:, None] & (d < width)[None, :],
        other=0.0,
    ).to(tl.float32)  # (BM, BD)
    finite = tl.sum(tl.where(tl.abs(z) <= 3.4028234e38, 0, 1), 1) == 0
    scale = tl.load(scale_ptr)
    x = (z - tl.load(mean_ptr + d)[None, :]) * scale
    x = tl.where((d < width)[None, :], x, 0.0)
    largest = tl.max(tl.abs(x), 1)
    usable = finite & (largest < 1e15)
    x = tl.where(usable[:, None], x, 0.0)
    largest = tl.where(usable & (largest > 1e-30), largest, 1.0)
    # The power of two at or below the largest value, from its exponent bits.
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    y = x / unit[:, None]  # exact but for underflow
    half = y.to(tl.float16)
    error = y - half.to(tl.float32)
    row_norm = tl.sqrt(tl.sum(y * y, 1)) * 1.001 + 1e-15
    row_error = tl.sqrt(tl.sum(error * error, 1)) * 1.001 + 1e-15

    best = tl.full((BM, BN), 3e38, tl.float32)
    second = tl.full((BM, BN), 3e38, tl.float32)
    for tile in range(tiles):
        slots = tile * BN + lanes
        codes = tl.load(half_ptr + slots[None, :] * BD + d[:, None])  # (BD, BN)
        seeds = tl.load(seed_ptr + slots)
        score = seeds[None, :] - unit[:, None] * tl.dot(half, codes)
        bits = (score.to(tl.int32, bitcast=True) & ~id_mask) | tile
        score = bits.to(tl.float32, bitcast=True)
        second = tl.minimum(second, tl.maximum(best, score))
        best = tl.minimum(best, score)

    # What separates a score from its exact value, see ARCHITECTURE.md.
    both = row_norm * unit + code_norm
    dot_error = row_error * code_norm + (row_norm + row_error) * code_error
    dot_error += (width + 32) * 1.2e-7 * (row_norm + row_error) * half_norm
    rounding = (2.0 * id_mask + 8.0) * 1.2e-7
    margin = 2.02 * (dot_error * unit + rounding * code_norm * both)
    margin += (width + 8) * 2.3e-16 * both * both + 1e-30
    lowest = tl.min(best, 1)
    limit = lowest + margin
    near = best <= limit[:, None]
    number = tl.sum(near.to(tl.int32), 1)
    more = tl.sum((second <= limit[:, None]).to(tl.int32), 1)
    code = (best.to(tl.int32, bitcast=True) & id_mask) * BN + lanes[None, :]
    low = tl.min(tl.where(near, code, 0x7FFFFFFF), 1)
    high = tl.max(tl.where(near, code, -1), 1)
    certified = usable & (limit < 1e29) & (more == 0)
    pair = inside & certified & (number == 2)
    many = inside & finite & ~(certified & ((number == 1) | (number == 2)))
    tl.store(codes_ptr + rows, tl.where(finite & ~many, low, 0).to(tl.int64), mask=inside)
    tl.store(other_ptr + rows, high, mask=pair)
    ones = pair.to(tl.int32)
    first = tl.atomic_add(counter_ptr, tl.sum(ones, 0))
    place = first.to(tl.int64) + tl.cumsum(ones, 0) - 1
    tl.store(pending_ptr + place, rows.to(tl.int32), mask=pair)
    ones = many.to(tl.int32)
    first = tl.atomic_add(counter_ptr + 1, tl.sum(ones, 0))
    place = count - first.to(tl.int64) - tl.cumsum(ones, 0)
    tl.store(pending_ptr + place, rows.to(tl.int32), mask=many)


@triton.jit(do_not_specialize=["count", "num_codes"])
def resolve_codes(
    z_ptr,
    codebook_ptr,
    codes_ptr,
    other_ptr,
    pending_ptr,
    counter_ptr,
    count,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    width,
    num_codes,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Measure the listed rows as the definition does: float64, in the order of d, no contraction.

    Compiled with ``enable_fp_fusion=False``: the product is rounded before it is added.
    """
    pairs = tl.load(counter_ptr)
    start = tl.program_id(0) * BP
    while start < pairs:
        entry = start + tl.arange(0, BP)
        mask = entry < pairs
        rows = tl.load(pending_ptr + entry, mask=mask, other=0).to(tl.int64)
        low = tl.load(codes_ptr + rows, mask=mask, other=0)
        high = tl.load(other_ptr + rows, mask=mask, other=0).to(tl.int64)
        at = z_ptr + row_offsets(rows, inner, stride_outer, stride_inner)
        low_distance = tl.zeros((BP,), tl.float64)
        high_distance = tl.zeros((BP,), tl.float64)
        for i in range(width):
            z = tl.load(at + tl.cast(i, tl.int64) * stride_d, mask=mask, other=0.0)
            z = z.to(tl.float32).to(tl.float64)
            e = tl.load(codebook_ptr + low * width + i, mask=mask, other=0.0).to(tl.float64)
            low_distance += (z - e) * (z - e)
            e = tl.load(codebook_ptr + high * width + i, mask=mask, other=0.0).to(tl.float64)
            high_distance += (z - e) * (z - e)
        tl.store(codes_ptr + rows, tl.where(high_distance < low_distance, high, low), mask=mask)
        start += tl.num_programs(0) * BP

    many = tl.load(counter_ptr + 1)
    start = tl.program_id(0) * BM
    while start < many:
        entry = start + tl.arange(0, BM)
        mask = entry < many
        rows = tl.load(pending_ptr + (count - 1 - entry), mask=mask, other=0).to(tl.int64)
        at = z_ptr + row_offsets(rows, inner, stride_outer, stride_inner)
        best = tl.full((BM,), float("inf"), tl.float64)
        best_code = tl.zeros((BM,), tl.int32)
        for first in range(0, num_codes, BK):
            codes = first + tl.arange(0, BK)
            there = codes < num_codes
            distance = tl.zeros((BM, BK), tl.float64)
            for i in range(width):
                z = tl.load(at + tl.cast(i, tl.int64) * stride_d, mask=mask, other=0.0)
                z = z.to(tl.float32).to(tl.float64)
                e = tl.load(codebook_ptr + codes.to(tl.int64) * width + i, mask=there, other=0.0)
                difference = z[:, None] - e.to(tl.float64)[None, :]
                distance += difference * difference
            # A code with NaN is as far as one with Inf.
            valid = there[None, :] & (distance == distance)
            distance = tl.where(valid, distance, float("inf"))
            lowest = tl.min(distance, 1)
            here = tl.where(distance == lowest[:, None], codes[None, :], 0x7FFFFFFF)
            better = lowest < best
            best_code = tl.where(better, tl.min(here, 1), best_code)
            best = tl.where(better, lowest, best)
        tl.store(codes_ptr + rows, best_code.to(tl.int64), mask=mask)
        start += tl.num_programs(0) * BM
