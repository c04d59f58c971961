"""The Triton backward of local attention: every gradient is gathered by its owner, no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from msvq_fast.ops.local_attention.triton_windows import (
    LOG2E,
    inverse_window,
    load_tokens,
    scores,
    store_tokens,
    tile_positions,
    window,
)


@triton.jit
def delta_kernel(
    out, o_b, o_h, o_n,
    grad_out, g_b, g_h, g_n,
    delta, heads, tokens,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dO·O`` of every query."""
    blocks = tl.cdiv(tokens, BLOCK)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = plane // heads, plane % heads
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = index < tokens
    o = load_tokens(out + b * o_b + head * o_h, index, there, o_n, D, DP).to(tl.float32)
    g = load_tokens(grad_out + b * g_b + head * g_h, index, there, g_n, D, DP).to(tl.float32)
    tl.store(delta + plane * tokens + index, tl.sum(o * g, 1), mask=there)


@triton.jit(do_not_specialize=["height", "width", "h", "w", "tiles_x", "tiles"])
def query_kernel(
    q, q_b, q_h, q_n,
    grad_out, g_b, g_h, g_n,
    key, k_b, k_h, k_n,
    value, v_b, v_h, v_n,
    bias, lse, delta, sums,
    grad_q, r_b, r_h, r_n,
    heads, group, height, width, h, w, tiles_x, tiles, scale,
    KERNEL: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    OWN: tl.constexpr, RASTER: tl.constexpr, SELF: tl.constexpr, SHIFT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One scale's part of the gradients of a tile of queries, summed over scales in ``sums``."""
    program = tl.program_id(0)
    plane = (program // tiles).to(tl.int64)
    b, head = plane // heads, plane % heads
    kv = head // group
    q_y, q_x, there, top, left = tile_positions(program % tiles, tiles_x, height, width, T)
    bottom = tl.minimum(top + T, height) - 1
    right = tl.minimum(left + T, width) - 1
    index = q_y * width + q_x
    query = load_tokens(q + b * q_b + head * q_h, index, there, q_n, D, DP)
    grad = load_tokens(grad_out + b * g_b + head * g_h, index, there, g_n, D, DP)
    log = tl.load(lse + plane * height * width + index, mask=there, other=0.0)
    log = tl.where(log == float("-inf"), 0.0, log) * LOG2E
    mean = tl.load(delta + plane * height * width + index, mask=there, other=0.0)
    key += b * k_b + kv * k_h
    value += b * v_b + kv * v_h
    sums += plane * height * width * D
    _, y0, _ = window(top, height, h, KERNEL, SHIFT)
    _, _, y1 = window(bottom, height, h, KERNEL, SHIFT)
    _, x0, _ = window(left, width, w, KERNEL, SHIFT)
    _, _, x1 = window(right, width, w, KERNEL, SHIFT)
    if OWN and RASTER:
        y1 = tl.minimum(y1, bottom)
    across = x1 - x0 + 1
    count = (y1 - y0 + 1) * across
    acc = tl.zeros([T * T, DP], tl.float32)
    if not FIRST:
        acc = load_tokens(sums, index, there, D, D, DP)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        exists = j < count
        k_y = tl.where(exists, y0 + j // across, -1)
        k_x = x0 + j % across
        keys = load_tokens(key, k_y * w + k_x, exists, k_n, D, DP)
        values = load_tokens(value, k_y * w + k_x, exists, v_n, D, DP)
        s = scores(
            tl.dot(query, tl.trans(keys), input_precision="ieee"), scale * LOG2E, bias, head,
            q_y[:, None], q_x[:, None], k_y[None, :], k_x[None, :], height, width, h, w,
            KERNEL, BIAS, OWN, RASTER, SELF, SHIFT,
        )  # fmt: skip
        p = tl.exp2(s - log[:, None])
        dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
        ds = p * (dp - mean[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    if LAST:
        store_tokens(grad_q + b * r_b + head * r_h, index, there, r_n, acc * scale, D, DP)
    else:
        store_tokens(sums, index, there, D, acc, D, DP)


@triton.jit(do_not_specialize=["height", "width", "h", "w", "tiles_x", "tiles"])
def key_kernel(
    q, q_b, q_h, q_n,
    grad_out, g_b, g_h, g_n,
    key, k_b, k_h, k_n,
    value, v_b, v_h, v_n,
    bias, lse, delta,
    grad_key, r_b, r_h, r_n,
    grad_value, u_b, u_h, u_n,
    heads, group, height, width, h, w, tiles_x, tiles, scale,
    KERNEL: tl.constexpr, BIAS: tl.constexpr,
    OWN: tl.constexpr, RASTER: tl.constexpr, SELF: tl.constexpr, SHIFT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, over query heads and inverse windows."""
    program = tl.program_id(0)
    plane = (program // tiles).to(tl.int64)
    kv_heads = heads // group
    b, kv = plane // kv_heads, plane % kv_heads
    k_y, k_x, there, top, left = tile_positions(program % tiles, tiles_x, h, w, T)
    bottom = tl.minimum(top + T, h) - 1
    right = tl.minimum(left + T, w) - 1
    index = k_y * w + k_x
    keys = load_tokens(key + b * k_b + kv * k_h, index, there, k_n, D, DP)
    values = load_tokens(value + b * v_b + kv * v_h, index, there, v_n, D, DP)
    k_y = tl.where(there, k_y, -1)
    y0, y1 = inverse_window(top, bottom, height, h, KERNEL, SHIFT)
    x0, x1 = inverse_window(left, right, width, w, KERNEL, SHIFT)
    if OWN and RASTER:
        y0 = tl.maximum(y0, top)
    across = x1 - x0 + 1
    # No query may have its centre near these cells if the grid is finer than the queries'.
    count = tl.maximum(y1 - y0 + 1, 0) * tl.maximum(across, 0)
    across = tl.maximum(across, 1)
    acc_key = tl.zeros([T * T, DP], tl.float32)
    acc_value = tl.zeros([T * T, DP], tl.float32)
    for member in range(group):
        head = kv * group + member
        query_plane = (b * heads + head) * height * width
        for start in range(0, count, BLOCK):
            j = start + tl.arange(0, BLOCK)
            exists = j < count
            q_y = y0 + j // across
            q_x = x0 + j % across
            place = q_y * width + q_x
            queries = load_tokens(q + b * q_b + head * q_h, place, exists, q_n, D, DP)
            grads = load_tokens(grad_out + b * g_b + head * g_h, place, exists, g_n, D, DP)
            log = tl.load(lse + query_plane + place, mask=exists, other=0.0)
            log = tl.where(log == float("-inf"), 0.0, log) * LOG2E
            mean = tl.load(delta + query_plane + place, mask=exists, other=0.0)
            s = scores(
                tl.dot(keys, tl.trans(queries), input_precision="ieee"), scale * LOG2E, bias, head,
                q_y[None, :], q_x[None, :], tl.where(exists[None, :], k_y[:, None], -1),
                k_x[:, None], height, width, h, w, KERNEL, BIAS, OWN, RASTER, SELF, SHIFT,
            )  # fmt: skip
            p = tl.exp2(s - log[None, :])
            acc_value = tl.dot(p.to(grads.dtype), grads, acc_value, input_precision="ieee")
            dp = tl.dot(values, tl.trans(grads), input_precision="ieee")
            ds = p * (dp - mean[None, :])
            acc_key = tl.dot(ds.to(queries.dtype), queries, acc_key, input_precision="ieee")
    store_tokens(grad_key + b * r_b + kv * r_h, index, there, r_n, acc_key * scale, D, DP)
    store_tokens(grad_value + b * u_b + kv * u_h, index, there, u_n, acc_value, D, DP)


@triton.jit(do_not_specialize=["height", "width", "h", "w"])
def bias_kernel(
    q, q_b, q_h, q_n,
    grad_out, g_b, g_h, g_n,
    key, k_b, k_h, k_n,
    value, v_b, v_h, v_n,
    bias, lse, delta, parts,
    batch, heads, group, height, width, h, w, scale, splits,
    KERNEL: tl.constexpr,
    OWN: tl.constexpr, RASTER: tl.constexpr, SELF: tl.constexpr, SHIFT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One offset's bias gradient of one head, of every ``splits``-th block of queries."""
    SIZE: tl.constexpr = 2 * KERNEL - 1 if SHIFT else KERNEL
    program = tl.program_id(0)
    split = program % splits
    offset = program // splits % (SIZE * SIZE)
    head = (program // splits // (SIZE * SIZE)).to(tl.int64)
    kv = head // group
    dy = offset // SIZE - SIZE // 2
    dx = offset % SIZE - SIZE // 2
    add = tl.load(bias + head * SIZE * SIZE + offset).to(tl.float32) * LOG2E
    tokens = height * width
    blocks = tl.cdiv(tokens, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for work in range(split, batch * blocks, splits):
        b = (work // blocks).to(tl.int64)
        place = work % blocks * BLOCK + tl.arange(0, BLOCK)
        exists = place < tokens
        q_y = place // width
        q_x = place % width
        c_y, y0, y1 = window(q_y, height, h, KERNEL, SHIFT)
        c_x, x0, x1 = window(q_x, width, w, KERNEL, SHIFT)
        k_y = c_y + dy
        k_x = c_x + dx
        seen = exists & (k_y >= y0) & (k_y <= y1) & (k_x >= x0) & (k_x <= x1)
        if OWN:
            if RASTER:
                seen = seen & (k_y * w + k_x <= place)
            if not SELF:
                seen = seen & (k_y * w + k_x != place)
        queries = load_tokens(q + b * q_b + head * q_h, place, seen, q_n, D, DP)
        grads = load_tokens(grad_out + b * g_b + head * g_h, place, seen, g_n, D, DP)
        keys = load_tokens(key + b * k_b + kv * k_h, k_y * w + k_x, seen, k_n, D, DP)
        values = load_tokens(value + b * v_b + kv * v_h, k_y * w + k_x, seen, v_n, D, DP)
        plane = (b * heads + head) * tokens
        log = tl.load(lse + plane + place, mask=seen, other=0.0) * LOG2E
        mean = tl.load(delta + plane + place, mask=seen, other=0.0)
        s = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1) * (scale * LOG2E) + add
        dp = tl.sum(grads.to(tl.float32) * values.to(tl.float32), 1)
        total += tl.where(seen, tl.exp2(s - log) * (dp - mean), 0.0)
    tl.store(parts + program, tl.sum(total, 0))
