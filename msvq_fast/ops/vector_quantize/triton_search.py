"""The nearest code on a GPU: a half-precision filter with a certified bound, then float64."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["filter_codes", "resolve_codes"]


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner, FLAT: tl.constexpr):
    """Element offset of the first value of every row, in 64 bits."""
    if FLAT:
        offsets = rows.to(tl.int64) * stride_inner
    else:
        outer = rows // inner
        offsets = outer.to(tl.int64) * stride_outer
        offsets += (rows - outer * inner).to(tl.int64) * stride_inner
    return offsets


@triton.jit
def block_offsets(
    first,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    UNIFORM: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Where a block of ``BM`` rows begins, and from there the offset of every value, (BM, BD).

    ``UNIFORM``: the rows share their outer index and 32 bits hold the offsets. Triton then sees
    which values are neighbours, and loads them as such.
    """
    rows = tl.arange(0, BM)
    d = tl.arange(0, BD)
    if UNIFORM:
        outer = first // inner
        start = outer.to(tl.int64) * stride_outer
        start += (first - outer * inner).to(tl.int64) * stride_inner
        each = (rows * stride_inner)[:, None] + (d * stride_d)[None, :]
    else:
        start = 0
        at = row_offsets(first + rows, inner, stride_outer, stride_inner, False)
        each = at[:, None] + (d.to(tl.int64) * stride_d)[None, :]
    return start, each


@triton.jit
def keep_two(best, second, score, id_mask, number):
    """The lowest two of each lane, once a score with a number in its lowest bits is among them."""
    bits = (score.to(tl.int32, bitcast=True) & ~id_mask) | number
    score = bits.to(tl.float32, bitcast=True)
    return tl.minimum(best, score), tl.minimum(second, tl.maximum(best, score))


