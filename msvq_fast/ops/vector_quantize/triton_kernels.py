"""Vector quantization in Triton: launches and custom ops (triton_search.py, triton_outputs.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from msvq_fast.ops.backend import kernel_op
from msvq_fast.ops.vector_quantize import triton_outputs
from msvq_fast.ops.vector_quantize.layout import codes_like, outputs_like, row_strides
from msvq_fast.ops.vector_quantize.triton_calls import (
    MOST_WIDTH,
    code_statistics,
    key_dtype,
    placed,
    search,
    uniform,
)
from msvq_fast.ops.vector_quantize.triton_codes import measure_codes
from msvq_fast.ops.vector_quantize.triton_shapes import (
    DTYPES,
    block,
    block_width,
    moved_codes,
    variants,
)

__all__ = [
    "ema_update_",
    "nearest_code",
    "unsupported",
    "variants",
    "vector_quantize",
    "vector_quantize_backward",
]

# By what triton.jit made of the kernels: Triton 3.3, of PyTorch 2.7, has no triton.knobs.
_INTERPRETED = not isinstance(measure_codes, triton.JITFunction)


def unsupported(z: Tensor, codebook: Tensor, dim: int = -1) -> str | None:
    """Why this call cannot run here, or None."""
    if z.device.type != "cuda" and not (_INTERPRETED and z.device.type == "cpu"):
        return f"the Triton kernel runs on CUDA tensors, z is on {z.device}"
    if z.dtype not in DTYPES:
        return f"the Triton kernel takes float32, float16 or bfloat16, z is {z.dtype}"
    if _INTERPRETED and z.dtype == torch.bfloat16:
        return "Triton's interpreter does not round bfloat16 as a GPU does"
    if codebook.dtype != torch.float32:
        return f"the Triton kernel takes a float32 codebook, it is {codebook.dtype}"
    if codebook.shape[1] > MOST_WIDTH:
        return f"the Triton kernel takes D up to {MOST_WIDTH}, it is {codebook.shape[1]}"
    if z.numel() // codebook.shape[1] >= 2**31 - 2**18:  # a step of all programs further
        return f"the Triton kernel takes fewer than 2**31 latents, z is {tuple(z.shape)}"
    if codebook.shape[0] * block_width(codebook.shape[1]) >= 2**31 - 2**18:
        return f"the Triton kernel takes codebooks of 2**31 values, it is {tuple(codebook.shape)}"
    return None


@kernel_op("nearest_code_triton")
def nearest_code(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Code of every latent, as the reference defines it."""
    codes = codes_like(z, codebook, dim)
    if codes.numel() == 0:
        return codes
    if row_strides(dim, z) is None:
        z = z.contiguous()
    inner, (strides,) = placed(dim, z)
    with torch.cuda.device_of(z):
        search(z, inner, strides, codebook.contiguous(), codes)
    return codes


torch.library.register_fake(nearest_code, codes_like)


