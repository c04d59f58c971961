"""The blur pyramid and the multi-scale loss as modules: thin holders of their settings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from msvq_fast.ops import gaussian_pyramid, multiscale_loss


class GaussianPyramid(nn.Module):
    """Targets of every scale: ``x`` blurred again and again at full resolution (Eq. 7-8).

    Args:
        num_scales: M >= 1.
        kernel_size: Odd number of taps; None takes √r - 1 made odd of each input.
        sigma: Pixels; None takes ``sigma_rule``.
        sigma_rule: ``"paper"`` or ``"opencv"``.
        border: As in `msvq_fast.ops.gaussian_blur`.
        backend: As in `msvq_fast.ops.gaussian_blur`.
    """

    def __init__(
        self,
        num_scales: int,
        *,
        kernel_size: int | None = None,
        sigma: float | None = None,
        sigma_rule: str = "paper",
        border: str = "reflect",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_scales = num_scales
        self.kernel_size = kernel_size
        self.sigma = sigma
        self.sigma_rule = sigma_rule
        self.border = border
        self.backend = backend

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``(B, C, H, W)`` to M images of that shape, coarsest first."""
        return gaussian_pyramid(
            x,
            self.num_scales,
            kernel_size=self.kernel_size,
            sigma=self.sigma,
            sigma_rule=self.sigma_rule,
            border=self.border,
            backend=self.backend,
        )


class MultiScaleLoss(nn.Module):
    """Reconstruction loss of Eq. 6; arguments as `msvq_fast.ops.multiscale_loss`."""

    def __init__(
        self,
        *,
        kernel_size: int | None = None,
        sigma: float | None = None,
        sigma_rule: str = "paper",
        weights: Sequence[float] | None = None,
        reduction: str = "mean",
        border: str = "reflect",
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.sigma = sigma
        self.sigma_rule = sigma_rule
        self.weights = weights
        self.reduction = reduction
        self.border = border
        self.recompute = recompute
        self.backend = backend

    def forward(self, contributions: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``()`` and its unweighted terms ``(M,)`` for images ``(B, C, H, W)``."""
        return multiscale_loss(
            contributions,
            x,
            kernel_size=self.kernel_size,
            sigma=self.sigma,
            sigma_rule=self.sigma_rule,
            weights=self.weights,
            reduction=self.reduction,
            border=self.border,
            recompute=self.recompute,
            backend=self.backend,
        )