@triton.jit
def quarters(score, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's scores in four parts, by bits 0 and 3 of the column: a thread holds all four."""
    even, odd = tl.split(tl.reshape(score, (BM, BN // 2, 2)))
    a, c = tl.split(tl.permute(tl.reshape(even, (BM, BN // 16, 2, 4)), (0, 1, 3, 2)))
    b, d = tl.split(tl.permute(tl.reshape(odd, (BM, BN // 16, 2, 4)), (0, 1, 3, 2)))
    LANES: tl.constexpr = BN // 4
    a, b = tl.reshape(a, (BM, LANES)), tl.reshape(b, (BM, LANES))
    c, d = tl.reshape(c, (BM, LANES)), tl.reshape(d, (BM, LANES))
    return a, b, c, d


@triton.jit
def codes_of_lanes(best, id_mask, BN: tl.constexpr):
    """Which codes the best scores of the lanes are of: the columns of `quarters`, put back."""
    number = best.to(tl.int32, bitcast=True) & id_mask
    lane = tl.arange(0, BN // 4)
    column = lane // 4 * 16 + lane % 4 * 2
    return (number >> 2) * BN + column[None, :] + (number & 2) * 4 + (number & 1)


# Neither N nor K may choose the code that is compiled.
@triton.jit(do_not_specialize=["count", "tiles", "id_mask"])
def filter_codes(
    z_ptr,
    shift_ptr,  # (BD,) the mean of the codes, scaled
    half_ptr,  # (tiles * BN, BD) float16 codes, centred and scaled
    seed_ptr,  # (tiles * BN,) half their squared norms
    scale_ptr,  # (1,)
    norm_ptr,  # (4,) largest norm, rounded norm and rounding error of the codes
    codes_ptr,
    key_ptr,
    copy_ptr,
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
    UNIFORM: tl.constexpr,
    KEYS: tl.constexpr,
    COPY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Code of every row that the filter can certify; the others go on one of two lists.

    A score is ``|c|²/2 - x.c`` with the number of its tile and quarter in the lowest bits: four
    codes of a tile share a lane. Rows with two codes within the bound are listed from the front
    of ``pending``, with more from its back. ``KEYS`` asks for the codes as keys to sort by too, and
    ``COPY`` for the rows, one after another.
    """
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    inside = rows < count
    d = tl.arange(0, BD)
    mask = inside[:, None] & (d < width)[None, :]
    start, at = block_offsets(first, inner, stride_outer, stride_inner, stride_d, UNIFORM, BM, BD)
    z = tl.load(z_ptr + start + at, mask=mask, other=0.0)
    if COPY:
        start, at = block_offsets(first, count, 0, width, 1, True, BM, BD)
        tl.store(copy_ptr + start + at, z, mask=mask)
    # Exact but for the one rounding of a difference: the scale is a power of two.
    x = tl.fma(z.to(tl.float32), tl.load(scale_ptr), -tl.load(shift_ptr + d)[None, :])  # (BM, BD)
    half = x.to(tl.float16)
    error = x - half.to(tl.float32)
    # What separates a score from its exact value, see ARCHITECTURE.md.
    code_norm = tl.load(norm_ptr)
    half_norm = tl.load(norm_ptr + 1)
    code_error = tl.load(norm_ptr + 2)
    square = tl.sum(x * x, 1)
    row_norm = tl.sqrt(square) * 1.001 + 1e-15
    row_error = tl.sqrt(tl.sum(error * error, 1)) * 1.001 + 1e-15
    both = row_norm + code_norm
    margin = row_error * code_norm + (row_norm + row_error) * code_error
    margin += (width + 32) * 1.2e-7 * (row_norm + row_error) * half_norm
    margin += (2.0 * id_mask + 8.0) * 1.2e-7 * code_norm * both
    margin = 2.02 * margin + (width + 8) * 2.3e-16 * both * both + 1e-30
    margin = tl.where(square < 4e9, margin, 1e30)  # beyond float16, as NaN and Inf are: no bound

    slots = tl.arange(0, BN)
    best = tl.full((BM, BN // 4), 3e38, tl.float32)
    second = tl.full((BM, BN // 4), 3e38, tl.float32)
    for tile in range(tiles):
        codes = tl.load(
            half_ptr + tile * (BN * BD) + (slots[None, :] * BD + d[:, None])
        )  # (BD, BN)
        seeds = tl.load(seed_ptr + tile * BN + slots)
        parts = quarters(seeds[None, :] - tl.dot(half, codes), BM, BN)
        for i in tl.static_range(4):
            best, second = keep_two(best, second, parts[i], id_mask, 4 * tile + i)

    limit = tl.min(best, 1) + margin
    near = best <= limit[:, None]
    number = tl.sum(near.to(tl.int32), 1)
    code = codes_of_lanes(best, id_mask, BN)
    low = tl.min(tl.where(near, code, 0x7FFFFFFF), 1)
    # Slots without a code score 1e30; a row beyond float16 can score -Inf.
    certified = (margin < 1e29) & (limit < 1e29) & (tl.min(second, 1) > limit) & (number <= 2)
    pair = inside & certified & (number == 2)
    many = inside & ~certified
    tl.store(codes_ptr + rows, low.to(tl.int64), mask=inside)
    if KEYS:
        tl.store(key_ptr + rows, low.to(key_ptr.dtype.element_ty), mask=inside)
    listed = pair.to(tl.int32) + (many.to(tl.int32) << 16)
    total = tl.sum(listed, 0)
    if total > 0:
        code = codes_of_lanes(best, id_mask, BN)
        high = tl.max(tl.where(best <= limit[:, None], code, -1), 1)
        tl.store(other_ptr + rows, high, mask=pair)
        place = tl.cumsum(listed, 0) - listed
        front = tl.atomic_add(counter_ptr, total & 0xFFFF) + (place & 0xFFFF)
        tl.store(pending_ptr + front, rows, mask=pair)
        back = tl.atomic_add(counter_ptr + 1, total >> 16) + (place >> 16)
        tl.store(pending_ptr + (count - 1 - back), rows, mask=many)


@triton.jit(do_not_specialize=["count", "num_codes", "slots"])
def resolve_codes(
    z_ptr,
    codebook_ptr,
    turned_ptr,  # (D, slots) the same codes
    codes_ptr,
    key_ptr,
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
    slots,
    KEYS: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Measure the listed rows as the definition does: float64, in the order of d, no contraction.

    Compiled with ``enable_fp_fusion=False``: the product is rounded before it is added. The key of
    a row that is not finite is K.
    """
    pairs = tl.load(counter_ptr)
    start = tl.program_id(0) * BP
    while start < pairs:
        entry = start + tl.arange(0, BP)
        mask = entry < pairs
        rows = tl.load(pending_ptr + entry, mask=mask, other=0)
        low = tl.load(codes_ptr + rows, mask=mask, other=0)
        high = tl.load(other_ptr + rows, mask=mask, other=0).to(tl.int64)
        at = z_ptr + row_offsets(rows, inner, stride_outer, stride_inner, False)
        low_distance = tl.zeros((BP,), tl.float64)
        high_distance = tl.zeros((BP,), tl.float64)
        for i in range(width):
            z = tl.load(at + tl.cast(i, tl.int64) * stride_d, mask=mask, other=0.0)
            z = z.to(tl.float32).to(tl.float64)
            e = tl.load(codebook_ptr + low * width + i, mask=mask, other=0.0).to(tl.float64)
            low_distance += (z - e) * (z - e)
            e = tl.load(codebook_ptr + high * width + i, mask=mask, other=0.0).to(tl.float64)
            high_distance += (z - e) * (z - e)
        code = tl.where(high_distance < low_distance, high, low)
        tl.store(codes_ptr + rows, code, mask=mask)
        if KEYS:
            tl.store(key_ptr + rows, code.to(key_ptr.dtype.element_ty), mask=mask)
        start += tl.num_programs(0) * BP

    many = tl.load(counter_ptr + 1)
    start = tl.program_id(0) * BM
    while start < many:
        entry = start + tl.arange(0, BM)
        mask = entry < many
        rows = tl.load(pending_ptr + (count - 1 - entry), mask=mask, other=0)
        at = z_ptr + row_offsets(rows, inner, stride_outer, stride_inner, False)
        best = tl.full((BM,), float("inf"), tl.float64)
        best_code = tl.zeros((BM,), tl.int32)
        finite = mask
        for first in range(0, num_codes, BK):
            codes = first + tl.arange(0, BK)
            there = codes < num_codes
            distance = tl.zeros((BM, BK), tl.float64)
            for i in range(width):
                z = tl.load(at + tl.cast(i, tl.int64) * stride_d, mask=mask, other=0.0)
                z = z.to(tl.float32).to(tl.float64)
                finite = finite & (tl.abs(z) <= 3.4028234663852886e38)
                at_codes = turned_ptr + tl.cast(i, tl.int64) * slots
                e = tl.load(at_codes + codes, mask=there, other=0.0)
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
        if KEYS:
            key = tl.where(finite, best_code, num_codes)
            tl.store(key_ptr + rows, key.to(key_ptr.dtype.element_ty), mask=mask)
        start += tl.num_programs(0) * BM
