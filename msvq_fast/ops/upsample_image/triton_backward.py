"""Gradients of the image in Triton: all of them from one pass over features and gradient.

A feature at (i, j) gave to the pixels of rows 2i - 1 ... 2i + 2 and columns 2j - 1 ... 2j + 2: its
patch. Of each of the four rows a patch has the 16 numbers from 6j - 4 on, of which 1 to 12 are its
own: at an even place, two numbers are read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gradient_kernel(
    x, grad, w, grad_x, parts_w, parts_b,
    batch, height, width, w_c, w_o, w_y, w_x,
    C: tl.constexpr, BLOCK: tl.constexpr, NEED_X: tl.constexpr, NEED_W: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th tile of ``BLOCK`` features of a row; a part of the sums each."""
    m = tl.arange(0, 64)
    e = m % 16
    ky = m // 16
    own = (e >= 1) & (e < 13)
    c = tl.arange(0, C)
    v = tl.arange(0, 8 * BLOCK)
    if NEED_X:
        at_w = ((e + 2) % 3 * w_o + ky * w_y + (e - 1) // 3 * w_x)[:, None] + (c * w_c)[None, :]
        taps = tl.load(w + at_w, mask=own[:, None], other=0.0).to(x.dtype.element_ty)
    if NEED_W:
        sum_w = tl.zeros((C, 64), tl.float32)
        sum_b = tl.zeros((8 * BLOCK,), tl.float32)
    blocks = tl.cdiv(width, BLOCK)
    for tile in range(tl.program_id(0), batch * height * blocks, tl.num_programs(0)):
        j0 = tile % blocks * BLOCK
        row = tile // blocks
        i = row % height
        image = (row // height).to(tl.int64)
        j = j0 + tl.arange(0, BLOCK)
        f = (6 * j - 4)[:, None] + e[None, :]
        y = 2 * i - 1 + ky
        inside = ((y >= 0) & (y < 2 * height) & (e < 14))[None, :] & (f >= 0) & (f < 6 * width)
        at = (image * 2 * height + y)[None, :] * (6 * width) + f
        patch = tl.load(grad + at, mask=inside, other=0.0)
        # A neighbour's number times a weight of zero is NaN if it is not finite.
        patch = tl.where(own[None, :], patch, 0.0)
        at = row.to(tl.int64) * width * C + j[:, None] * C + c[None, :]
        there = (j < width)[:, None]
        if NEED_X:
            back = tl.dot(patch, taps, input_precision="ieee")
            tl.store(grad_x + at, back.to(grad_x.dtype.element_ty), mask=there)
        if NEED_W:
            features = tl.load(x + at, mask=there, other=0.0)
            sum_w = tl.dot(tl.trans(features), patch, sum_w, input_precision="ieee")
            # Each pixel once: those of rows 2i and 2i + 1 as they lie in memory.
            at_b = 6 * j0 + v
            mine = (v < 6 * BLOCK) & (at_b < 6 * width)
            pixels = grad + (image * 2 * height + 2 * i) * (6 * width) + at_b
            sum_b += tl.load(pixels, mask=mine, other=0.0).to(tl.float32)
            sum_b += tl.load(pixels + 6 * width, mask=mine, other=0.0).to(tl.float32)
    if NEED_W:
        pid = tl.program_id(0)
        tl.store(parts_w + (pid * C + c)[:, None] * 64 + m[None, :], sum_w)
        for o in tl.static_range(3):
            total = tl.sum(tl.where(v % 3 == o, sum_b, 0.0), 0)
            tl.store(parts_b + pid * 4 + o, total)


@triton.jit
def sum_kernel(
    parts_w, parts_b, grad_w, grad_b,
    programs, w_c, w_o, w_y, w_x, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program c < C: a channel's parts of the weights; the last one: the bias's; in their order."""
    pid = tl.program_id(0)
    part = tl.arange(0, PARTS)
    if pid < C:
        m = tl.arange(0, 64)
        sums = tl.zeros((PARTS, 64), tl.float32)
        for first in range(0, programs, PARTS):
            at = ((first + part) * C + pid)[:, None] * 64 + m[None, :]
            sums += tl.load(parts_w + at, mask=(first + part < programs)[:, None], other=0.0)
        e = m % 16
        at = pid * w_c + (e + 2) % 3 * w_o + m // 16 * w_y + (e - 1) // 3 * w_x
        total = tl.sum(sums, 0).to(grad_w.dtype.element_ty)
        tl.store(grad_w + at, total, mask=(e >= 1) & (e < 13))
    else:
        o = tl.arange(0, 4)
        sums_b = tl.zeros((PARTS, 4), tl.float32)
        for first in range(0, programs, PARTS):
            valid = (first + part < programs)[:, None] & (o < 3)[None, :]
            at_b = (first + part)[:, None] * 4 + o[None, :]
            sums_b += tl.load(parts_b + at_b, mask=valid, other=0.0)
        tl.store(grad_b + o, tl.sum(sums_b, 0).to(grad_b.dtype.element_ty), mask=o < 3)
