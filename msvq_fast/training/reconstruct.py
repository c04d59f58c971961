"""One picture of what a model sees: contributions, partial sums and token maps of every scale."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from msvq_fast.data import (
    ImagePath,
    ImageReadError,
    code_map,
    list_images,
    read_image,
    resize_short_side,
    save_png,
    signed_to_uint8,
    to_float,
    to_uint8,
)
from msvq_fast.metrics import mse, psnr_from_mse, to_unit_range
from msvq_fast.models import MSVQVAE, VQVAE2, sum_contributions
from msvq_fast.ops.checks import InputError, check_at_least
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.distributed import choose_device
from msvq_fast.training.inference import inference_mode, load_model
from msvq_fast.training.results import check_picture, check_writable
from msvq_fast.training.share_config import ReconstructConfig

_LEAST_SIDE = 256  # pixels; smaller pictures are hard to see
_GAINS = (1, 2, 4, 8, 16)


def reconstruct_grid(
    model: MSVQVAE | VQVAE2,
    images: Sequence[tuple[str, Tensor]],
    out_png: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Draw one row per image: input, contributions C_m, partial sums x̂_m, token maps.

    C_0 is a whole image. The finer contributions add and subtract detail: they are drawn around
    mid-grey, multiplied by the gain that their column states. VQ-VAE 2 has one contribution, its
    reconstruction, and M token maps.

    Args:
        model: Moved to ``device`` and left there; its mode is restored.
        images: Names and uint8 images ``(3, H, W)`` with sides a multiple of the model's stride.
        out_png: The file; folders above it are made.
        device: Where the model runs.

    Raises:
        InputError: If there is no image, an image does not fit the model, or the file cannot be
            written.
    """
    if not images:
        raise InputError("images is empty; expected at least one image")
    codes, contributions, labels = [], [], []
    with inference_mode(model.to(device)):
        for name, image in images:
            x = to_float(image.to(device))[None]  # (1, 3, H, W)
            grids = model.encode(x)
            parts = [c.float() for c in model.contributions(grids)]
            error = mse(to_unit_range(sum_contributions(parts)), to_unit_range(x))
            labels.append(f"{name}\nPSNR {float(psnr_from_mse(error)):.2f} dB")
            codes.append([grid[0] for grid in grids])
            contributions.append([c[0] for c in parts])
    finer = range(1, len(contributions[0]))
    gains = [1, *(common_gain([parts[m] for parts in contributions]) for m in finer)]
    rows = []
    for (_, image), grids, parts in zip(images, codes, contributions, strict=True):
        row = [image]
        if len(parts) > 1:
            row += [signed_to_uint8(c, gain) for c, gain in zip(parts, gains, strict=True)]
        row += [to_uint8(partial) for partial in itertools.accumulate(parts)]
        row += [code_map(grid, model.config.num_codes) for grid in grids]
        rows.append(row)
    scales = f"{model.num_scales} scale{'s' if model.num_scales > 1 else ''}"
    name = f"{type(model).__name__}, {scales} of {model.config.num_codes} codes"
    columns = _column_labels(gains, model.num_scales)
    save_png(out_png, rows, row_labels=labels, column_labels=columns, title=name)


def run_reconstruct(config: ReconstructConfig) -> Path:
    """``msvq reconstruct``: load a checkpoint and draw some images of a split or one file.

    An image that cannot be read, or is smaller than the model takes, is left out and named.

    Returns:
        The PNG file.

    Raises:
        InputError: For a bad checkpoint, setting or output path, or if no image is left.
    """
    check_at_least(1, limit=config.limit)
    device = choose_device(config.device)
    model = load_model(find_model(config.checkpoint), device)
    size = config.size or max(model.config.resolution, _LEAST_SIDE)
    if size < model.stride:
        raise InputError(f"size={size}; this model takes at least {model.stride} pixels")
    single = Path(config.data).is_file()
    paths: list[ImagePath] = (
        [Path(config.data)] if single else list_images(config.data, split=config.split)
    )
    # What is there may be an image of another split: then the data is listed again, whole.
    again = not single and Path(config.out).exists()
    out = check_picture(config.out, list_images(config.data, split="all") if again else paths)
    count = min(config.limit, len(paths))
    paths = [paths[i * len(paths) // count] for i in range(count)]
    check_writable(out.parent)
    images, skipped = [], []
    for path in paths:
        try:
            images.append((path.stem, _fitted(path, size, model.stride)))
        except ImageReadError as error:
            skipped.append(str(error))
    if not images:
        raise InputError(f"none of the {len(paths)} images can be drawn; {skipped[0]}")
    reconstruct_grid(model, images, out, device=device)
    for reason in skipped:
        print(f"skipped: {reason}")
    print(f"wrote {out}")
    return out


def common_gain(contributions: Sequence[Tensor]) -> int:
    """Largest gain that keeps 99.5 % of the values on the grey scale, for all images alike."""
    magnitude = torch.cat([c.flatten() for c in contributions]).abs()
    kept = int(0.995 * (len(magnitude) - 1)) + 1
    reach = float(magnitude.kthvalue(kept).values)
    return max([gain for gain in _GAINS if gain * reach <= 1], default=1)


def _column_labels(gains: Sequence[int], num_scales: int) -> list[str]:
    labels = ["input"]
    if len(gains) == 1:
        labels.append("reconstruction")
    else:
        for m, gain in enumerate(gains):
            shown = "\naround grey" if m else ""
            labels.append(f"contribution {m}{shown}" + (f", x {gain}" if gain > 1 else ""))
        labels += ["sum of 0" if m == 0 else f"sum of 0..{m}" for m in range(len(gains))]
    return labels + [f"codes {m}" for m in range(num_scales)]


def _fitted(path: ImagePath, size: int, stride: int) -> Tensor:
    """Read an image, shrink its short side to ``size`` and crop its sides to whole strides."""
    image = read_image(path, min_side=2 * size)
    if min(image.shape[1:]) > size:
        image = resize_short_side(image, size)
    height, width = image.shape[1:]
    rows, columns = height // stride * stride, width // stride * stride
    if not rows or not columns:
        raise ImageReadError(
            f"image {str(path)!r} has {width}x{height} pixels; this model takes at least "
            f"{stride}x{stride}"
        )
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns].contiguous()
