"""The Triton backward of local attention: every gradient is gathered by its owner, no atomics."""

from __future__ import annotations

import triton.language as tl

from msvq_fast.ops.local_attention.triton_forward import halo
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
    inverse_window,
    kernel,
    load_bias,
    load_tokens,
    pack,
    products,
    program_place,
    reciprocal,
    store_tokens,
    tile_positions,
    window,
    window_length,
)


@kernel
def query_kernel(
    q, q_b: tl.int64, q_h, q_n,
    out, o_b: tl.int64, o_h, o_n,
    grad_out, g_b: tl.int64, g_h, g_n,
    grad_q, r_b: tl.int64, r_h, r_n,
    lse, delta, before,
    k0, k0_b: tl.int64, k0_h, k0_n, v0, v0_b: tl.int64, v0_h, v0_n, b0, h0, w0, r0, s0,
    k1, k1_b: tl.int64, k1_h, k1_n, v1, v1_b: tl.int64, v1_h, v1_n, b1, h1, w1, r1, s1,
    k2, k2_b: tl.int64, k2_h, k2_n, v2, v2_b: tl.int64, v2_h, v2_n, b2, h2, w2, r2, s2,
    k3, k3_b: tl.int64, k3_h, k3_n, v3, v3_b: tl.int64, v3_h, v3_n, b3, h3, w3, r3, s3,
    heads, group, d, height, width, tiles_x, tiles, side, spread, share, scale,
    first, own, raster, include_self, shift, resume, last,
    BIAS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a region of queries; scales and sums over launches as in the forward.

    ``delta`` gets ``dO·O`` of every query, for the other gradients.
    """
    b, head, tile_y, tile_x = program_place(heads, tiles, tiles_x, spread, share)
    plane = b * heads + head
    kv = (head.to(tl.int32) // group).to(tl.int64)
    query_base = head_of(q, b, q_b, head, q_h)
    out_base = head_of(out, b, o_b, head, o_h)
    upstream_base = head_of(grad_out, b, g_b, head, g_h)
    grad_base = head_of(grad_q, b, r_b, head, r_h)
    tokens = height * width
    lse += plane * tokens
    delta += plane * tokens
    before += plane * tokens * d * 8
    by_height, by_width = reciprocal(2 * height), reciprocal(2 * width)
    top, left = tile_y * side * T, tile_x * side * T
    region_end = left + side * T
    for _ in range(side * side):
        bottom, right = tl.minimum(top + T, height) - 1, tl.minimum(left + T, width) - 1
        q_y, q_x, there = tile_positions(top, left, height, width, T)
        place = q_y * width + q_x
        query = load_tokens(query_base, place, there, q_n, d, DP)
        upstream = load_tokens(upstream_base, place, there, g_n, d, DP)
        outputs = load_tokens(out_base, place, there, o_n, d, DP)
        mean = tl.sum(outputs.to(tl.float32) * upstream.to(tl.float32), 1)
        tl.store(delta + place, mean, mask=there)
        log = tl.load(lse + place, mask=there, other=0.0)
        log = tl.where(log == float("-inf"), 0.0, log) * LOG2E
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
                # Cells past the last one are below every window.
                at = cells(spot, odd, across, by_across, pack(1, 0), lane)
                seen = inside(low[:, None], high[:, None], hidden[:, None], more, at[None, :])
                s = products(query, keys) * (scale * LOG2E)
                if BIAS:
                    places = bias_places(at >> 16, at & 65535, size, 0)
                    s += load_bias(table, head, size, centre[:, None], places[None, :], seen)
                p = tl.where(seen, tl.exp2(s - log[:, None]), 0.0)
                dp = products(upstream, values)
                ds = p * (dp - mean[:, None])
                acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
                odd, cell, spot = advance(odd, cell, spot, rows, columns, across, w, BLOCK)
        if resume != 0:
            acc += load_tokens(before, place, there, d, d, DP)
        if last != 0:
            store_tokens(grad_base, place, there, r_n, acc * scale, d, DP)
        else:
            store_tokens(before, place, there, d, acc, d, DP)
        left += T
        wrap = left >= region_end
        left -= tl.where(wrap, side * T, 0)
        top += tl.where(wrap, T, 0)


@kernel
def key_kernel(
    q, q_b: tl.int64, q_h, q_n,
    grad_out, g_b: tl.int64, g_h, g_n,
    key, k_b: tl.int64, k_h, k_n,
    value, v_b: tl.int64, v_h, v_n,
    bias, lse, delta,
    grad_key, r_b: tl.int64, r_h, r_n,
    grad_value, u_b: tl.int64, u_h, u_n,
    kv_heads, group, d, height, width, h, w, radius, size, tiles_x, tiles,
    spread, share, scale, own, raster, include_self, shift,
    BIAS: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, over query heads and inverse windows."""
    b, kv, tile_y, tile_x = program_place(kv_heads, tiles, tiles_x, spread, share)
    top, left = tile_y * T, tile_x * T
    bottom, right = tl.minimum(top + T, h) - 1, tl.minimum(left + T, w) - 1
    k_y, k_x, there = tile_positions(top, left, h, w, T)
    index = k_y * w + k_x
    keys = load_tokens(head_of(key, b, k_b, kv, k_h), index, there, k_n, d, DP)
    values = load_tokens(head_of(value, b, v_b, kv, v_h), index, there, v_n, d, DP)
    y_length, x_length = window_length(radius, h, shift), window_length(radius, w, shift)
    by_h, by_w = reciprocal(2 * h), reciprocal(2 * w)
    # The queries that see a key are a rectangle, none of them past the border.
    y0, y1 = inverse_window(k_y, k_y, height, by_h, h, radius, y_length)
    x0, x1 = inverse_window(k_x, k_x, width, by_w, w, radius, x_length)
    y1 = tl.where(there, y1, -1)
    low, high, here = pack(y0, x0), pack(y1, x1), pack(k_y, k_x)
    ordered = (own != 0) & (raster != 0)
    alone = (own != 0) & (raster == 0) & (include_self == 0)
    hidden = tl.where(ordered, -1, tl.where(alone, here, NOWHERE))
    more = tl.where(ordered, here + 1 - include_self, 0)
    y_from, y_to = inverse_window(top, bottom, height, by_h, h, radius, y_length)
    x_from, x_to = inverse_window(left, right, width, by_w, w, radius, x_length)
    y_from = tl.where(ordered, tl.maximum(y_from, top), y_from)
    # No query may have its centre near these cells if the grid is finer than the queries'.
    across = tl.maximum(x_to - x_from + 1, 0)
    count = tl.maximum(y_to - y_from + 1, 0) * across
    across = tl.maximum(across, 1)
    by_across = reciprocal(across)
    rows, columns = divide(tl.full([], BLOCK, tl.int32), across, by_across)
    if BIAS:
        by_height, by_width = reciprocal(2 * height), reciprocal(2 * width)
        places = bias_places(k_y, k_x, size, 0)
    acc_key = tl.zeros([T * T, DP], tl.float32)
    acc_value = tl.zeros([T * T, DP], tl.float32)
    for member in range(group):
        head = kv * group + member
        query = head_of(q, b, q_b, head, q_h)
        upstream = head_of(grad_out, b, g_b, head, g_h)
        query_plane = (b * kv_heads * group + head) * height * width
        odd, cell, spot = x_from * 0 + 1, y_from * width + x_from, pack(y_from, x_from)
        for start in range(0, count, BLOCK):
            lane = tl.arange(0, BLOCK)
            last_lane = tl.minimum(lane, count - 1 - start)
            place = cells(cell, odd, across, by_across, width, last_lane)
            queries = gather_tokens(query, place, q_n, d, DP)
            grads = gather_tokens(upstream, place, g_n, d, DP)
            log = tl.load(lse + query_plane + place)
            log = tl.where(log == float("-inf"), 0.0, log) * LOG2E
            mean = tl.load(delta + query_plane + place)
            # Cells past the last one are below every inverse window.
            at = cells(spot, odd, across, by_across, pack(1, 0), lane)
            seen = inside(low[:, None], high[:, None], hidden[:, None], more[:, None], at[None, :])
            s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * (scale * LOG2E)
            if BIAS:
                c_y, _, _ = window(at >> 16, height, by_height, h, radius, y_length)
                c_x, _, _ = window(at & 65535, width, by_width, w, radius, x_length)
                centre = bias_places(c_y, c_x, size, size // 2)
                s += load_bias(bias, head, size, centre[None, :], places[:, None], seen)
            p = tl.where(seen, tl.exp2(s - log[None, :]), 0.0)
            acc_value = tl.dot(p.to(grads.dtype), grads, acc_value, input_precision="ieee")
            dp = tl.dot(values, tl.trans(grads), input_precision="ieee")
            ds = p * (dp - mean[None, :])
            acc_key = tl.dot(ds.to(queries.dtype), queries, acc_key, input_precision="ieee")
            odd, cell, spot = advance(odd, cell, spot, rows, columns, across, width, BLOCK)
    key_base = head_of(grad_key, b, r_b, kv, r_h)
    value_base = head_of(grad_value, b, u_b, kv, u_h)
    store_tokens(key_base, index, there, r_n, acc_key * scale, d, DP)
    store_tokens(value_base, index, there, u_n, acc_value, d, DP)


@kernel
def bias_kernel(
    q, q_b: tl.int64, q_h, q_n,
    grad_out, g_b: tl.int64, g_h, g_n,
    key, k_b: tl.int64, k_h, k_n,
    value, v_b: tl.int64, v_h, v_n,
    bias, lse, delta, parts,
    batch, heads, group, d, height, width, h, w, radius, size, splits, scale,
    own, raster, include_self, shift,
    DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One offset's bias gradient of one head, of every ``splits``-th block of queries."""
    program = tl.program_id(0)
    split = program % splits
    offset = program // splits % (size * size)
    head = (program // splits // (size * size)).to(tl.int64)
    kv = head // group
    dy = offset // size - size // 2
    dx = offset % size - size // 2
    add = tl.load(bias + head * size * size + offset).to(tl.float32) * LOG2E
    y_length, x_length = window_length(radius, h, shift), window_length(radius, w, shift)
    by_height, by_width, across = reciprocal(2 * height), reciprocal(2 * width), reciprocal(width)
    tokens = height * width
    blocks = tl.cdiv(tokens, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for work in range(split, batch * blocks, splits):
        b = (work // blocks).to(tl.int64)
        place = work % blocks * BLOCK + tl.arange(0, BLOCK)
        exists = place < tokens
        q_y, q_x = divide(place, width, across)
        c_y, y0, y1 = window(q_y, height, by_height, h, radius, y_length)
        c_x, x0, x1 = window(q_x, width, by_width, w, radius, x_length)
        k_y = c_y + dy
        k_x = c_x + dx
        index = k_y * w + k_x
        seen = exists & (k_y >= y0) & (k_y <= y1) & (k_x >= x0) & (k_x <= x1)
        seen &= index <= tl.where((own != 0) & (raster != 0), place, FAR)
        seen &= index != tl.where((own != 0) & (include_self == 0), place, NOWHERE)
        queries = load_tokens(head_of(q, b, q_b, head, q_h), place, seen, q_n, d, DP)
        grads = load_tokens(head_of(grad_out, b, g_b, head, g_h), place, seen, g_n, d, DP)
        keys = load_tokens(head_of(key, b, k_b, kv, k_h), index, seen, k_n, d, DP)
        values = load_tokens(head_of(value, b, v_b, kv, v_h), index, seen, v_n, d, DP)
        plane = (b * heads + head) * tokens
        log = tl.load(lse + plane + place, mask=seen, other=0.0)
        log = tl.where(log == float("-inf"), 0.0, log) * LOG2E
        mean = tl.load(delta + plane + place, mask=seen, other=0.0)
        s = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1) * (scale * LOG2E) + add
        dp = tl.sum(grads.to(tl.float32) * values.to(tl.float32), 1)
        total += tl.where(seen, tl.exp2(s - log) * (dp - mean), 0.0)
    tl.store(parts + program, tl.sum(total, 0))
