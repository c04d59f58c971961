"""What follows from the codes on a GPU: z_q, loss, sums per code, gradient, moving averages."""

from __future__ import annotations

import triton
import triton.language as tl

from msvq_fast.ops.vector_quantize.triton_search import row_offsets

__all__ = ["code_sums", "grad_latents", "move_codebook", "write_codes"]


@triton.jit(do_not_specialize=["count"])
def write_codes(
    z_ptr,
    codebook_ptr,
    codes_ptr,
    z_q_ptr,
    key_ptr,
    error_ptr,
    count,
    inner,
    z_outer,
    z_inner,
    z_d,
    out_outer,
    out_inner,
    out_d,
    width,
    num_codes,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write z_q, the key to sort rows by (K: non-finite) and the block's sum of (z - e)²."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD).to(tl.int64)
    inside = rows < count
    mask = inside[:, None] & (d < width)[None, :]
    at = row_offsets(rows, inner, z_outer, z_inner)[:, None] + d[None, :] * z_d
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    codes = tl.load(codes_ptr + rows, mask=inside, other=0)
    e = tl.load(codebook_ptr + codes[:, None] * width + d[None, :], mask=mask, other=0.0)
    at = row_offsets(rows, inner, out_outer, out_inner)[:, None] + d[None, :] * out_d
    tl.store(z_q_ptr + at, e.to(z_q_ptr.dtype.element_ty), mask=mask)
    finite = tl.sum(tl.where(tl.abs(z) <= 3.4028234e38, 0, 1), 1) == 0
    tl.store(key_ptr + rows, tl.where(finite, codes.to(tl.int32), num_codes), mask=inside)
    difference = tl.where(mask, z - e, 0.0)
    total = tl.sum(tl.sum(difference * difference, 1), 0)
    tl.store(error_ptr + tl.program_id(0), total)


@triton.jit
def code_sums(
    z_ptr,
    order_ptr,
    bounds_ptr,
    sums_ptr,
    inner,
    z_outer,
    z_inner,
    z_d,
    width,
    splits,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum one of ``splits`` equal parts of a code's rows, in the order of the rows."""
    code = tl.program_id(0)
    part = tl.program_id(1)
    low = tl.load(bounds_ptr + code)
    length = tl.load(bounds_ptr + code + 1) - low
    stop = low + length * (part + 1) // splits
    start = low + length * part // splits
    d = tl.arange(0, BD).to(tl.int64)
    total = tl.zeros((BM, BD), tl.float32)
    while start < stop:
        entry = start + tl.arange(0, BM)
        rows = tl.load(order_ptr + entry, mask=entry < stop, other=0)
        mask = (entry < stop)[:, None] & (d < width)[None, :]
        at = row_offsets(rows, inner, z_outer, z_inner)[:, None] + d[None, :] * z_d
        total += tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        start += BM
    at = (code.to(tl.int64) * splits + part) * width + d
    tl.store(sums_ptr + at, tl.sum(total, 0), mask=d < width)


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
    THROUGH: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write ``grad_z_q + grad_loss factor (z - e)``."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD).to(tl.int64)
    inside = rows < count
    mask = inside[:, None] & (d < width)[None, :]
    at = row_offsets(rows, inner, z_outer, z_inner)[:, None] + d[None, :] * z_d
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    codes = tl.load(codes_ptr + rows, mask=inside, other=0)
    e = tl.load(codebook_ptr + codes[:, None] * width + d[None, :], mask=mask, other=0.0)
    grad = tl.load(grad_loss_ptr).to(tl.float32) * factor * (z - e)
    if THROUGH:
        at = row_offsets(rows, inner, g_outer, g_inner)[:, None] + d[None, :] * g_d
        grad += tl.load(grad_z_q_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = row_offsets(rows, inner, out_outer, out_inner)[:, None] + d[None, :] * out_d
    tl.store(grad_z_ptr + at, grad.to(grad_z_ptr.dtype.element_ty), mask=mask)


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
    tl.store(codebook_ptr + at, vector, mask=mask)
    tl.store(sums_ema_ptr + at, sums, mask=mask)
    tl.store(size_ptr + codes, size, mask=inside)
