"""The Triton forward of local attention: tiles of queries past the halos of their windows."""

from __future__ import annotations

import triton
import triton.language as tl

from msvq_fast.ops.local_attention.triton_windows import (
    FAR,
    LOG2E,
    NOWHERE,
    advance,
    bias_places,
    cells,
    choose,
    divide,
    gather_tokens,
    head_of,
    inside,
    kernel,
    load_bias,
    load_tokens,
    pack,
    program_place,
    reciprocal,
    store_tokens,
    tile_positions,
    window,
    window_length,
)


@triton.jit
def halo(top, left, bottom, right, height, width, by_height, by_width, h, w, radius, shift, raster):
    """The first cell, cells across and number of cells that a tile of queries sees."""
    y_length, x_length = window_length(radius, h, shift), window_length(radius, w, shift)
    _, y0, _ = window(top, height, by_height, h, radius, y_length)
    _, _, y1 = window(bottom, height, by_height, h, radius, y_length)
    _, x0, _ = window(left, width, by_width, w, radius, x_length)
    _, _, x1 = window(right, width, by_width, w, radius, x_length)
    y1 = tl.where(raster, tl.minimum(y1, bottom), y1)
    across = x1 - x0 + 1
    return y0, x0, across, (y1 - y0 + 1) * across


@kernel
def forward_kernel(
    q, q_b: tl.int64, q_h, q_n,
    out, o_b: tl.int64, o_h, o_n,
    lse, before,
    k0, k0_b: tl.int64, k0_h, k0_n, v0, v0_b: tl.int64, v0_h, v0_n, b0, h0, w0, r0, s0,
    k1, k1_b: tl.int64, k1_h, k1_n, v1, v1_b: tl.int64, v1_h, v1_n, b1, h1, w1, r1, s1,
    k2, k2_b: tl.int64, k2_h, k2_n, v2, v2_b: tl.int64, v2_h, v2_n, b2, h2, w2, r2, s2,
    k3, k3_b: tl.int64, k3_h, k3_n, v3, v3_b: tl.int64, v3_h, v3_n, b3, h3, w3, r3, s3,
    heads, group, d, height, width, tiles_x, tiles, side, spread, share, scale,
    first, own, raster, include_self, shift, resume, last,
    BIAS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a region of ``side x side`` tiles of queries of one head.

    The scales are those in the slots from ``first`` on. With ``resume`` the softmax goes on from
    the sums ``before`` and ``lse`` of other scales; unless ``last`` the output goes to ``before``.
    """
    b, head, tile_y, tile_x = program_place(heads, tiles, tiles_x, spread, share)
    plane = b * heads + head
    kv = (head.to(tl.int32) // group).to(tl.int64)
    query_base = head_of(q, b, q_b, head, q_h)
    out_base = head_of(out, b, o_b, head, o_h)
    tokens = height * width
    lse += plane * tokens
    before += plane * tokens * d * 8
    by_height, by_width = reciprocal(2 * height), reciprocal(2 * width)
    scale_log2 = scale * LOG2E
    top, left = tile_y * side * T, tile_x * side * T
    region_end = left + side * T
    for _ in range(side * side):
        bottom, right = tl.minimum(top + T, height) - 1, tl.minimum(left + T, width) - 1
        q_y, q_x, there = tile_positions(top, left, height, width, T)
        place = q_y * width + q_x
        query = load_tokens(query_base, place, there, q_n, d, DP)
        state_max = tl.full([T * T], float("-inf"), tl.float32)
        sums = tl.zeros([T * T, BLOCK], tl.float32)
        acc = tl.zeros([T * T, DP], tl.float32)
        for n in range(first, 4):
            h, w = choose(n, h0, h1, h2, h3), choose(n, w0, w1, w2, w3)
            radius = choose(n, r0, r1, r2, r3)
            key = head_of(
                choose(n, k0, k1, k2, k3), b, choose(n, k0_b, k1_b, k2_b, k3_b),
                kv, choose(n, k0_h, k1_h, k2_h, k3_h),
            )  # fmt: skip
            value = head_of(
                choose(n, v0, v1, v2, v3), b, choose(n, v0_b, v1_b, v2_b, v3_b),
                kv, choose(n, v0_h, v1_h, v2_h, v3_h),
            )  # fmt: skip
            k_n, v_n = choose(n, k0_n, k1_n, k2_n, k3_n), choose(n, v0_n, v1_n, v2_n, v3_n)
            is_own = (n == 3) & (own != 0)
            ordered = is_own & (raster != 0)
            y_from, x_from, across, count = halo(
                top, left, bottom, right, height, width, by_height, by_width,
                h, w, radius, shift, ordered,
            )  # fmt: skip
            count = tl.where((top < height) & (left < width), count, 0)
            c_y, y0, y1 = window(q_y, height, by_height, h, radius, window_length(radius, h, shift))
            c_x, x0, x1 = window(q_x, width, by_width, w, radius, window_length(radius, w, shift))
            low, high, here = pack(y0, x0), pack(y1, x1), pack(q_y, q_x)
            alone = is_own & (raster == 0) & (include_self == 0)
            hidden = tl.where(ordered, here + include_self, tl.where(alone, here, NOWHERE))
            more = tl.where(ordered, FAR, 0)
            if BIAS:
                size = choose(n, s0, s1, s2, s3)
                table = choose(n, b0, b1, b2, b3)
                centre = bias_places(c_y, c_x, size, size // 2)
            by_across = reciprocal(across)
            rows, columns = divide(tl.full([], BLOCK, tl.int32), across, by_across)
            odd, cell, spot = x_from * 0 + 1, y_from * w + x_from, pack(y_from, x_from)
            for start in range(0, count, BLOCK):
                lane = tl.arange(0, BLOCK)
                last_lane = tl.minimum(lane, count - 1 - start)
                index = cells(cell, odd, across, by_across, w, last_lane)
                keys = gather_tokens(key, index, k_n, d, DP)
                values = gather_tokens(value, index, v_n, d, DP)
                dots = tl.dot(query, tl.trans(keys), input_precision="ieee")
                # Cells past the last one are below every window.
                at = cells(spot, odd, across, by_across, pack(1, 0), lane)
                seen = inside(low[:, None], high[:, None], hidden[:, None], more, at[None, :])
                s = dots * scale_log2
                if BIAS:
                    places = bias_places(at >> 16, at & 65535, size, 0)
                    s += load_bias(table, head, size, centre[:, None], places[None, :], seen)
                s = tl.where(seen, s, float("-inf"))
                new_max = tl.maximum(state_max, tl.max(s, 1))
                finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp2(s - finite_max[:, None])
                shrink = tl.exp2(state_max - finite_max)
                sums = sums * shrink[:, None] + p
                acc = acc * shrink[:, None]
                acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
                state_max = new_max
                odd, cell, spot = advance(odd, cell, spot, rows, columns, across, w, BLOCK)
        state_sum = tl.sum(sums, 1)
        if resume != 0:
            old_max = tl.load(lse + place, mask=there, other=float("-inf")) * LOG2E
            new_max = tl.maximum(state_max, old_max)
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            shrink = tl.exp2(state_max - finite_max)
            old_sum = tl.exp2(old_max - finite_max)  # the sums before are divided by theirs
            state_sum = state_sum * shrink + old_sum
            old = load_tokens(before, place, there, d, d, DP)
            acc = acc * shrink[:, None] + old * old_sum[:, None]
            state_max = new_max
            tl.debug_barrier()  # several warps read what one writes below
        some = state_sum != 0.0  # true for NaN too
        total = tl.where(some, state_sum, 1.0)
        result = acc * (1.0 / total)[:, None]
        if last != 0:
            store_tokens(out_base, place, there, o_n, result, d, DP)
        else:
            store_tokens(before, place, there, d, result, d, DP)
        log = tl.where(some, (state_max + tl.log2(total)) / LOG2E, float("-inf"))
        tl.store(lse + place, log, mask=there)
        left += T
        wrap = left >= region_end
        left -= tl.where(wrap, side * T, 0)
        top += tl.where(wrap, T, 0)
