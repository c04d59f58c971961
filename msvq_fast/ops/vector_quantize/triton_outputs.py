"""What follows from the codes on a GPU: z_q, loss, sums per code, gradient, moving averages."""

from __future__ import annotations

import triton
import triton.language as tl

from msvq_fast.ops.vector_quantize.triton_search import block_offsets, row_offsets

__all__ = ["add_parts", "code_sums", "grad_latents", "move_codebook", "write_codes"]


@triton.jit(do_not_specialize=["count"])
def write_codes(
    codebook_ptr,
    codes_ptr,
    z_q_ptr,
    count,
    inner,
    out_outer,
    out_inner,
    out_d,
    width,
    UNIFORM: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write z_q."""
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    d = tl.arange(0, BD)
    mask = (rows < count)[:, None] & (d < width)[None, :]
    codes = tl.load(codes_ptr + rows, mask=rows < count, other=0)
    e = tl.load(codebook_ptr + codes[:, None] * width + d[None, :], mask=mask, other=0.0)
    start, at = block_offsets(first, inner, out_outer, out_inner, out_d, UNIFORM, BM, BD)
    tl.store(z_q_ptr + start + at, e.to(z_q_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_codes", "piece_bits"])
def code_sums(
    z_ptr,
    codebook_ptr,
    order_ptr,
    bounds_ptr,  # (K + 2,)
    z_q_ptr,
    part_sums_ptr,  # (slots, D)
    error_ptr,  # (slots,)
    inner,
    z_outer,
    z_inner,
    z_d,
    out_outer,
    out_inner,
    out_d,
    width,
    num_codes,
    piece_bits,
    FLAT: tl.constexpr,
    WRITE: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum a code's rows in one of the pieces of ``2**piece_bits`` sorted rows, and their (z - e)².

    Those of code c in piece p are slot p + c: along the sorted rows c or p grows, so no two share
    one, there are as many as pieces and codes together, and a code that owns all rows has many.
    Code K stands for the rows that are not finite; they have code 0 and count in the loss alone.
    ``WRITE``: these rows of z_q too.
    """
    slot = tl.program_id(0)
    piece = tl.full((), 1, tl.int64) << piece_bits
    code = tl.full((), 0, tl.int32)
    above = code + num_codes
    while code < above:  # the first code whose last slot is not before this one
        middle = (code + above) // 2
        end = tl.load(bounds_ptr + middle + 1)
        before = (end - 1 >> piece_bits) + middle < slot
        code = tl.where(before, middle + 1, code)
        above = tl.where(before, above, middle)
    first = (slot - code).to(tl.int64) << piece_bits
    stop = tl.minimum(tl.load(bounds_ptr + code + 1), first + piece).to(tl.int32)
    start = tl.minimum(tl.maximum(tl.load(bounds_ptr + code), first), stop).to(tl.int32)
    d = tl.arange(0, BD).to(tl.int64)
    chosen = tl.where(code < num_codes, code, 0).to(tl.int64)
    e = tl.load(codebook_ptr + chosen * width + d, mask=d < width, other=0.0)
    total = tl.zeros((BM, BD), tl.float32)
    error = tl.zeros((BM, BD), tl.float32)
    entry = start + tl.arange(0, BM)
    next_rows = tl.load(order_ptr + entry, mask=entry < stop, other=0)
    while start < stop:
        rows = next_rows
        mask = (entry < stop)[:, None] & (d < width)[None, :]
        start += BM
        entry += BM
        next_rows = tl.load(order_ptr + entry, mask=entry < stop, other=0)
        at = row_offsets(rows, inner, z_outer, z_inner, FLAT)[:, None] + (d * z_d)[None, :]
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += z
        difference = tl.where(mask, z - e[None, :], 0.0)
        error += difference * difference
        if WRITE:
            at = row_offsets(rows, inner, out_outer, out_inner, FLAT)[:, None]
            vectors = tl.broadcast_to(e.to(z_q_ptr.dtype.element_ty)[None, :], (BM, BD))
            tl.store(z_q_ptr + (at + (d * out_d)[None, :]), vectors, mask=mask)
    tl.store(error_ptr + slot, tl.sum(tl.sum(error, 1), 0))
    at = slot.to(tl.int64) * width + d
    tl.store(part_sums_ptr + at, tl.sum(total, 0), mask=d < width)


@triton.jit(do_not_specialize=["piece_bits"])
def add_parts(
    part_sums_ptr,  # (slots, D)
    bounds_ptr,  # (K + 2,)
    counts_ptr,  # (K,)
    sums_ptr,  # (K, D)
    width,
    piece_bits,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Count a code's rows and add up its sums of pieces, in float64."""
    code = tl.program_id(0)
    low = tl.load(bounds_ptr + code)
    high = tl.load(bounds_ptr + code + 1)
    tl.store(counts_ptr + code, high - low)
    slot = (low >> piece_bits) + code
    last = (high - 1 >> piece_bits) + code + 1
    d = tl.arange(0, BD)
    total = tl.zeros((BM, BD), tl.float64)
    while slot < last:
        slots = slot + tl.arange(0, BM)
        mask = (slots < last)[:, None] & (d < width)[None, :]
        total += tl.load(part_sums_ptr + slots[:, None] * width + d[None, :], mask=mask, other=0.0)
        slot += BM
    at = code.to(tl.int64) * width + d
    tl.store(sums_ptr + at, tl.sum(total, 0).to(tl.float32), mask=d < width)


@triton.jit(do_not_specialize=["count"])
def grad_latents(
    grad_z_q_ptr,
    grad_loss_ptr,
    z_ptr,
    codes_ptr,
    codebook_ptr,
    grad_z_ptr,
    count,
    inner,
    g_outer,
    g_inner,
    g_d,
    z_outer,
    z_inner,
    z_d,
    out_outer,
    out_inner,
    out_d,
    width,
    factor,
    UNIFORM: tl.constexpr,
    THROUGH: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write ``grad_z_q + grad_loss factor (z - e)``."""
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    d = tl.arange(0, BD)
    mask = (rows < count)[:, None] & (d < width)[None, :]
    start, at = block_offsets(first, inner, z_outer, z_inner, z_d, UNIFORM, BM, BD)
    z = tl.load(z_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    codes = tl.load(codes_ptr + rows, mask=rows < count, other=0)
    e = tl.load(codebook_ptr + codes[:, None] * width + d[None, :], mask=mask, other=0.0)
    grad = tl.load(grad_loss_ptr).to(tl.float32) * factor * (z - e)
    if THROUGH:
        start, at = block_offsets(first, inner, g_outer, g_inner, g_d, UNIFORM, BM, BD)
        grad += tl.load(grad_z_q_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    start, at = block_offsets(first, inner, out_outer, out_inner, out_d, UNIFORM, BM, BD)
    tl.store(grad_z_ptr + start + at, grad.to(grad_z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def move_codebook(
    codebook_ptr,
    size_ptr,
    sums_ema_ptr,
    counts_ptr,
    sums_ptr,
    fresh_ptr,
    total_ptr,
    num_codes,
    width,
    decay,
    rest,
    eps,
    restart_below,
    start_mass,
    LAPLACE: tl.constexpr,
    RESTART: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Eq. 3-4 for a block of codes: mass, sum, vector, restart."""
    codes = tl.program_id(0) * BK + tl.arange(0, BK)
    d = tl.arange(0, BD)
    inside = codes < num_codes
    mask = inside[:, None] & (d < width)[None, :]
    at = codes.to(tl.int64)[:, None] * width + d[None, :]
    counts = tl.load(counts_ptr + codes, mask=inside, other=0)
    size = tl.load(size_ptr + codes, mask=inside, other=1.0) * decay + counts.to(tl.float32) * rest
    sums = tl.load(sums_ema_ptr + at, mask=mask, other=0.0) * decay
    sums += tl.load(sums_ptr + at, mask=mask, other=0.0) * rest
    mass = size
    if LAPLACE:
        total = tl.load(total_ptr)
        mass = (size + eps) / (total + num_codes * eps) * total
    before = tl.load(codebook_ptr + at, mask=mask, other=0.0)
    mass = tl.where(counts > 0, mass, 1.0)
    vector = tl.where((counts > 0)[:, None], sums / mass[:, None], before)
    if RESTART:
        fresh = tl.load(fresh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        bad = tl.sum(tl.where(tl.abs(fresh) <= 3.4028234e38, 0, 1), 1)
        dead = (size < restart_below) & (bad == 0)
        vector = tl.where(dead[:, None], fresh, vector)
        sums = tl.where(dead[:, None], fresh * start_mass, sums)
        size = tl.where(dead, start_mass, size)
    # Every warp reads the few masses itself: none may write them before all have.
    tl.debug_barrier()
    tl.store(codebook_ptr + at, vector, mask=mask)
    tl.store(sums_ema_ptr + at, sums, mask=mask)
    tl.store(size_ptr + codes, size, mask=inside)
