"""Vector quantization (Eq. 1-4): contracts, checks, choice of kernel, gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msvq_fast.ops.backend import Op
from msvq_fast.ops.checks import (
    InputError,
    check_decay,
    check_float,
    check_not_negative,
    check_same_device,
    check_same_dtype,
)
from msvq_fast.ops.vector_quantize import reference

OP = Op(__package__)


class VectorQuantizeOutput(NamedTuple):
    """What `vector_quantize` returns."""

    z_q: Tensor
    codes: Tensor
    commitment_loss: Tensor
    code_counts: Tensor
    code_sums: Tensor


def nearest_code(
    z: Tensor, codebook: Tensor, *, dim: int = -1, backend: str | None = None
) -> Tensor:
    """Find the nearest code of every latent (Eq. 1), exactly.

    Args:
        z: Latents of any rank with D at ``dim``, float32, float64, bfloat16 or float16, any
            strides; ``(B, D, H, W)`` with ``dim=1`` is read in place.
        codebook: ``(K, D)`` codes, float32 or float64.
        dim: Where D is.
        backend: ``None`` picks; ``"reference"``, ``"triton"`` or ``"native"`` runs or raises
            (the last on CUDA tensors: a Hopper GPU, D = 64, K up to 1024; up to 65536 latents
            whose D values are apart in memory, as in NCHW, are copied, more are Triton's).

    Returns:
        int64 codes in [0, K): the shape of ``z`` without ``dim``.

    Gradient:
        None.

    Raises:
        InputError: For a wrong shape, dtype or device.

    Numerics:
        ``codes`` equals the argmin of the float64 squared distance of the exact inputs, summed in
        the order of d, lowest index on ties, on every backend and under autocast. A latent with
        NaN or Inf gets code 0; a code with NaN or Inf is never chosen while another is finite.
        No N x K tensor is made.
    """
    dim = check_latents(z, codebook, dim)
    chosen = OP.pick(z, codebook, dim, backend=backend)
    z, codebook = z.detach(), codebook.detach()
    if chosen == "reference":
        return reference.nearest_code(z, codebook, dim)
    return OP.kernels[chosen].nearest_code(z, codebook, dim)


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    dim: int = -1,
    commitment_weight: float = 0.25,
    backend: str | None = None,
) -> VectorQuantizeOutput:
    """Quantize latents to their nearest codes, with the loss and the statistics of Eq. 2-4.

    Args:
        z: Latents as in `nearest_code`.
        codebook: ``(K, D)`` codes, float32 or float64, learned by `ema_update_`.
        dim: Where D is.
        commitment_weight: β of Eq. 2, >= 0.
        backend: As in `nearest_code`.

    Returns:
        ``z_q``, the code of every latent in the dtype and memory format of ``z``; ``codes`` as
        `nearest_code`; ``commitment_loss`` ``()``, ``β mean((z - e)²)``; ``code_counts (K,)``
        int64 and ``code_sums (K, D)`` in the codebook's dtype, how many latents chose each code
        and their sum. An empty ``z`` has loss 0.

    Gradient:
        To ``z`` only: ``grad_z_q`` passes straight through, and the loss adds
        ``grad_loss 2β/numel(z) (z - e)``. The compiled backends are differentiable once. Kept for
        the backward: ``z``, ``codes`` and a copy of the codebook, since `ema_update_` changes it
        in place before the backward runs.

    Raises:
        InputError: As `nearest_code`, for a ``commitment_weight`` below 0, and if ``codebook``
            requires a gradient: it has none.

    Numerics:
        Loss and sums accumulate in float32 (float64 if ``z`` or ``codebook`` is), whatever
        autocast says, in an order that does not depend on the thread count. A latent with NaN or
        Inf gets code 0, makes the loss non-finite and is left out of counts and sums.
    """
    dim = check_latents(z, codebook, dim)
    if codebook.requires_grad:
        raise InputError(
            "codebook requires a gradient; expected a buffer: it is learned by ema_update_"
        )
    check_not_negative(commitment_weight=commitment_weight)
    chosen = OP.pick(z, codebook, dim, backend=backend)
    if chosen == "reference":
        out: tuple[Tensor, ...] = reference.vector_quantize(z, codebook, dim, commitment_weight)
    elif z.requires_grad and torch.is_grad_enabled():
        out = _VectorQuantize.apply(z, codebook, dim, commitment_weight, chosen)
    else:
        out = OP.kernels[chosen].vector_quantize(z, codebook, dim, commitment_weight)
    return VectorQuantizeOutput(*out)


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sums_ema: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float = 0.99,
    laplace_eps: float = 0.0,
    restart_below: float = 0.0,
    restart_vectors: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Move the codebook towards the mean of its latents (Eq. 3-4), in place.

    ``N ← γN + (1-γ)n``, ``m ← γm + (1-γ)Σz``, and ``e_i ← m_i/N_i`` for the codes hit in this
    step. A code that no latent chose keeps its vector bit for bit: ``m_i/N_i`` is unchanged in
    exact arithmetic, but computing it again drifts and ends in 0/0 once the mass has decayed away.

    Args:
        codebook: ``(K, D)`` float32 or float64, changed.
        cluster_size: ``(K,)`` moving counts N, changed.
        code_sums_ema: ``(K, D)`` moving sums m, changed.
        counts: ``(K,)`` int64 counts n of this step, of all ranks and micro-batches together.
        sums: ``(K, D)`` sums Σz of this step.
        decay: γ in [0, 1).
        laplace_eps: If > 0, divide by the smoothed ``(N + ε)/(ΣN + Kε) ΣN`` of VQ-VAE-2 code
            instead of N; the stored N stays unsmoothed.
        restart_below: If > 0, a code whose N falls below it restarts: its vector is its row of
            ``restart_vectors``, N becomes ``max(1, restart_below)`` and m that many vectors.
        restart_vectors: ``(K, D)``, needed with ``restart_below``; a non-finite row restarts
            nothing.
        backend: As in `nearest_code`.

    Raises:
        InputError: For a wrong shape, dtype, device or number.
    """
    _check_codebook(codebook)
    check_same_device(
        codebook=codebook,
        cluster_size=cluster_size,
        code_sums_ema=code_sums_ema,
        counts=counts,
        sums=sums,
    )
    check_same_dtype(
        codebook=codebook, cluster_size=cluster_size, code_sums_ema=code_sums_ema, sums=sums
    )
    if counts.dtype != torch.int64:
        raise InputError(f"counts has dtype {counts.dtype}; expected int64")
    _check_shape("cluster_size", cluster_size, tuple(codebook.shape[:1]))
    _check_shape("code_sums_ema", code_sums_ema, tuple(codebook.shape))
    _check_shape("counts", counts, tuple(codebook.shape[:1]))
    _check_shape("sums", sums, tuple(codebook.shape))
    check_decay(decay)
    check_not_negative(laplace_eps=laplace_eps, restart_below=restart_below)
    missing = restart_below > 0 and restart_vectors is None
    if missing or (restart_vectors is not None and not restart_below > 0):
        raise InputError(
            f"restart_below={restart_below} with restart_vectors "
            f"{'missing' if missing else 'given'}; expected both or neither"
        )
    if restart_vectors is not None:
        _check_shape("restart_vectors", restart_vectors, tuple(codebook.shape))
        check_same_device(codebook=codebook, restart_vectors=restart_vectors)
        restart_vectors = restart_vectors.detach()
    chosen = OP.pick(codebook, codebook, backend=backend)
    kernels: Any = reference if chosen == "reference" else OP.kernels[chosen]
    with torch.no_grad():
        kernels.ema_update_(
            codebook,
            cluster_size,
            code_sums_ema,
            counts,
            sums.detach(),
            decay,
            laplace_eps,
            restart_below,
            restart_vectors,
        )


def _check_codebook(codebook: Tensor) -> None:
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise InputError(f"codebook has shape {tuple(codebook.shape)}; expected (K, D), K, D >= 1")
    if codebook.dtype not in (torch.float32, torch.float64):
        raise InputError(f"codebook has dtype {codebook.dtype}; expected float32 or float64")


def check_latents(z: Tensor, codebook: Tensor, dim: int) -> int:
    """Check the pair and return ``dim`` counted from the front."""
    _check_codebook(codebook)
    check_float("z", z)
    check_same_device(z=z, codebook=codebook)
    if not -z.dim() <= dim < z.dim():
        raise InputError(f"dim={dim} is out of range for z of shape {tuple(z.shape)}")
    if z.shape[dim] != codebook.shape[1]:
        raise InputError(
            f"z has shape {tuple(z.shape)}, width {z.shape[dim]} at dim={dim}; "
            f"expected the codebook's D={codebook.shape[1]}"
        )
    return dim % z.dim()


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


class _VectorQuantize(torch.autograd.Function):
    """One kernel each way; the kernels have no derivative, so a second backward raises."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, codebook: Tensor, dim: int, commitment_weight: float, backend: str
    ) -> tuple[Tensor, ...]:
        codebook = reference.codebook_copy(codebook)
        out: tuple[Tensor, ...] = OP.kernels[backend].vector_quantize(
            z, codebook, dim, commitment_weight
        )
        z_q, codes, commitment_loss, counts, sums = out
        ctx.save_for_backward(z, codes, codebook)
        ctx.settings = (dim, commitment_weight, backend)
        ctx.mark_non_differentiable(codes, counts, sums)
        ctx.set_materialize_grads(False)
        return z_q, codes, commitment_loss, counts, sums

    @staticmethod
    def backward(
        ctx: Any, grad_z_q: Tensor | None, _: None, grad_loss: Tensor | None, *__: None
    ) -> tuple[Tensor | None, ...]:
        z, codes, codebook = ctx.saved_tensors
        dim, commitment_weight, backend = ctx.settings
        if grad_loss is None:
            return grad_z_q, None, None, None, None
        grad_z = _run_backward(
            ctx, backend, grad_z_q, grad_loss, z, codes, codebook, dim, commitment_weight
        )
        return grad_z, None, None, None, None


@once_differentiable
def _run_backward(_: Any, backend: str, *args: Any) -> Tensor:
    return OP.kernels[backend].vector_quantize_backward(*args)
