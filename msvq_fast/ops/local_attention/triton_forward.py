"""The Triton forward of local attention: a tile of queries past the halo of its windows."""

from __future__ import annotations

import triton
import triton.language as tl

from msvq_fast.ops.local_attention.triton_windows import (
    LOG2E,
    load_tokens,
    scores,
    store_tokens,
    tile_positions,
    window,
)


@triton.jit
def attend(
    state_max,
    state_sum,
    acc,
    query,
    key,
    value,
    bias,
    k_stride,
    v_stride,
    head,
    q_y,
    q_x,
    top,
    left,
    bottom,
    right,
    height,
    width,
    h,
    w,
    scale_log2,
    KERNEL: tl.constexpr,
    BIAS: tl.constexpr,
    OWN: tl.constexpr,
    RASTER: tl.constexpr,
    SELF: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One scale's part of the online softmax; ``key`` and ``value`` point at one head's tokens."""
    _, y0, _ = window(top, height, h, KERNEL, SHIFT)
    _, _, y1 = window(bottom, height, h, KERNEL, SHIFT)
    _, x0, _ = window(left, width, w, KERNEL, SHIFT)
    _, _, x1 = window(right, width, w, KERNEL, SHIFT)
    if OWN and RASTER:
        y1 = tl.minimum(y1, bottom)
    across = x1 - x0 + 1
    count = (y1 - y0 + 1) * across
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < count
        k_y = tl.where(there, y0 + j // across, -1)
        k_x = x0 + j % across
        index = k_y * w + k_x
        keys = load_tokens(key, index, there, k_stride, D, DP)
        dots = tl.dot(query, tl.trans(keys), input_precision="ieee")
        s = scores(
            dots, scale_log2, bias, head, q_y[:, None], q_x[:, None], k_y[None, :], k_x[None, :],
            height, width, h, w, KERNEL, BIAS, OWN, RASTER, SELF, SHIFT,
        )  # fmt: skip
        new_max = tl.maximum(state_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - finite_max[:, None])
        shrink = tl.exp2(state_max - finite_max)
        state_sum = state_sum * shrink + tl.sum(p, 1)
        values = load_tokens(value, index, there, v_stride, D, DP)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
        state_max = new_max
    return state_max, state_sum, acc


SIZES = ["height", "width", "tiles_x", "tiles", *(f"{axis}{n}" for n in range(4) for axis in "hw")]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, q_b, q_h, q_n,
    out, o_b, o_h, o_n,
    lse, before,
    k0, k0_b, k0_h, k0_n, v0, v0_b, v0_h, v0_n, b0, h0, w0,
    k1, k1_b, k1_h, k1_n, v1, v1_b, v1_h, v1_n, b1, h1, w1,
    k2, k2_b, k2_h, k2_n, v2, v2_b, v2_h, v2_n, b2, h2, w2,
    k3, k3_b, k3_h, k3_n, v3, v3_b, v3_h, v3_n, b3, h3, w3,
    heads, group, height, width, tiles_x, tiles, scale,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
    FIRST: tl.constexpr, OWN: tl.constexpr, RASTER: tl.constexpr, SELF: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of ``T x T`` queries of one head.

    Unless ``FIRST``, the softmax goes on from the output ``before`` and ``lse`` of other scales.
    """
    program = tl.program_id(0)
    tile = program % tiles
    plane = program // tiles
    b = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    kv = head // group
    q_y, q_x, there, top, left = tile_positions(tile, tiles_x, height, width, T)
    bottom = tl.minimum(top + T, height) - 1
    right = tl.minimum(left + T, width) - 1
    index = q_y * width + q_x
    query = load_tokens(q + b * q_b + head * q_h, index, there, q_n, D, DP)
    lse += plane.to(tl.int64) * height * width
    if FIRST:
        state_max = tl.full([T * T], float("-inf"), tl.float32)
        state_sum = tl.zeros([T * T], tl.float32)
        acc = tl.zeros([T * T, DP], tl.float32)
    else:
        state_max = tl.load(lse + index, mask=there, other=0.0) * LOG2E
        state_sum = tl.where(state_max == float("-inf"), 0.0, 1.0)
        acc = load_tokens(before + plane.to(tl.int64) * height * width * D, index, there, D, D, DP)
    scale_log2 = scale * LOG2E
    if K0 > 0:
        state_max, state_sum, acc = attend(
            state_max, state_sum, acc, query,
            k0 + b * k0_b + kv * k0_h, v0 + b * v0_b + kv * v0_h, b0, k0_n, v0_n, head,
            q_y, q_x, top, left, bottom, right, height, width, h0, w0, scale_log2,
            K0, B0, False, RASTER, SELF, SHIFT, D, DP, BLOCK,
        )  # fmt: skip
    if K1 > 0:
        state_max, state_sum, acc = attend(
            state_max, state_sum, acc, query,
            k1 + b * k1_b + kv * k1_h, v1 + b * v1_b + kv * v1_h, b1, k1_n, v1_n, head,
            q_y, q_x, top, left, bottom, right, height, width, h1, w1, scale_log2,
            K1, B1, False, RASTER, SELF, SHIFT, D, DP, BLOCK,
        )  # fmt: skip
    if K2 > 0:
        state_max, state_sum, acc = attend(
            state_max, state_sum, acc, query,
            k2 + b * k2_b + kv * k2_h, v2 + b * v2_b + kv * v2_h, b2, k2_n, v2_n, head,
            q_y, q_x, top, left, bottom, right, height, width, h2, w2, scale_log2,
            K2, B2, False, RASTER, SELF, SHIFT, D, DP, BLOCK,
        )  # fmt: skip
    state_max, state_sum, acc = attend(
        state_max, state_sum, acc, query,
        k3 + b * k3_b + kv * k3_h, v3 + b * v3_b + kv * v3_h, b3, k3_n, v3_n, head,
        q_y, q_x, top, left, bottom, right, height, width, h3, w3, scale_log2,
        K3, B3, OWN, RASTER, SELF, SHIFT, D, DP, BLOCK,
    )  # fmt: skip
    some = state_sum != 0.0  # true for NaN too
    total = tl.where(some, state_sum, 1.0)
    store_tokens(out + b * o_b + head * o_h, index, there, o_n, acc / total[:, None], D, DP)
    log = tl.where(some, (state_max + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse + index, log, mask=there)
