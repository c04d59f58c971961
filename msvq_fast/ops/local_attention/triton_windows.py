"""The geometry of the windows and the weights of a tile, shared by the Triton kernels.

Window sizes, borders and orders are numbers at run time: one compiled kernel serves them all. What
a pair of a query and a key needs is worked out per query and per key, outside the loop over pairs;
`inside` is all that is left in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Everything else that is not a constant is a number.
POINTER = re.compile(r"q|out|key|value|bias|grad_\w+|[kvb]\d|lse|before|delta|parts|positions")


def kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel that is not compiled again for numbers that are 1 or divide by 16."""
    names = inspect.signature(function).parameters
    numbers = [name for name in names if name.islower() and not POINTER.fullmatch(name)]
    return triton.jit(do_not_specialize=numbers)(function)


LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**31 - 1)  # at or past every packed position
NOWHERE = tl.constexpr(-(2**31))


@triton.jit
def reciprocal(divisor):
    """What `divide` multiplies with in place of a division."""
    return tl.full([], 0xFFFFFFFF, tl.uint32) // divisor.to(tl.uint32)


@triton.jit
def divide(x, divisor, inverse):
    """Quotient and rest of ``0 <= x < 2**31``, exact: the product is at most one too small."""
    quotient = tl.umulhi(x.to(tl.uint32), inverse).to(tl.int32)
    rest = x - quotient * divisor
    short = rest >= divisor
    return tl.where(short, quotient + 1, quotient), tl.where(short, rest - divisor, rest)


@triton.jit
def cells(first, odd, across, inverse, pitch, lane):
    """The cells ``lane < 64`` places past ``first`` in a rectangle, numbered by rows of ``pitch``.

    ``odd`` is twice the column of ``first`` and one, of ``across``, and ``inverse`` the
    `reciprocal` of that: its half is the one of ``2 * across``. An odd number is never a multiple
    of an even one, so that this product needs no correction.
    """
    rows = tl.umulhi((odd + 2 * lane).to(tl.uint32), inverse >> 1).to(tl.int32)
    return rows * (pitch - across) + (first + lane)


@triton.jit
def advance(odd, cell, spot, rows, columns, across, pitch, BLOCK: tl.constexpr):
    """What `cells` takes of the cell BLOCK places further, numbered by ``pitch`` and packed.

    BLOCK places are ``rows`` rows and ``columns`` columns.
    """
    odd += 2 * columns
    wrap = odd > 2 * across
    odd -= tl.where(wrap, 2 * across, 0)
    rows += wrap.to(tl.int32)
    cell += BLOCK + rows * (pitch - across)
    spot += BLOCK + rows * (pack(1, 0) - across)
    return odd, cell, spot


@triton.jit
def program_place(heads, tiles, tiles_x, spread, share):
    """Batch and head of this program, and the row and column of its tile.

    Programs go to the ``spread`` multiprocessors in turns. Each gets ``share`` neighbours, whose
    halos overlap in its cache; what the shares leave over comes last.
    """
    program = tl.program_id(0)
    turn, processor = divide(program, spread, reciprocal(spread))
    program = tl.where(turn < share, processor * share + turn, program)
    plane, tile = divide(program, tiles, reciprocal(tiles))
    tile_y, tile_x = divide(tile, tiles_x, reciprocal(tiles_x))
    b, head = divide(plane, heads, reciprocal(heads))
    return b.to(tl.int64), head.to(tl.int64), tile_y, tile_x


@triton.jit
def window_length(radius, cells, shift):
    """Cells along an axis that a window always has: one if it is clipped at the border."""
    return tl.where(shift != 0, tl.minimum(2 * radius + 1, cells), 1)


@triton.jit
def window(position, size, inverse, cells, radius, length):
    """Along one axis, the centre cell of queries and the first and last cell that they see.

    ``inverse`` is the `reciprocal` of ``2 * size``.
    """
    centre, _ = divide((2 * position + 1) * cells, 2 * size, inverse)
    low = tl.maximum(tl.minimum(centre - radius, cells - length), 0)
    high = tl.minimum(tl.maximum(centre + radius, length - 1), cells - 1)
    return centre, low, high


@triton.jit
def first_query(cell, size, inverse, cells):
    """The first query along an axis whose centre cell is at least ``cell``.

    ``inverse`` is the `reciprocal` of ``2 * cells``.
    """
    query, _ = divide(2 * cell * size + cells - 1, 2 * cells, inverse)
    return query


