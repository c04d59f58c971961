"""The quantizer of VQ-VAE as a module: a codebook that follows its latents (Eq. 1-4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.nn.rotation import rotate_to
from msvq_fast.ops.checks import (
    InputError,
    accumulation_dtype,
    check_choice,
    check_count,
    check_decay,
    check_not_negative,
    may_read,
)
from msvq_fast.ops.vector_quantize import (
    VectorQuantizeOutput,
    ema_update_,
    nearest_code,
    vector_quantize,
)
from msvq_fast.ops.vector_quantize.op import check_latents

GRADIENTS = ("straight-through", "rotation")


class VectorQuantizer(nn.Module):
    """Replace every latent by its nearest code; learn the codebook as a moving average.

    The codebook is a buffer, not a parameter: in training mode every forward moves it by Eq. 3-4
    (the values returned are of the codebook before the move). It starts as U(-1/K, 1/K) with no
    mass, so that the first latents a code wins become its vector; a code that wins none keeps it.

    As with batch normalisation, `torch.utils.checkpoint` around a training forward is wrong: run
    again in the backward it counts its latents twice, and finds codes in the codebook that has
    moved. The models' ``set_memory`` keeps the quantizers out of what it runs again. A step that a
    gradient scaler skips has moved the codebook too.

    With several processes, each would move its codebook by its own latents alone, and
    DistributedDataParallel would hand out that of the first. Set ``defer_updates``, and in every
    step exchange what `code_statistics` gives before `update_codebook`.

    To freeze a codebook is ``quantizer.eval()``, after every ``train()`` of the model around it:
    ``requires_grad_(False)`` and ``torch.no_grad()`` do not keep a buffer from moving.

    Args:
        num_codes: K, the number of codes.
        code_dim: D, the width of a code.
        dim: Where the latents hold their D values: 1 for ``(B, D, h, w)``, -1 for ``(..., D)``.
        commitment_weight: β of Eq. 2.
        decay: γ of Eq. 4, in [0, 1).
        laplace_eps: Laplace smoothing of the masses as VQ-VAE 2's code has it; 0 is Eq. 3.
        restart_below: A code whose mass is below restarts at a latent of the batch, with mass
            ``max(1, restart_below)``; 0 never does (the paper). Since codes start without mass,
            the first batch restarts all that win fewer than ``restart_below / (1 - γ)`` latents.
            Where updates are deferred the latents are those of the last batch alone.
        gradient: ``"straight-through"`` gives z the gradient of z_q (the paper), ``"rotation"``
            turns it as `rotate_to` says; the commitment loss's own gradient is the same in both.
        backend: None picks; otherwise as in `vector_quantize`.

    Buffers (float32 whatever the module is cast to, unless float64):
        codebook: ``(K, D)``.
        cluster_size: ``(K,)``, the mass N_i.
        code_sums: ``(K, D)``, the sums m_i.
    """

    codebook: Tensor
    cluster_size: Tensor
    code_sums: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        dim: int = 1,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        laplace_eps: float = 0.0,
        restart_below: float = 0.0,
        gradient: str = GRADIENTS[0],
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_count(num_codes=num_codes, code_dim=code_dim)
        check_decay(decay)
        check_not_negative(
            commitment_weight=commitment_weight,
            laplace_eps=laplace_eps,
            restart_below=restart_below,
        )
        check_choice("gradient", gradient, GRADIENTS)
        self.dim = dim
        self.commitment_weight = commitment_weight
        self.decay = decay
        self.laplace_eps = laplace_eps
        self.restart_below = restart_below
        self.gradient = gradient
        self.backend = backend
        self.defer_updates = False
        self._pending: tuple[Tensor, ...] | None = None
        bound = 1 / num_codes
        dtype = accumulation_dtype(torch.get_default_dtype())
        start = torch.empty(num_codes, code_dim, dtype=dtype).uniform_(-bound, bound)
        self.register_buffer("codebook", start)
        self.register_buffer("cluster_size", torch.zeros(num_codes, dtype=dtype))
        self.register_buffer("code_sums", torch.zeros(num_codes, code_dim, dtype=dtype))

    def forward(self, z: Tensor) -> VectorQuantizeOutput:
        """Quantize latents.

        Args:
            z: Latents with D values at ``dim``, e.g. ``(B, D, h, w)``.

        Returns:
            ``z_q`` (shape, dtype and layout of ``z``, gradient as chosen), ``codes`` int64
            (``z``'s shape without ``dim``), ``commitment_loss`` ``()``, ``code_counts`` int64
            ``(K,)`` and ``code_sums`` ``(K, D)`` of this batch.
        """
        out = vector_quantize(
            z,
            self.codebook,
            dim=self.dim,
            commitment_weight=self.commitment_weight,
            backend=self.backend,
        )
        if self.gradient == "rotation":
            # Neither _replace nor a slice: torch.compile of PyTorch 2.8 traces neither.
            z_q, *others = out
            out = VectorQuantizeOutput(rotate_to(z, z_q, dim=self.dim), *others)
        if self.training:
            self._collect(out.code_counts, out.code_sums, z)
            if not self.defer_updates:
                self.update_codebook()
        return out

    def encode(self, z: Tensor) -> Tensor:
        """Nearest code of every latent: int64, ``z``'s shape without ``dim``."""
        return nearest_code(z, self.codebook, dim=self.dim, backend=self.backend)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of ``codes`` ``(...)`` int64 in [0, K), with D values placed at ``dim``."""
        if codes.dtype != torch.int64:
            raise InputError(f"codes has dtype {codes.dtype}; expected int64")
        num_codes = self.codebook.shape[0]
        if may_read(codes):
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= num_codes:
                raise InputError(f"codes span [{low}, {high}]; expected 0 <= code < {num_codes}")
        # Contiguous, as `forward` has it: a convolution of another layout rounds otherwise.
        return F.embedding(codes, self.codebook).movedim(-1, self.dim).contiguous()

    @torch.no_grad()
    def initialise(self, z: Tensor, *, iterations: int = 10) -> None:
        """Start the codebook as k-means of the latents ``z`` instead of at random.

        The first centres are latents evenly spaced over the batch, so that no random number is
        drawn; a centre that wins none moves to the latent farthest from its own centre. A code
        has no mass then, so that the latents it wins next become its vector; with
        ``restart_below`` it has that of a restarted one, or it would restart at once.

        Args:
            z: Latents as in `forward`, at least one of them finite; the others are left out.
            iterations: Steps of Lloyd's algorithm.
        """
        dim = check_latents(z, self.codebook, self.dim)
        rows = z.detach().movedim(dim, -1).reshape(-1, self.codebook.shape[1])
        rows = rows[rows.isfinite().all(dim=1)].to(self.codebook.dtype)
        if len(rows) == 0:
            raise InputError(f"z has shape {tuple(z.shape)}; expected at least one finite latent")
        self.codebook.copy_(self._spread(rows))
        for _ in range(iterations):
            out = vector_quantize(rows, self.codebook, backend=self.backend)
            means = out.code_sums / out.code_counts.clamp_min(1)[:, None]
            empty = out.code_counts == 0
            distance = (rows - self.codebook[out.codes]).square().sum(1)
            order = distance.argsort(descending=True, stable=True)
            rank = (empty.cumsum(0) - 1).clamp(0, len(rows) - 1)  # i-th empty code, i-th farthest
            self.codebook.copy_(torch.where(empty[:, None], rows[order[rank]], means))
        mass = max(1.0, self.restart_below) if self.restart_below > 0 else 0.0
        self.cluster_size.fill_(mass)
        self.code_sums.copy_(self.codebook * mass)
        self._pending = None  # statistics of another codebook

    def code_statistics(self) -> tuple[Tensor, ...]:
        """Statistics collected since the last update, for processes to exchange in place.

        Counts ``(K,)`` int64 and sums ``(K, D)``, to be summed over the processes. With
        ``restart_below`` also vectors ``(K, D)`` at which codes would restart: latents, so not to
        be summed but to be those of one process, as by a broadcast. A training forward with
        ``defer_updates`` adds to the first two, which are zero before, and replaces the third.
        """
        if self._pending is None:
            counts = torch.zeros_like(self.cluster_size, dtype=torch.int64)
            self._pending = counts, torch.zeros_like(self.code_sums)
            if self.restart_below > 0:  # NaN restarts nothing
                self._pending = *self._pending, torch.full_like(self.code_sums, torch.nan)
        return self._pending

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Move the codebook by the collected statistics (Eq. 3-4) and forget them."""
        counts, sums, *restart = self.code_statistics()
        self._pending = None
        ema_update_(
            self.codebook,
            self.cluster_size,
            self.code_sums,
            counts,
            sums,
            decay=self.decay,
            laplace_eps=self.laplace_eps,
            restart_below=self.restart_below,
            restart_vectors=restart[0] if restart else None,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Sizes and settings, as the constructor takes them."""
        num_codes, code_dim = self.codebook.shape
        settings = ("dim", "commitment_weight", "decay", "laplace_eps", "restart_below")
        names = (*settings, "gradient", "backend")
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join((str(num_codes), str(code_dim), *shown))

    def _collect(self, counts: Tensor, sums: Tensor, z: Tensor) -> None:
        before = self._pending
        if before is not None and before[0].shape != counts.shape:
            raise InputError(
                f"codebook has {len(counts)} codes, but statistics of {len(before[0])} wait; "
                "expected update_codebook before another codebook"
            )
        if before is not None:
            counts, sums = before[0] + counts, before[1] + sums
        elif self.defer_updates:  # what `forward` returns is the caller's
            counts, sums = counts.clone(), sums.clone()
        self._pending = counts, sums
        if self.restart_below > 0:
            if z.numel():
                rows = z.detach().movedim(self.dim, -1).reshape(-1, sums.shape[1])
                fresh = self._spread(rows).to(sums.dtype)
            else:
                fresh = torch.full_like(sums, torch.nan) if before is None else before[2]
            self._pending = counts, sums, fresh

    def _spread(self, rows: Tensor) -> Tensor:
        """K of the ``rows`` ``(N, D)``, evenly spaced: a choice without random numbers."""
        num_codes = self.codebook.shape[0]
        steps = torch.arange(num_codes, device=rows.device)
        return rows[(2 * steps + 1) * rows.shape[0] // (2 * num_codes)]  # (K, D)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the module, but never round the codebook to half precision.

        A rounded codebook changes codes, and a bfloat16 moving average of γ = 0.99 stands still.
        """
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device)
        if self._pending is not None:
            counts, *vectors = self._pending
            moved = [tensor.to(self.codebook) for tensor in vectors]
            self._pending = counts.to(self.codebook.device), *moved
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, buffer in self._buffers.items():  # ``assign=True`` takes them as they are
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.float()
        self._pending = None  # statistics of another codebook
