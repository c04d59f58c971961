"""The multi-scale reconstruction loss of Eq. 5-7."""

from msvq_fast.ops.multiscale_loss.op import multiscale_loss

__all__ = ["multiscale_loss"]
