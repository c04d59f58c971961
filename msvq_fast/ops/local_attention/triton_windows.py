"""The geometry of the windows and the weights of a tile, shared by the Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def window(position, size, cells, KERNEL: tl.constexpr, SHIFT: tl.constexpr):
    """Along one axis, the centre cell of queries and the first and last cell that they see."""
    centre = ((2 * position + 1) * cells) // (2 * size)
    if SHIFT:
        length = tl.minimum(KERNEL, cells)
        low = tl.maximum(tl.minimum(centre - KERNEL // 2, cells - length), 0)
        high = low + length - 1
    else:
        low = tl.maximum(centre - KERNEL // 2, 0)
        high = tl.minimum(centre + KERNEL // 2, cells - 1)
    return centre, low, high


@triton.jit
def first_query(cell, size, cells):
    """The first query along an axis whose centre cell is at least ``cell``."""
    above = 2 * cell * size - cells
    return tl.maximum((above + 2 * cells - 1) // (2 * cells), 0)


@triton.jit
def inverse_window(first, last, size, cells, KERNEL: tl.constexpr, SHIFT: tl.constexpr):
    """The first and last query along an axis that see any of the cells ``first..last``."""
    low = first - KERNEL // 2
    high = last + KERNEL // 2
    if SHIFT:
        length = tl.minimum(KERNEL, cells)
        low = tl.where(first < length, 0, low)
        high = tl.where(last >= cells - length, cells - 1, high)
    low = tl.maximum(low, 0)
    high = tl.minimum(high, cells - 1)
    return first_query(low, size, cells), tl.minimum(first_query(high + 1, size, cells), size) - 1


@triton.jit
def scores(
    dots,
    scale_log2,
    bias,
    head,
    q_y,
    q_x,
    k_y,
    k_x,
    height,
    width,
    h,
    w,
    KERNEL: tl.constexpr,
    BIAS: tl.constexpr,
    OWN: tl.constexpr,
    RASTER: tl.constexpr,
    SELF: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Scores in base 2 from the dot products of queries and keys; ``-inf`` where unseen.

    The positions broadcast to the shape of ``dots``; a key in row -1 does not exist.
    """
    c_y, y0, y1 = window(q_y, height, h, KERNEL, SHIFT)
    c_x, x0, x1 = window(q_x, width, w, KERNEL, SHIFT)
    seen = (k_y >= y0) & (k_y <= y1) & (k_x >= x0) & (k_x <= x1)
    if OWN:
        order = (k_y - q_y) * w + (k_x - q_x)
        if RASTER:
            seen = seen & (order <= 0)
        if not SELF:
            seen = seen & (order != 0)
    result = dots * scale_log2
    if BIAS:
        SIZE: tl.constexpr = 2 * KERNEL - 1 if SHIFT else KERNEL
        offset = (k_y - c_y + SIZE // 2) * SIZE + (k_x - c_x + SIZE // 2)
        table = bias + head * SIZE * SIZE
        result += tl.load(table + offset, mask=seen, other=0.0).to(tl.float32) * LOG2E
    return tl.where(seen, result, float("-inf"))


@triton.jit
def load_tokens(base, index, there, stride, D: tl.constexpr, DP: tl.constexpr):
    """The tokens ``index`` as ``(tokens, DP)``; zeros for those not ``there`` and past ``D``."""
    channel = tl.arange(0, DP)
    mask = there[:, None]
    if D != DP:
        mask = mask & (channel < D)[None, :]
    return tl.load(
        base + index.to(tl.int64)[:, None] * stride + channel[None, :], mask=mask, other=0.0
    )


@triton.jit
def store_tokens(base, index, there, stride, x, D: tl.constexpr, DP: tl.constexpr):
    """The reverse of `load_tokens`, rounded to the type of ``base``."""
    channel = tl.arange(0, DP)
    mask = there[:, None]
    if D != DP:
        mask = mask & (channel < D)[None, :]
    tl.store(
        base + index.to(tl.int64)[:, None] * stride + channel[None, :],
        x.to(base.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def tile_positions(tile, tiles_x, height, width, T: tl.constexpr):
    """Row, column and existence of the ``T * T`` tokens of a tile; its first row and column."""
    m = tl.arange(0, T * T)
    top = tile // tiles_x * T
    left = tile % tiles_x * T
    y = top + m // T
    x = left + m % T
    return y, x, (y < height) & (x < width), top, left