@kernel_op("vector_quantize_triton")
def vector_quantize(
    z: Tensor, codebook: Tensor, dim: int, commitment_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(z_q, codes, commitment_loss, code_counts, code_sums)``, without a host synchronisation."""
    num_codes, width = codebook.shape
    codebook = codebook.contiguous()
    codes = codes_like(z, codebook, dim)
    z_q = out = torch.empty_like(z)
    count = codes.numel()
    if count == 0:
        counts = codes.new_zeros(num_codes)
        return z_q, codes, codebook.new_zeros(()), counts, torch.zeros_like(codebook)
    if row_strides(dim, z, out) is None:
        z = z.contiguous()
        out = torch.empty_like(z)
    inner, (z_strides, out_strides) = placed(dim, z, out)
    padded = block_width(width)
    with torch.cuda.device_of(z):
        keys = codes.new_empty(count, dtype=key_dtype(num_codes))
        # Rows that are not whole in memory are gathered from a copy, where z_q will be.
        copy = None if z_strides[2] == 1 else out
        search(z, inner, z_strides, codebook, codes, keys, copy)
        rows, row_layout = (
            (z, (inner, z_strides)) if copy is None else (copy, (count, (0, width, 1)))
        )
        errors, counts, sums = code_statistics(
            rows, *row_layout, codebook, keys, out if copy is None else None, out_strides
        )
        if copy is not None:
            shape = block(padded, whole=False)
            triton_outputs.write_codes[(triton.cdiv(count, shape["BM"]),)](
                codebook,
                codes,
                out,
                count,
                inner,
                *out_strides,
                width,
                UNIFORM=uniform(shape["BM"], count, inner, out_strides),
                BD=padded,
                **shape,
            )
    if out is not z_q:
        z_q.copy_(out)
    loss = errors.double().sum() * (commitment_weight / z.numel())
    return z_q, codes, loss.float(), counts, sums


torch.library.register_fake(vector_quantize, outputs_like)


@kernel_op("vector_quantize_backward_triton")
def vector_quantize_backward(
    grad_z_q: Tensor | None,
    grad_loss: Tensor,
    z: Tensor,
    codes: Tensor,
    codebook: Tensor,
    dim: int,
    commitment_weight: float,
) -> Tensor:
    """``grad_z_q + grad_loss 2β/numel(z) (z - e)`` in the layout of ``z``."""
    grad_z = out = torch.empty_like(z)
    if z.numel() == 0:
        return grad_z
    upstream = out if grad_z_q is None else grad_z_q
    if row_strides(dim, upstream, z, out) is None:
        upstream, z = upstream.contiguous(), z.contiguous()
        out = torch.empty_like(z)
    inner, (g_strides, z_strides, out_strides) = placed(dim, upstream, z, out)
    count = codes.numel()
    padded = block_width(codebook.shape[1])
    shape = block(padded, whole=z_strides[2] == 1)
    with torch.cuda.device_of(z):
        triton_outputs.grad_latents[(triton.cdiv(count, shape["BM"]),)](
            upstream,
            grad_loss,
            z,
            codes.contiguous(),
            codebook,
            out,
            count,
            inner,
            *g_strides,
            *z_strides,
            *out_strides,
            codebook.shape[1],
            2 * commitment_weight / z.numel(),
            UNIFORM=uniform(shape["BM"], count, inner, g_strides, z_strides, out_strides),
            THROUGH=grad_z_q is not None,
            BD=padded,
            **shape,
        )
    return grad_z if out is grad_z else grad_z.copy_(out)


torch.library.register_fake(
    vector_quantize_backward, lambda grad_z_q, grad_loss, z, *_: torch.empty_like(z)
)


@kernel_op("ema_update_triton", mutates=("codebook", "cluster_size", "code_sums_ema"))
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sums_ema: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    laplace_eps: float,
    restart_below: float,
    restart_vectors: Tensor | None,
) -> None:
    """Move the codebook towards the mean of its latents, in place (Eq. 3-4)."""
    num_codes, width = codebook.shape
    padded = block_width(width)
    state = [t.contiguous() for t in (codebook, cluster_size, code_sums_ema)]
    total = cluster_size  # read before it changes, and only for the smoothing
    if laplace_eps > 0:
        total = decay * cluster_size.sum() + (1 - decay) * counts.sum()
    fresh = sums if restart_vectors is None else restart_vectors.to(codebook.dtype)
    with torch.cuda.device_of(codebook):
        triton_outputs.move_codebook[(triton.cdiv(num_codes, moved_codes(padded)),)](
            *state,
            counts.contiguous(),
            sums.contiguous(),
            fresh.contiguous(),
            total,
            num_codes,
            width,
            decay,
            1 - decay,
            laplace_eps,
            restart_below,
            max(1.0, restart_below),
            LAPLACE=laplace_eps > 0,
            RESTART=restart_vectors is not None,
            BK=moved_codes(padded),
            BD=padded,
        )
    for target, moved in zip((codebook, cluster_size, code_sums_ema), state, strict=True):
        if moved is not target:
            target.copy_(moved)


torch.library.register_fake(ema_update_, lambda *_: None)
