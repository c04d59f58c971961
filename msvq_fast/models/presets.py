"""Configurations of both models and one preset per row of the paper's tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msvq_fast.nn import GRADIENTS
from msvq_fast.ops.checks import InputError, check_choice, check_decay, check_not_negative
from msvq_fast.ops.gaussian_blur.op import SIGMA_RULES

_MOST_PIXELS = 2**16  # of a side, beyond any image that can be read


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """What MS-VQVAE and VQ-VAE 2 have in common.

    Attributes:
        resolution: Pixels of a training image's side; it fixes depth and blur, and images of any
            multiple of the model's stride may be passed later.
        latents: Side of every latent grid at ``resolution``, coarse to fine, each double the last.
        num_codes: K, codes of every codebook.
        code_dim: D, width of a code.
        width: Channels of the encoder's feature maps and of VQ-VAE 2's decoder; of MS-VQVAE's
            decoders next to the image, doubled by every block towards the latents.
        num_residual_blocks: Residual blocks of the encoder's scales and of every decoder block.
        commitment_weight: β of Eq. 6.
        decay: γ of Eq. 4.
        codebook_init: ``"uniform"`` is U(-1/K, 1/K); ``"kmeans"`` asks the trainer to call
            `Autoencoder.initialise_codebooks` on a batch; ours does on the first micro-batch of
            the first process.
        restart_below: A code whose mass falls below restarts at a latent of the last batch; 0
            never does, as the paper's.
        gradient: ``"straight-through"`` (the paper's) or ``"rotation"``, see `VectorQuantizer`.
    """

    resolution: int
    latents: tuple[int, ...]
    num_codes: int
    code_dim: int = 64
    width: int = 128
    num_residual_blocks: int = 2
    commitment_weight: float = 0.25
    decay: float = 0.99
    codebook_init: str = "uniform"
    restart_below: float = 0.0
    gradient: str = "straight-through"

    def __post_init__(self) -> None:
        """Check the values and turn lists read from JSON into tuples."""
        if not isinstance(self.latents, Sequence) or isinstance(self.latents, str):
            raise InputError(f"latents={self.latents!r}; expected the sizes of all scales")
        object.__setattr__(self, "latents", tuple(self.latents))
        for name in ("resolution", "num_codes", "code_dim", "width", "num_residual_blocks"):
            if not _is_count(getattr(self, name)):  # nor NumPy's: JSON has none
                raise InputError(f"{name}={getattr(self, name)!r}; expected an int of at least 1")
        if self.resolution > _MOST_PIXELS:
            raise InputError(f"resolution={self.resolution}; expected at most {_MOST_PIXELS}")
        if self.width < 2:
            raise InputError(f"width={self.width}; expected at least 2: residual blocks halve it")
        check_decay(self.decay)
        check_choice("codebook_init", self.codebook_init, ("uniform", "kmeans"))
        check_choice("gradient", self.gradient, GRADIENTS)
        check_not_negative(
            commitment_weight=self.commitment_weight, restart_below=self.restart_below
        )
        if not self.latents or not all(_is_count(size) for size in self.latents):
            raise InputError(f"latents={self.latents}; expected at least one positive size")
        if any(2 * a != b for a, b in zip(self.latents, self.latents[1:], strict=False)):
            raise InputError(f"latents={self.latents}; each must be double the one before")
        for size in self.latents:
            factor = self.resolution // size
            if factor < 2 or factor * size != self.resolution or factor & (factor - 1):
                raise InputError(
                    f"latents={self.latents}; resolution {self.resolution} must be each of them "
                    "times a power of two, at least 2"
                )

    @property
    def num_scales(self) -> int:
        """M, the number of latent grids."""
        return len(self.latents)

    @property
    def halvings(self) -> tuple[int, ...]:
        """Halvings from the image to every grid, coarse to fine."""
        return tuple((self.resolution // size).bit_length() - 1 for size in self.latents)

    @property
    def stride(self) -> int:
        """Pixels per cell of the coarsest grid: image sides must be multiples of it."""
        return self.resolution // self.latents[0]


@dataclass(frozen=True)
class MSVQVAEConfig(AutoencoderConfig):
    """Configuration of `MSVQVAE`.

    Attributes:
        block_factor: Up-sampling of a decoder block: 4 at 1024 and 128 px, 2 at 256 px.
        kernel_size: Blur taps of the targets (Eq. 7); None takes √resolution - 1 made odd.
        sigma_rule: ``"paper"`` is Eq. 8 as printed, ``"opencv"`` has 0.3 in place of 1/3.
    """

    block_factor: int = 4
    kernel_size: int | None = None
    sigma_rule: str = "paper"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_choice("block_factor", self.block_factor, (2, 4))
        if self.kernel_size is not None and not (
            _is_count(self.kernel_size)
            and self.kernel_size % 2 == 1
            and self.kernel_size < 2 * self.resolution
        ):
            raise InputError(
                f"kernel_size={self.kernel_size!r}; expected an odd int of 1 to "
                f"{2 * self.resolution - 1}, which reaches across the image"
            )
        check_choice("sigma_rule", self.sigma_rule, SIGMA_RULES)


@dataclass(frozen=True)
class VQVAE2Config(AutoencoderConfig):
    """Configuration of `VQVAE2`."""


# name: resolution, latents, K, block factor
_ROWS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "celebahq1024-s": (1024, (32, 64, 128), 256, 4),
    "celebahq1024-m": (1024, (16, 32, 64), 256, 4),
    "celebahq1024-l": (1024, (8, 16, 32), 256, 4),
    "imagenet256-s": (256, (32, 64), 512, 2),
    "imagenet256-l": (256, (16, 32), 1024, 2),
    "ffhq128": (128, (4, 8), 512, 4),
}

# For tests and the demo: minutes on a laptop, with the remedies that the paper does without.
_TINY: dict[str, Any] = {
    "code_dim": 32,
    "width": 32,
    "codebook_init": "kmeans",
    "restart_below": 0.05,
}

PRESETS: dict[str, MSVQVAEConfig | VQVAE2Config] = {
    **{
        name: MSVQVAEConfig(resolution, latents, codes, block_factor=factor)
        for name, (resolution, latents, codes, factor) in _ROWS.items()
    },
    **{
        f"vqvae2-{name}": VQVAE2Config(resolution, latents, codes)
        for name, (resolution, latents, codes, _) in _ROWS.items()
    },
    "tiny": MSVQVAEConfig(64, (8, 16), 128, block_factor=2, **_TINY),
    "vqvae2-tiny": VQVAE2Config(64, (8, 16), 128, **_TINY),
}

# Millions of parameters as the paper prints them (Tables 1 and 2). For FFHQ the paper prints only
# sums with the transformers (Table 4); taking 13.32 M for its MaskGIT pair leaves these.
PAPER_PARAMETERS: dict[str, float] = {
    "celebahq1024-s": 13.5,
    "celebahq1024-m": 25.3,
    "celebahq1024-l": 54.3,
    "imagenet256-s": 9.4,
    "imagenet256-l": 37.4,
    "ffhq128": 8.88,
    "vqvae2-celebahq1024-s": 2.1,
    "vqvae2-celebahq1024-m": 2.2,
    "vqvae2-celebahq1024-l": 2.2,
    "vqvae2-imagenet256-s": 1.3,
    "vqvae2-imagenet256-l": 1.4,
    "vqvae2-ffhq128": 1.38,
}


def preset_config(name: str, **overrides: Any) -> MSVQVAEConfig | VQVAE2Config:
    """The configuration of a preset with some fields replaced.

    Args:
        name: A key of ``PRESETS``.
        **overrides: Fields of its configuration.

    Raises:
        InputError: For an unknown preset or field, or a bad value.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    fields = [field.name for field in dataclasses.fields(config)]
    for field in overrides:
        if field not in fields:
            raise InputError(f"{field!r} is not a field of {name}; expected one of {fields}")
    return dataclasses.replace(config, **overrides)