@triton.jit
def inverse_window(first, last, size, inverse, cells, radius, length):
    """The first and last query along an axis that see any of the cells ``first..last``."""
    low = tl.maximum(tl.where(first < length, 0, first - radius), 0)
    high = tl.minimum(tl.where(last >= cells - length, cells - 1, last + radius), cells - 1)
    end = tl.minimum(first_query(high + 1, size, inverse, cells), size)
    return first_query(low, size, inverse, cells), end - 1


@triton.jit
def pack(y, x):
    """A position in one number, in raster order; -1 is none."""
    return y * 65536 + x


@triton.jit
def inside(low, high, start, length, position):
    """Which positions lie in which rectangle and not among ``start .. start + length``.

    All are packed. A coordinate has 15 bits and one to spare, which a difference sets if it is
    negative: two subtractions compare both coordinates with both bounds.
    """
    outside = ((position - low) | (high - position)) & -2147450880  # bits 31 and 15
    return (outside == 0) & ((position - start).to(tl.uint32) > length.to(tl.uint32))


@triton.jit
def load_bias(bias, head, size, query, key, seen):
    """The relative bias of pairs in base 2; ``size`` 0 has none. See `bias_places`."""
    table, offset = bias + head * size * size, key - query
    there = seen & (offset.to(tl.uint32) < (size * size).to(tl.uint32))
    return tl.load(table + offset, mask=there, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def bias_places(y, x, size, middle):
    """What keys at ``(y, x)`` (and, with ``middle``, queries centred there) add to the offset."""
    return (y - middle) * size + x - middle


@triton.jit
def offsets(index, stride):
    """How far tokens of a head are from its first; 32 bits count its vectors of eight channels."""
    return (index * stride).to(tl.uint32).to(tl.int64)[:, None] * 8


@triton.jit
def load_tokens(base, index, there, stride, d, DP: tl.constexpr):
    """The tokens ``index`` as ``(tokens, DP)``; zeros for those not ``there`` and past ``d``."""
    channel = tl.arange(0, DP)
    mask = there[:, None] & (channel < d * 8)[None, :]
    return tl.load((base + channel)[None, :] + offsets(index, stride), mask=mask, other=0.0)


@triton.jit
def gather_tokens(base, index, stride, d, DP: tl.constexpr):
    """The tokens ``index``, all of which exist; past ``d`` they repeat channels of their own.

    What meets those channels is zero or not stored.
    """
    channel = tl.arange(0, DP)
    channel = tl.where(channel < d * 8, channel, channel % 8)
    return tl.load((base + channel)[None, :] + offsets(index, stride))


@triton.jit
def store_tokens(base, index, there, stride, x, d, DP: tl.constexpr):
    """The reverse of `load_tokens`, rounded to the type of ``base``."""
    channel = tl.arange(0, DP)
    mask = there[:, None] & (channel < d * 8)[None, :]
    start = (base + channel)[None, :] + offsets(index, stride)
    tl.store(start, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def products(a, b):
    """The dot products of all tokens of ``a`` and ``b``, both ``(tokens, channels)``.

    In float32 a thread keeps whole tokens; a quarter of 128 channels at a time does not spill.
    """
    if a.dtype == tl.float32 and a.shape[1] == 128:
        a0, a1, a2, a3 = quarters(a)
        b0, b1, b2, b3 = quarters(b)
        result = tl.dot(a0, tl.trans(b0), input_precision="ieee")
        result = tl.dot(a1, tl.trans(b1), result, input_precision="ieee")
        result = tl.dot(a2, tl.trans(b2), result, input_precision="ieee")
        return tl.dot(a3, tl.trans(b3), result, input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def quarters(x):
    """Every fourth channel of ``(tokens, channels)``, four times."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def head_of(base, b, stride_b, head, stride_h):
    """Where the tokens of one head begin."""
    return base + b * stride_b * 8 + head * stride_h * 8


@triton.jit
def tile_positions(top, left, height, width, T: tl.constexpr):
    """Row, column and existence of the ``T * T`` tokens of a tile."""
    m = tl.arange(0, T * T)
    y = top + m // T
    x = left + m % T
    return y, x, (y < height) & (x < width)


@triton.jit
def choose(n, a, b, c, d):
    """The ``n``-th of four."""
    return tl.where(n < 2, tl.where(n == 0, a, b), tl.where(n == 2, c, d))
