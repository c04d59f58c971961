"""The definition of vector quantization (Eq. 1-4) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops.backend import kernel_op
from msvq_fast.ops.checks import accumulation_dtype, is_in_onnx_export

_CHUNK_DISTANCES = 2**17  # float64 distances held at once: 1 MiB, never N x K


def work_dtype(z: Tensor, codebook: Tensor) -> torch.dtype:
    """The dtype of the loss and of the sums: float64 if either input is, else float32."""
    return torch.promote_types(accumulation_dtype(z.dtype), codebook.dtype)


def nearest_code(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Index of the nearest code of every latent (Eq. 1), lowest index on ties.

    The distance is ``acc = 0; for d in 0..D-1: acc = acc + (z_d - e_kd) * (z_d - e_kd)`` in
    float64 on the exact inputs, each operation rounded on its own: one well-defined number, so
    that every backend can return the same code. A code with NaN or Inf has distance inf; a latent
    with NaN or Inf gets code 0.
    """
    rows = z.movedim(dim, -1)
    flat = rows.reshape(-1, codebook.shape[1])
    if is_in_onnx_export():  # there the definition becomes the graph, D times unrolled
        return _nearest_of(flat, *_columns(codebook)).view(rows.shape[:-1])
    return _nearest_rows(flat, codebook).view(rows.shape[:-1])


# Opaque to torch.compile: a compiler may contract the multiply-add or unroll the loop over rows.
@kernel_op("nearest_code_reference")
def _nearest_rows(rows: Tensor, codebook: Tensor) -> Tensor:
    codes = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    columns, bad_codes = _columns(codebook)
    chunk = max(_CHUNK_DISTANCES // codebook.shape[0], 1)
    for start in range(0, rows.shape[0], chunk):
        codes[start : start + chunk] = _nearest_of(rows[start : start + chunk], columns, bad_codes)
    return codes


def _columns(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The codebook ``(D, K)`` in float64 and which codes are not finite, zeroed in it ``(K,)``."""
    bad_codes = ~codebook.isfinite().all(dim=1)
    return codebook.double().masked_fill(bad_codes[:, None], 0).t().contiguous(), bad_codes


def _nearest_of(rows: Tensor, columns: Tensor, bad_codes: Tensor) -> Tensor:
    """Codes ``(N,)`` of ``rows (N, D)``, with all N x K distances at once."""
    rows = rows.double()
    bad_rows = ~rows.isfinite().all(dim=1)
    rows = rows.masked_fill(bad_rows[:, None], 0)
    distance = rows.new_zeros(rows.shape[0], columns.shape[1])
    for d, column in enumerate(columns):
        difference = rows[:, d, None] - column
        distance += difference.mul_(difference)
    return distance.masked_fill_(bad_codes, torch.inf).argmin(dim=1).masked_fill_(bad_rows, 0)


torch.library.register_fake(
    _nearest_rows, lambda rows, _: rows.new_empty(rows.shape[0], dtype=torch.int64)
)


def vector_quantize(
    z: Tensor, codebook: Tensor, dim: int, commitment_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize ``z`` (Eq. 1-2): ``(z_q, codes, commitment_loss, code_counts, code_sums)``.

    ``z_q`` is the code in the dtype of ``z``; adding ``z - z.detach() = 0`` makes its gradient
    straight-through and leaves its value the code, bit for bit. Autograd differentiates it.
    """
    codes = nearest_code(z.detach(), codebook, dim)
    vectors = codebook_copy(codebook)[codes].movedim(-1, dim)
    work = work_dtype(z, codebook)
    difference = z.to(work) - vectors.to(work)
    commitment_loss = commitment_weight * difference.square().sum() / max(z.numel(), 1)
    z_q = torch.empty_like(z, requires_grad=False).copy_(vectors)
    z_q = z_q + (z - z.detach()).nan_to_num()
    counts, sums = code_statistics(z.detach(), codes, codebook, dim)
    return z_q, codes, commitment_loss, counts, sums


def codebook_copy(codebook: Tensor) -> Tensor:
    """A contiguous copy ``(K, D)`` that the backward reads, whatever becomes of the codebook.

    Forward and backward must both take the copy: only then does torch.compile keep it, and not
    copy the codebook again in the backward, after `ema_update_` has changed it in place.
    """
    if torch.compiler.is_compiling() and not is_in_onnx_export():
        return _opaque_copy(codebook)
    return codebook.clone(memory_format=torch.contiguous_format)


@kernel_op("codebook_copy")
def _opaque_copy(codebook: Tensor) -> Tensor:
    return codebook.clone(memory_format=torch.contiguous_format)


torch.library.register_fake(_opaque_copy, lambda codebook: codebook.new_empty(codebook.shape))


def code_statistics(z: Tensor, codes: Tensor, codebook: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Counts ``(K,)`` and sums ``(K, D)`` of the finite latents of every code."""
    num_codes, width = codebook.shape
    rows = z.movedim(dim, -1)
    finite = rows.isfinite().all(dim=-1)
    rows = rows.to(work_dtype(z, codebook)).masked_fill(~finite[..., None], 0).reshape(-1, width)
    index = codes.reshape(-1)
    counts = index.new_zeros(num_codes).index_add(0, index, finite.reshape(-1).long())
    sums = rows.new_zeros(num_codes, width)
    if z.is_cuda:  # index_add is atomic there; index_put sorts, so its order is fixed
        sums = sums.index_put((index,), rows, accumulate=True)
    else:
        sums = sums.index_add(0, index, rows)
    return counts, sums.to(codebook.dtype)


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
    """Move the codebook towards the mean of its latents, in place (Eq. 3-4).

    ``N_i <- γ N_i + (1 - γ) n_i``, ``m_i <- γ m_i + (1 - γ) Σz`` and ``e_i <- m_i / N_i`` for the
    codes hit in this step.
    """
    hit = counts > 0
    cluster_size.mul_(decay).add_(counts.to(cluster_size.dtype), alpha=1 - decay)
    code_sums_ema.mul_(decay).add_(sums, alpha=1 - decay)
    mass = cluster_size
    if laplace_eps > 0:
        total = cluster_size.sum()
        num_codes = codebook.shape[0]
        mass = (cluster_size + laplace_eps) / (total + num_codes * laplace_eps) * total
    torch.where(hit[:, None], code_sums_ema / mass[:, None], codebook, out=codebook)
    if restart_vectors is not None:
        fresh = restart_vectors.to(codebook.dtype)
        dead = (cluster_size < restart_below) & fresh.isfinite().all(dim=1)
        start_mass = max(1.0, restart_below)
        torch.where(dead[:, None], fresh, codebook, out=codebook)
        torch.where(dead[:, None], fresh * start_mass, code_sums_ema, out=code_sums_ema)
        cluster_size.masked_fill_(dead, start_mass)
