"""Image quality per image, summed in float64: MSE, PSNR and SSIM.

All three compare batches in [0, 1] (``data_range=1``), the range in which the paper's MSE and PSNR
columns agree with each other. Models work in [-1, 1]: pass their images through `to_unit_range`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops import InputError
from msvq_fast.ops.checks import check_choice, check_image, check_same_device
from msvq_fast.ops.gaussian_blur.op import blur_taps

SSIM_WINDOW = 11  # taps, pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_K1, SSIM_K2 = 0.01, 0.03
SSIM_BORDERS = ("reflect", "crop")


def to_unit_range(x: Tensor) -> Tensor:
    """Map images from [-1, 1] to [0, 1] and clip what lies outside; keeps shape and dtype."""
    return (x * 0.5 + 0.5).clamp(0.0, 1.0)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each image.

    Args:
        x: ``(B, C, H, W)`` images of a float dtype.
        y: Images of the same shape and device; the dtype may differ.

    Returns:
        ``(B,)`` float64 means over C, H and W, on the images' device.

    Raises:
        InputError: If shapes or devices differ, or an input is not a float image batch.
    """
    check_pair(x, y)
    return (x.double() - y.double()).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: ``10 log10(data_range² / MSE)``.

    The mean of these over a set is not the PSNR of the set, which is `psnr_from_mse` of the mean
    MSE (what torchmetrics' ``PeakSignalNoiseRatio`` reports).

    Args:
        x: ``(B, C, H, W)`` images of a float dtype.
        y: Images of the same shape and device.
        data_range: Width of the range of values: 1 for [0, 1], 255 for 8-bit values.

    Returns:
        ``(B,)`` float64 dB; ``inf`` for identical images.

    Raises:
        InputError: As `mse`, and for a ``data_range`` that is not positive.
    """
    return psnr_from_mse(mse(x, y), data_range=data_range)


def psnr_from_mse(error: Tensor, *, data_range: float = 1.0) -> Tensor:
    """PSNR in dB of a mean squared error of any shape, in float64; ``inf`` where it is zero."""
    _check_data_range(data_range)
    return 10.0 * torch.log10(data_range**2 / error.double())


def ssim(x: Tensor, y: Tensor, *, data_range: float = 1.0, border: str = "reflect") -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, Eq. 13).

    Gaussian window of 11 x 11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, population covariance;
    channels are compared one by one and averaged.

    Args:
        x: ``(B, C, H, W)`` images of a float dtype, H and W at least 11.
        y: Images of the same shape and device.
        data_range: Width of the range of values. SSIM is not invariant to shifts: values must
            start at 0.
        border: ``"reflect"`` averages over every pixel, reading beyond the edge by reflection, as
            torchmetrics does from 1.4.2 on; ``"crop"`` averages over the pixels whose window lies
            inside the image, as Wang et al., scikit-image and older torchmetrics do.

    Returns:
        ``(B,)`` float64 in [-1, 1]; 1 for identical images.

    Raises:
        InputError: As `psnr`, for images smaller than the window or an unknown border.

    Numerics:
        Everything in float64, because local variances are differences of nearly equal numbers.
    """
    check_pair(x, y)
    _check_data_range(data_range)
    check_choice("border", border, SSIM_BORDERS)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        height, width = x.shape[-2:]
        raise InputError(
            f"x has images of {height}x{width} pixels; SSIM's window needs at least "
            f"{SSIM_WINDOW}x{SSIM_WINDOW}"
        )
    x, y = x.double(), y.double()
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    covariance = _window_mean(x * y) - mean_x * mean_y
    # SSIM uses the two variances only by their sum: one blur serves both.
    variances = _window_mean(x.square() + y.square()) - mean_x.square() - mean_y.square()
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    similarity = luminance * structure  # (B, C, H, W)
    if border == "crop":
        edge = SSIM_WINDOW // 2
        similarity = similarity[..., edge:-edge, edge:-edge]
    return similarity.mean(dim=(1, 2, 3))


def _window_mean(x: Tensor) -> Tensor:
    # No kernel of ours computes in float64. In place a tap costs one pass, not two as in the blur's
    # reference; that and one padding for both directions take a third of its time.
    taps, _ = blur_taps(SSIM_WINDOW, SSIM_SIGMA)
    edge = SSIM_WINDOW // 2
    for dim in (-1, -2):  # not F.pad, whose gradient no GPU repeats bit for bit
        last = x.shape[dim] - 1
        before, after = x.narrow(dim, 1, edge), x.narrow(dim, last - edge, edge)
        x = torch.cat([before.flip(dim), x, after.flip(dim)], dim)
    for dim in (-1, -2):
        size = x.shape[dim] - SSIM_WINDOW + 1
        mean = x.narrow(dim, 0, size) * taps[0]
        for j in range(1, SSIM_WINDOW):
            mean.add_(x.narrow(dim, j, size), alpha=taps[j])
        x = mean
    return x


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise unless both are float image batches of one shape on one device."""
    check_image("x", x)
    check_image("y", y)
    if x.shape != y.shape:
        raise InputError(f"y has shape {tuple(y.shape)} but x has {tuple(x.shape)}")
    check_same_device(x=x, y=y)


def _check_data_range(data_range: float) -> None:
    if not 0 < data_range < float("inf"):
        raise InputError(f"data_range={data_range}; expected a positive number (1 for [0, 1])")
