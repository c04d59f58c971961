"""The Triton kernel of a few queries: a program gathers the windows of one query of one head."""

from __future__ import annotations

import triton.language as tl

from msvq_fast.ops.local_attention.triton_windows import (
    FAR,
    LOG2E,
    bias_places,
    choose,
    divide,
    head_of,
    kernel,
    load_bias,
    load_tokens,
    pack,
    reciprocal,
    store_tokens,
    window,
    window_length,
)


@kernel
def decode_kernel(
    q, q_b: tl.int64, q_h, q_n,
    out, o_b: tl.int64, o_h, o_n,
    lse, before, positions,
    k0, k0_b: tl.int64, k0_h, k0_n, v0, v0_b: tl.int64, v0_h, v0_n, b0, h0, w0, r0, s0,
    k1, k1_b: tl.int64, k1_h, k1_n, v1, v1_b: tl.int64, v1_h, v1_n, b1, h1, w1, r1, s1,
    k2, k2_b: tl.int64, k2_h, k2_n, v2, v2_b: tl.int64, v2_h, v2_n, b2, h2, w2, r2, s2,
    k3, k3_b: tl.int64, k3_h, k3_n, v3, v3_b: tl.int64, v3_h, v3_n, b3, h3, w3, r3, s3,
    heads, group, d, queries, height, width, ring, scale,
    first, own, raster, include_self, shift, resume, last,
    DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The output of the query at one of the ``positions`` of the last grid, for one head.

    The last keys are a ring of ``ring`` rows. Each of the BLOCK keys of a step has a softmax of its
    own, so that no step waits for another's sums; they meet at the end. Keys that are not seen are
    not read. Slots, ``resume`` and ``last`` as in the forward.
    """
    program = tl.program_id(0)
    plane = (program // queries).to(tl.int64)
    b, head = plane // heads, plane % heads
    kv = head // group
    f = program % queries + tl.arange(0, 1)
    position = tl.load(positions + program % queries).to(tl.int32)
    q_y, q_x = position // width, position % width
    here = pack(q_y, q_x)
    query = load_tokens(head_of(q, b, q_b, head, q_h), f, f >= 0, q_n, d, DP).to(tl.float32)
    by_height, by_width = reciprocal(2 * height), reciprocal(2 * width)
    scale_log2 = scale * LOG2E
    state_max = tl.full([BLOCK], float("-inf"), tl.float32)
    state_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, DP], tl.float32)
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
        c_y, y0, y1 = window(q_y, height, by_height, h, radius, window_length(radius, h, shift))
        c_x, x0, x1 = window(q_x, width, by_width, w, radius, window_length(radius, w, shift))
        y1 = tl.where(ordered, tl.minimum(y1, q_y), y1)
        across = x1 - x0 + 1
        by_across = reciprocal(across)
        count = (y1 - y0 + 1) * across
        end = tl.where(ordered, here + 1, FAR)
        hidden = tl.where(is_own & (include_self == 0), here, -1)
        size = choose(n, s0, s1, s2, s3)
        table = choose(n, b0, b1, b2, b3)
        centre = bias_places(c_y, c_x, size, size // 2)
        rows = tl.where(is_own, ring, h)
        first_row = y0 % rows
        for start in range(0, count, BLOCK):
            k_y, k_x = divide(start + tl.arange(0, BLOCK), across, by_across)
            exists = start + tl.arange(0, BLOCK) < count
            row = first_row + k_y  # a window has no more rows than the ring
            row = tl.where(row >= rows, row - rows, row)
            k_y += y0
            k_x += x0
            at = pack(k_y, k_x)
            seen = exists & (at < end) & (at != hidden)
            index = row * w + k_x
            keys = load_tokens(key, index, seen, k_n, d, DP).to(tl.float32)
            s = tl.sum(query * keys, 1) * scale_log2
            s += load_bias(table, head, size, centre, bias_places(k_y, k_x, size, 0), seen)
            s = tl.where(seen, s, float("-inf"))
            new_max = tl.maximum(state_max, s)
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(s - finite_max)
            shrink = tl.exp2(state_max - finite_max)
            state_sum = state_sum * shrink + p
            values = load_tokens(value, index, seen, v_n, d, DP).to(tl.float32)
            acc = acc * shrink[:, None] + p[:, None] * values
            state_max = new_max
    place = plane * queries + f
    old = f < resume * queries
    old_max = tl.load(lse + place, mask=old, other=float("-inf")) * LOG2E
    new_max = tl.maximum(old_max, tl.max(state_max, 0))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    share = tl.exp2(state_max - finite_max)
    old_share = tl.exp2(old_max - finite_max)  # the sums before are divided by theirs
    total = old_share + tl.sum(state_sum * share, 0)
    some = total != 0.0  # true for NaN too
    total = tl.where(some, total, 1.0)
    result = tl.sum(acc * share[:, None], 0)[None, :]
    result += load_tokens(before, place, old, d, d, DP) * old_share[:, None]
    result = result / total[:, None]
    out_base = head_of(out, b, o_b, head, o_h)
    store_tokens(out_base, f, f < last * queries, o_n, result, d, DP)
    store_tokens(before, place, f < (1 - last) * queries, d, result, d, DP)
    tl.store(lse + place, tl.where(some, new_max / LOG2E + tl.log2(total) / LOG2E, float("-inf")))
