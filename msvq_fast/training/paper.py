"""What the paper reports (Serez et al. 2023, Tables 1 and 2), to stand beside what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msvq_fast.models import PAPER_PARAMETERS


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 1 or 2; per-scale figures coarse to fine.

    Attributes:
        parameters: Millions.
        usage: Percent of codes used, per scale; of Table 2 the text says 100 for all.
        perplexity: Per scale.
        mse: On images in [0, 1].
        ssim: Mean structural similarity.
        lpips: Its network is not stated.
        psnr: dB.
        rfid: Against the whole validation set.
        usage_mean: Over the scales, as printed, which two rows of Table 1 round down.
        perplexity_mean: Likewise.
    """

    parameters: float
    usage: tuple[float, ...]
    perplexity: tuple[float, ...]
    mse: float
    ssim: float
    lpips: float
    psnr: float
    rfid: float
    usage_mean: int
    perplexity_mean: int


# Of a row all but the parameters, in their order.
_FIGURES: dict[str, tuple[Any, ...]] = {
    "vqvae2-celebahq1024-l": ((100, 69, 18), (179, 146, 35), 2.35e-3, 0.75, 0.39, 26.28, 64.47),
    "celebahq1024-l": ((38, 76, 100), (88, 170, 163), 2.43e-3, 0.75, 0.38, 26.13, 65.05),
    "vqvae2-celebahq1024-m": ((100, 38, 7), (135, 81, 11), 1.30e-3, 0.80, 0.28, 28.85, 38.76),
    "celebahq1024-m": ((100, 100, 100), (222, 195, 121), 1.15e-3, 0.81, 0.25, 29.36, 38.38),
    "vqvae2-celebahq1024-s": ((100, 100, 35), (110, 194, 54), 0.60e-3, 0.88, 0.14, 32.18, 6.44),
    "celebahq1024-s": ((67, 72, 100), (142, 118, 109), 0.52e-3, 0.90, 0.13, 32.79, 6.98),
    "vqvae2-imagenet256-l": ((100, 100), (559, 699), 1.79e-3, 0.82, 0.195, 27.46, 22.17),
    "imagenet256-l": ((100, 100), (815, 599), 1.54e-3, 0.83, 0.164, 28.10, 18.00),
    "vqvae2-imagenet256-s": ((100, 100), (273, 380), 0.59e-3, 0.93, 0.058, 32.23, 5.39),
    "imagenet256-s": ((100, 100), (371, 262), 0.50e-3, 0.93, 0.046, 32.95, 4.49),
}
# Of a row the means of usage and perplexity.
_MEANS: dict[str, tuple[int, ...]] = {
    "vqvae2-celebahq1024-l": (62, 120),
    "celebahq1024-l": (71, 140),
    "vqvae2-celebahq1024-m": (48, 75),
    "celebahq1024-m": (100, 179),
    "vqvae2-celebahq1024-s": (78, 119),
    "celebahq1024-s": (79, 123),
    "vqvae2-imagenet256-l": (100, 629),
    "imagenet256-l": (100, 707),
    "vqvae2-imagenet256-s": (100, 327),
    "imagenet256-s": (100, 317),
}
PAPER_RESULTS = {
    name: PaperRow(PAPER_PARAMETERS[name], *figures, *_MEANS[name])
    for name, figures in _FIGURES.items()
}
