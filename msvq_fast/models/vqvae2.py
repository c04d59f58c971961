"""VQ-VAE 2, the paper's baseline, in the same blocks: all grids go through one decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvq_fast.models.autoencoder import Autoencoder, MSVQVAEOutput
from msvq_fast.models.checks import check_hierarchy
from msvq_fast.models.presets import VQVAE2Config
from msvq_fast.nn.blocks import Chain, Encoder, conv, encoder_widths, residual_stack, upsample
from msvq_fast.ops import multiscale_loss


class VQVAE2(Autoencoder):
    """Hierarchical autoencoder whose grids are up-sampled, concatenated and decoded together.

    The same interface as `MSVQVAE`, with one contribution: the reconstruction itself.

    Args:
        config: Sizes and settings, see `VQVAE2Config`.
        backend: None picks the fastest kernels; ``"reference"`` is plain PyTorch with the same
            state_dict and the same results.
        memory: What a training step keeps, see `set_memory`.
    """

    config_class = VQVAE2Config
    config: VQVAE2Config

    def __init__(
        self, config: VQVAE2Config, *, backend: str | None = None, memory: str = "default"
    ) -> None:
        super().__init__(config, backend=backend, memory=memory)
        stages, scales, width = config.halvings[-1], config.num_scales, config.width
        self.encoder = Encoder(stages, scales, width, config.num_residual_blocks)
        self._build_quantizers([0] + [width] * (scales - 1))

        def body(channels: int) -> list[nn.Module]:
            return [conv(channels, width, 1), *residual_stack(width, config.num_residual_blocks)]

        self.conditional = nn.ModuleList(
            Chain(*body(config.code_dim), upsample(width, width)) for _ in range(scales - 1)
        )
        layers = body(config.code_dim * scales)
        widths = encoder_widths(stages, width)[::-1]
        for j, channels in enumerate(widths):
            last = j == stages - 1
            layers += [upsample(channels, 3 if last else widths[j + 1])]
            layers += [] if last else [nn.ReLU()]
        self.decoder = Chain(*layers)
        self._choose_layers()

    def forward(self, x: Tensor) -> MSVQVAEOutput:
        """Encode, quantize, decode and compare images ``(B, 3, H, W)`` in [-1, 1] (Eq. 2).

        In training mode the codebooks move, see `defer_codebook_updates`.

        Raises:
            InputError: For a wrong shape, dtype, device or range.
        """
        self._check_image(x)
        quantized = []
        z_d = None
        for m, feature in enumerate(self._features(x)):
            quantized.append(self._quantizer(m)(self._latent(m, feature, z_d)))
            z_d = self._condition(m, quantized[m].z_q)
        reconstruction = self._decode([q.z_q for q in quantized])
        loss, per_scale = multiscale_loss([reconstruction], x, backend=self.backend)
        commitment = torch.stack([q.commitment_loss for q in quantized])  # (M,)
        return MSVQVAEOutput(
            loss=loss + commitment.sum(),
            reconstruction_loss=per_scale,
            commitment_loss=commitment,
            contributions=[reconstruction],
            codes=[q.codes for q in quantized],
            code_counts=[q.code_counts for q in quantized],
        )

    def contributions(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The one image ``(B, 3, H, W)`` that all M grids ``(B, h_m, w_m)`` stand for."""
        check_hierarchy(codes, self.num_scales, whole=True)
        return [self._decode([self._lookup(m, c) for m, c in enumerate(codes)])]

    def _condition(self, m: int, z_q: Tensor) -> Tensor | None:
        return self.conditional[m](z_q) if m < self.num_scales - 1 else None

    def _decode(self, z_q: list[Tensor]) -> Tensor:
        size = z_q[-1].shape[-2:]
        grids = [F.interpolate(z, size=size, mode="nearest") for z in z_q]
        return self._replayed(self.decoder, torch.cat(grids, 1))
