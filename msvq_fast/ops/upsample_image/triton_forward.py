"""The image in Triton: every feature is read from memory once, by a walk down its columns.

Output pixels come in pairs that begin at an odd one. Rows 2p - 1 and 2p are of input rows p - 1 and
p alone, columns 2q - 1 and 2q of input columns q - 1 and q: four features for four pixels, where
the usual pairs (2i, 2i + 1) touch nine. A program walks down the rows of a strip, and what row
p - 1 gives to pair p stays in registers meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_kernel(
    x, w, b, out,
    height, width, strips, rows, w_c, w_o, w_y, w_x,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A strip of ``rows`` row pairs and ``BLOCK`` column pairs; ``w_c ... w_x``: weight's strides.

    A line of a tile is the features of input columns q - 1 and q, 2 C numbers that lie together.
    Lines overlap: the second half comes out of the cache.
    """
    blocks = tl.cdiv(width + 1, BLOCK)
    pid = tl.program_id(0)
    q0 = pid % blocks * BLOCK
    p0 = pid // blocks % strips * rows
    image = (pid // blocks // strips).to(tl.int64)
    line = tl.arange(0, BLOCK)
    k = tl.arange(0, 2 * C)
    # Columns of the products: 8 for the first row of the pair p the input row is in as its second,
    # 8 for pair p + 1, where it is the first; then the same for the second rows. Six of 8 are
    # pixels 2q - 1 and 2q as they lie in memory. So both pairs' sums are in the same thread.
    m = tl.arange(0, 32)
    e = m % 8
    ky = m // 16 + m // 8 % 2 * 2
    kx = (e // 3)[None, :] + 2 - (k // C * 2)[:, None]
    at_w = (k % C * w_c)[:, None] + (e % 3 * w_o + ky * w_y)[None, :] + kx * w_x
    taps = tl.load(w + at_w, mask=(e < 6)[None, :], other=0.0).to(x.dtype.element_ty)
    m = tl.arange(0, 16)
    e = m % 8
    added = tl.load(b + e % 3, mask=e < 6, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    j = (q0 + line)[:, None] - 1 + (k // C)[None, :]
    there = (j >= 0) & (j < width)
    at = line[:, None] * C + k[None, :]
    x += ((image * height + p0 - 1) * width + q0 - 1) * C
    f = (6 * (q0 + line) - 3)[:, None] + e[None, :]
    inside = (f >= 0) & (f < 6 * width) & (e < 6)[None, :]
    to = line[:, None] * 6 + (e + m // 8 * (6 * width))[None, :]
    out += (image * 2 * height + 2 * p0 - 1) * (6 * width) + 6 * q0 - 3
    # Conditions on rows as tiles of one element: the interpreter has no scalar booleans.
    tile = tl.load(x + at, mask=there & (tl.full((1, 1), p0, tl.int32) > 0), other=0.0)
    _, carried = _halves(tile, taps, BLOCK)
    for p in range(p0, tl.minimum(p0 + rows, height + 1)):
        x += width * C
        tile = tl.load(x + at, mask=there & (tl.full((1, 1), p, tl.int32) < height), other=0.0)
        own, following = _halves(tile, taps, BLOCK)
        pair = carried + own + added[None, :]
        carried = following
        y = 2 * p - 1 + m // 8
        valid = inside & ((y >= 0) & (y < 2 * height))[None, :]
        tl.store(out + to, pair.to(out.dtype.element_ty), mask=valid)
        out += 12 * width


@triton.jit
def _halves(tile, taps, BLOCK: tl.constexpr):
    """What a row of features gives to the pair that it ends, and to the one that it begins."""
    both = tl.reshape(tl.dot(tile, taps, input_precision="ieee"), (BLOCK, 2, 2, 8))
    own, following = tl.split(tl.permute(both, (0, 1, 3, 2)))
    return tl.reshape(own, (BLOCK, 16)), tl.reshape(following, (BLOCK, 16))
