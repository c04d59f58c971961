"""The codebook as the Triton filter reads it: centred, scaled, in half precision; two launches."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["measure_codes", "pack_codes"]


@triton.jit
def load_codes(codebook_ptr, first, num_codes, width, BK: tl.constexpr, BD: tl.constexpr):
    """Codes ``first ...``, the same in float64, 0 for one not finite, and which are there."""
    slots = first + tl.arange(0, BK)
    d = tl.arange(0, BD)
    mask = (slots < num_codes)[:, None] & (d < width)[None, :]
    codes = tl.load(
        codebook_ptr + slots.to(tl.int64)[:, None] * width + d[None, :], mask=mask, other=0.0
    )  # (BK, BD)
    finite = tl.sum(tl.where(tl.abs(codes) <= 3.4028234e38, 0, 1), 1) == 0
    there = (slots < num_codes) & finite
    return codes, tl.where(finite[:, None], codes, 0.0).to(tl.float64), there


@triton.jit(do_not_specialize=["num_codes"])
def measure_codes(
    codebook_ptr,
    part_ptr,  # (tiles, 3, BD) float64: sum, lowest and highest value of every d
    finite_ptr,  # (tiles,) how many codes are finite
    norm_ptr,
    counter_ptr,  # (2,); all set to 0 for what comes after
    num_codes,
    width,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """What the mean and the scale of the codebook need, of one tile of ``BN`` codes."""
    tile = tl.program_id(0)
    d = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float64)
    low = tl.full((BD,), float("inf"), tl.float64)
    high = tl.full((BD,), float("-inf"), tl.float64)
    number = 0
    for first in range(0, BN, BK):
        _, codes, there = load_codes(codebook_ptr, tile * BN + first, num_codes, width, BK, BD)
        total += tl.sum(codes, 0)
        low = tl.minimum(low, tl.min(tl.where(there[:, None], codes, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(there[:, None], codes, float("-inf")), 0))
        number += tl.sum(there.to(tl.int32), 0)
    at = part_ptr + tile.to(tl.int64) * 3 * BD + d
    tl.store(at, total)
    tl.store(at + BD, low)
    tl.store(at + 2 * BD, high)
    tl.store(finite_ptr + tile, number)
    if tile == 0:
        tl.store(counter_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int32))
        tl.store(norm_ptr + tl.arange(0, 4), tl.zeros((4,), tl.float32))


@triton.jit(do_not_specialize=["num_codes", "tiles"])
def pack_codes(
    codebook_ptr,
    part_ptr,
    finite_ptr,
    shift_ptr,  # (BD,) the mean, scaled
    scale_ptr,  # (1,) a power of two
    half_ptr,  # (tiles * BN, BD) float16
    seed_ptr,  # (tiles * BN,) half the squared norms, 1e30 where there is no finite code
    turned_ptr,  # (D, tiles * BN) the codes as they are
    norm_ptr,  # (4,) largest norm, rounded norm and rounding error
    num_codes,
    width,
    tiles,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Centre, scale and round one tile; mean and scale are worked out by every program alike."""
    tile = tl.program_id(0)
    d = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float64)
    low = tl.full((BD,), float("inf"), tl.float64)
    high = tl.full((BD,), float("-inf"), tl.float64)
    number = 0
    for first in range(0, tiles, BK):
        others = first + tl.arange(0, BK)
        there = others < tiles
        mask = there[:, None] & (d < BD)[None, :]
        at = part_ptr + others.to(tl.int64)[:, None] * 3 * BD + d[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        low = tl.minimum(low, tl.min(tl.load(at + BD, mask=mask, other=float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(at + 2 * BD, mask=mask, other=float("-inf")), 0))
        number += tl.sum(tl.load(finite_ptr + others, mask=there, other=0), 0)
    mean = (total / tl.maximum(number, 1).to(tl.float64)).to(tl.float32)
    centre = mean.to(tl.float64)
    far = tl.maximum(high - centre, centre - low)
    largest = tl.max(tl.where((d < width) & (number > 0), far, 0.0), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    largest = tl.minimum(tl.maximum(largest, 1.1754943508222875e-38), 8.507059173023462e37)
    # The power of two at or below the largest value: its exponent bits alone.
    exponent = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    scale = 1.0 / exponent.to(tl.float64, bitcast=True)
    if tile == 0:
        tl.store(shift_ptr + d, (centre * scale).to(tl.float32))
        tl.store(scale_ptr, scale.to(tl.float32))

    norm = tl.zeros((BK,), tl.float64)
    half_norm = tl.zeros((BK,), tl.float64)
    error = tl.zeros((BK,), tl.float64)
    for first in range(0, BN, BK):
        slots = tile * BN + first + tl.arange(0, BK)
        given, codes, there = load_codes(codebook_ptr, tile * BN + first, num_codes, width, BK, BD)
        at = turned_ptr + d.to(tl.int64)[None, :] * (tiles * BN) + slots[:, None]
        tl.store(at, given, mask=(d < width)[None, :])
        codes = (
            tl.where(there[:, None] & (d < width)[None, :], codes - centre[None, :], 0.0) * scale
        )
        half = codes.to(tl.float32).to(tl.float16)
        rounded = half.to(tl.float32).to(tl.float64)
        square = tl.sum(codes * codes, 1)
        norm = tl.maximum(norm, square)
        half_norm = tl.maximum(half_norm, tl.sum(rounded * rounded, 1))
        error = tl.maximum(error, tl.sum((codes - rounded) * (codes - rounded), 1))
        tl.store(half_ptr + slots.to(tl.int64)[:, None] * BD + d[None, :], half)
        tl.store(seed_ptr + slots, tl.where(there, 0.5 * square, 1e30).to(tl.float32))
    # The largest of all tiles; of numbers >= 0 in any order.
    tl.atomic_max(norm_ptr, (tl.sqrt(tl.max(norm, 0)) * (1 + 1e-6) + 1e-30).to(tl.float32))
    tl.atomic_max(norm_ptr + 1, (tl.sqrt(tl.max(half_norm, 0)) * (1 + 1e-6) + 1e-30).to(tl.float32))
    tl.atomic_max(norm_ptr + 2, (tl.sqrt(tl.max(error, 0)) * (1 + 1e-6) + 1e-30).to(tl.float32))
