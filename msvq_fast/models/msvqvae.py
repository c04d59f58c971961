"""MS-VQVAE: one encoder, one codebook and one decoder per scale (§3.2, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msvq_fast.models.autoencoder import Autoencoder, MSVQVAEOutput
from msvq_fast.models.checks import check_hierarchy
from msvq_fast.models.presets import MSVQVAEConfig
from msvq_fast.nn.blocks import Chain, Encoder, conv, residual_stack, upsample
from msvq_fast.ops import default_kernel_size, multiscale_loss


class MSVQVAE(Autoencoder):
    """Hierarchical autoencoder whose image is a sum of one contribution per scale.

    ``x̂_m = Σ_{i<=m} C_i`` is trained towards ``x`` blurred ``M - 1 - m`` times (Eq. 5-7). Between
    the two steps of decoder m its features z_d,m join the encoder's at scale m + 1 before they are
    quantized.

    Args:
        config: Sizes and settings, see `MSVQVAEConfig`.
        backend: None picks the fastest kernels; ``"reference"`` is plain PyTorch with the same
            state_dict and the same results.
        memory: What a training step keeps, see `set_memory`.

    Example:
        >>> model = MSVQVAE.from_preset("tiny")
        >>> out = model(torch.rand(2, 3, 64, 64) * 2 - 1)
        >>> [tuple(c.shape) for c in out.codes]
        [(2, 8, 8), (2, 16, 16)]
    """

    config_class = MSVQVAEConfig
    config: MSVQVAEConfig

    def __init__(
        self, config: MSVQVAEConfig, *, backend: str | None = None, memory: str = "default"
    ) -> None:
        super().__init__(config, backend=backend, memory=memory)
        halvings, last = config.halvings, config.num_scales - 1
        self.encoder = Encoder(
            halvings[last], config.num_scales, config.width, config.num_residual_blocks
        )
        # Widest block of decoder m; its features z_d,m have half of that.
        top = [block_widths(n, config)[0] for n in halvings]
        self._build_quantizers([0, *(width // 2 for width in top[:last])])
        self.step_one = nn.ModuleList(
            Chain(
                conv(config.code_dim, width, 3),
                *residual_stack(width, 1),
                upsample(width, width // 2),
            )
            for width in top[:last]
        )
        chains = [
            decoder_chain(width // 2, n - 1, config)
            for width, n in zip(top[:last], halvings[:last], strict=True)
        ]
        self.step_two = nn.ModuleList(
            [*chains, decoder_chain(config.code_dim, halvings[last], config)]
        )
        self._choose_layers()

    def forward(self, x: Tensor) -> MSVQVAEOutput:
        """Encode, quantize, decode and compare images ``(B, 3, H, W)`` in [-1, 1] (Eq. 6).

        In training mode the codebooks move, see `defer_codebook_updates`.

        Raises:
            InputError: For a wrong shape, dtype, device or range.
        """
        self._check_image(x)
        contributions, quantized = [], []
        z_d = None
        for m, feature in enumerate(self._features(x)):
            quantized.append(self._quantizer(m)(self._latent(m, feature, z_d)))
            contribution, z_d = self._decode_scale(m, quantized[m].z_q)
            contributions.append(contribution)
        config = self.config
        loss, per_scale = multiscale_loss(
            contributions,
            x,
            kernel_size=config.kernel_size or default_kernel_size(config.resolution),
            sigma_rule=config.sigma_rule,
            backend=self.backend,
        )
        commitment = torch.stack([q.commitment_loss for q in quantized])  # (M,)
        return MSVQVAEOutput(
            loss=loss + commitment.sum(),
            reconstruction_loss=per_scale,
            commitment_loss=commitment,
            contributions=contributions,
            codes=[q.codes for q in quantized],
            code_counts=[q.code_counts for q in quantized],
        )

    def contributions(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Contributions C_m ``(B, 3, H, W)`` of the given grids, coarse to fine.

        Args:
            codes: One to M grids ``(B, h_m, w_m)`` int64, coarse to fine; later scales need not
                exist yet, so a coarse image can be judged before its details are drawn.
        """
        check_hierarchy(codes, self.num_scales, whole=False)
        return [self._decode_scale(m, self._lookup(m, c))[0] for m, c in enumerate(codes)]

    def _condition(self, m: int, z_q: Tensor) -> Tensor | None:
        return self.step_one[m](z_q) if m < self.num_scales - 1 else None

    def _decode_scale(self, m: int, z_q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Contribution C_m ``(B, 3, H, W)`` and z_d,m, which the finest scale does not have."""
        z_d = self._condition(m, z_q)
        return self._replayed(self.step_two[m], z_q if z_d is None else z_d), z_d


def block_factors(doublings: int, factor: int) -> list[int]:
    """Up-sampling of every block, latent side first; of x4 blocks an odd doubling goes first."""
    if factor == 2:
        return [2] * doublings
    return [2] * (doublings % 2) + [4] * (doublings // 2)


def block_widths(doublings: int, config: MSVQVAEConfig) -> list[int]:
    """Channels of every block: ``width`` next to the image, doubled per block latent-ward."""
    blocks = len(block_factors(doublings, config.block_factor))
    return [config.width << (blocks - 1 - j) for j in range(blocks)]


def decoder_chain(in_channels: int, doublings: int, config: MSVQVAEConfig) -> Chain:
    """Blocks from ``(B, in_channels, h, w)`` to an image ``doublings`` times as large."""
    if doublings == 0:  # z_d is as large as the image already
        return Chain(conv(in_channels, 3, 3))
    factors = block_factors(doublings, config.block_factor)
    layers: list[nn.Module] = []
    for j, (factor, width) in enumerate(zip(factors, block_widths(doublings, config), strict=True)):
        out = 3 if j == len(factors) - 1 else width
        layers += [conv(in_channels, width, 3), *residual_stack(width, config.num_residual_blocks)]
        if factor == 4:
            layers += [upsample(width, width // 2), nn.ReLU(), upsample(width // 2, out)]
        else:
            layers += [upsample(width, out)]
        in_channels = out
    return Chain(*layers)
