"""The patch discriminator of Isola et al. 2017, as VQGAN uses it, and its losses."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.ops.checks import InputError

_MOST_HALVINGS = 3
_GROUPS = 32
_DELTA = 1e-4  # δ of `adaptive_weight`
_LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """4x4 convolutions that judge overlapping patches of an image, one number each.

    Features are normalised in groups of channels of one image, where the original has batches: a
    verdict then depends neither on the other images nor on how processes share them.

    Args:
        size: Side of the images in pixels, at least 8; below 64 there are fewer than 3 halvings.
        width: Channels after the first convolution, doubled by every one that follows; a multiple
            of 16.
    """

    def __init__(self, size: int, *, width: int = 64) -> None:
        super().__init__()
        if size < 8:
            raise InputError(f"size={size}; a patch discriminator takes at least 8 pixels")
        if width < 16 or width % 16:
            raise InputError(f"width={width}; expected a multiple of 16")
        halvings = min(_MOST_HALVINGS, max(1, size.bit_length() - 4))
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for j in range(halvings):
            stride = 1 if j == halvings - 1 else 2
            layers += [
                nn.Conv2d(width << j, width << (j + 1), 4, stride, 1, bias=False),
                nn.GroupNorm(_GROUPS, width << (j + 1)),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width << halvings, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Verdicts ``(B, 1, h, w)`` on images ``(B, 3, H, W)``; high means photographed."""
        return self.layers(x)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean relu(1 - real) + mean relu(1 + fake)) / 2``: what the discriminator minimises."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def adaptive_weight(grad_reconstruction: Tensor, grad_adversarial: Tensor) -> Tensor:
    """``λ = |∇L_rec| / (|∇L_GAN| + δ)``, at most 1e4 (Esser et al. 2021, Eq. 7).

    Args:
        grad_reconstruction: Gradient of the reconstruction loss by the decoder's last layer.
        grad_adversarial: Gradient of ``-mean D`` by the same.

    Returns:
        ``()`` float32, a constant: no gradient flows through it.
    """
    norms = [g.detach().float().norm() for g in (grad_reconstruction, grad_adversarial)]
    return (norms[0] / (norms[1] + _DELTA)).clamp_max(_LARGEST_WEIGHT)
