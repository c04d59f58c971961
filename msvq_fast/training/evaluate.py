"""Judge a trained model on whole images: quality of every partial sum, health of every codebook."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import msvq_fast
from msvq_fast.data import evaluation_tiles, list_images, to_float
from msvq_fast.metrics import CodeUsage, mse, psnr_from_mse, ssim, to_unit_range
from msvq_fast.models import MSVQVAE, VQVAE2, MSVQVAEConfig, from_pretrained
from msvq_fast.ops import InputError, default_kernel_size, gaussian_pyramid
from msvq_fast.training.checkpoint import find_model, weights_digest
from msvq_fast.training.config import EvaluateConfig
from msvq_fast.training.distributed import choose_device
from msvq_fast.training.inference import inference_mode
from msvq_fast.training.progress import counting
from msvq_fast.training.results import (
    CodebookHealth,
    EvaluationResult,
    ImageQuality,
    Quality,
    check_writable,
    print_table,
    write_results,
)


def evaluate(
    model: MSVQVAE | VQVAE2,
    tiles: Iterable[tuple[str, Tensor]],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvaluationResult:
    """Measure a model on images.

    Every partial sum is mapped from [-1, 1] to [0, 1], clipped, and compared with the image at
    full resolution and with its own blurred target. Codes are counted over the whole set, so the
    figures do not depend on ``batch_size`` but for the rounding of the convolutions.

    Args:
        model: Moved to ``device`` and left there; its mode is restored.
        tiles: Names and uint8 images ``(3, H, W)`` with sides a multiple of the model's stride
            and at least 11 pixels; neighbours of one size share a batch.
        batch_size: Most images in a batch.
        device: Where the model runs, in float32 without TF32.
        settings: Written into the result beside what is known here.
        progress: Called with the number of images done after each batch.

    Raises:
        InputError: If there is no image, an image does not fit the model, or a reconstruction is
            not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected at least 1")
    device = torch.device(device)
    start = time.perf_counter()
    usage = [CodeUsage(model.config.num_codes) for _ in range(model.num_scales)]
    grids: list[tuple[int, int]] = []
    rows: list[ImageQuality] = []
    truncated: list[Tensor] = []  # per batch: (reconstructions, B)
    done = 0
    with inference_mode(model.to(device)):
        for names, images in _batches(tiles, batch_size):
            x = to_float(images.to(device))
            codes = model.encode(x)
            grids = [(c.shape[1], c.shape[2]) for c in codes]
            for counter, grid in zip(usage, codes, strict=True):
                counter.update(grid)
            judged, truncated_error = _judge(model, names, x, model.contributions(codes))
            rows += judged
            truncated.append(truncated_error)
            done += len(names)
            if progress is not None:
                progress(done)
    if not rows:
        raise InputError("tiles is empty; expected at least one image")
    codebooks = tuple(
        CodebookHealth(m, grids[m], counter.usage, counter.perplexity)
        for m, counter in enumerate(usage)
    )
    return EvaluationResult(
        model=type(model).__name__,
        model_config=dataclasses.asdict(model.config),
        parameters=sum(p.numel() for p in model.parameters()),
        images=done,
        reconstructions=_average(rows, torch.cat(truncated, dim=1).mean(dim=1)),
        codebooks=codebooks,
        usage=math.fsum(c.usage for c in codebooks) / len(codebooks),
        perplexity=math.fsum(c.perplexity for c in codebooks) / len(codebooks),
        seconds=time.perf_counter() - start,
        settings={**(settings or {}), **_conditions(device, batch_size)},
        per_image=tuple(rows),
    )


def run_evaluate(config: EvaluateConfig) -> EvaluationResult:
    """``msvq evaluate``: load a checkpoint, judge it on a split, print and write the figures.

    Raises:
        InputError: For a bad checkpoint, data, setting or output folder, before any work is done
            where that can be known.
    """
    if config.batch_size < 1:
        raise InputError(f"batch_size={config.batch_size}; expected at least 1")
    device = choose_device(config.device)
    folder = find_model(config.checkpoint)
    model = from_pretrained(folder)
    size = config.size or model.config.resolution
    if size % model.stride:
        raise InputError(f"size={size}; this model takes multiples of {model.stride} pixels")
    paths = list_images(config.data, split=config.split)
    skipped: dict[str, str] = {}
    tiles = evaluation_tiles(
        paths,
        size=size,
        resize=config.resize,
        crop=config.crop,
        limit=config.limit,
        skipped=skipped,
    )
    check_writable(Path(config.out))
    settings = {
        **dataclasses.asdict(config),
        "size": size,
        "resize": config.resize or (size if config.crop == "center" else None),
        "weights_sha256": weights_digest(folder),
        "skipped": skipped,  # filled while the tiles are read
    }
    with counting("images") as progress:
        result = evaluate(
            model,
            tiles,
            batch_size=config.batch_size,
            device=device,
            settings=settings,
            progress=progress,
        )
    write_results(result, config.out)
    print_table(result)
    for reason in skipped.values():
        print(f"skipped: {reason}")
    return result


def _judge(
    model: MSVQVAE | VQVAE2, names: list[str], x: Tensor, contributions: list[Tensor]
) -> tuple[list[ImageQuality], Tensor]:
    """Rows of a batch, and squared errors ``(reconstructions, B)`` after 8-bit truncation."""
    count = len(contributions)
    targets = gaussian_pyramid(x, count, **_blur_settings(model))
    image = to_unit_range(x)
    rows: list[ImageQuality] = []
    truncated = []
    partials = itertools.accumulate(contribution.float() for contribution in contributions)
    for m, (partial, target) in enumerate(zip(partials, targets, strict=True)):
        partial = to_unit_range(partial)
        error = mse(partial, image)  # (B,)
        if not bool(error.isfinite().all()):
            name = names[int((~error.isfinite()).nonzero()[0])]
            raise InputError(f"the reconstruction of {name!r} is not finite; the model is damaged")
        columns = (error, psnr_from_mse(error), ssim(partial, image))
        figures = torch.stack([*columns, mse(partial, to_unit_range(target))], dim=1).tolist()
        scale = model.num_scales - count + m
        rows += [ImageQuality(n, scale, *row) for n, row in zip(names, figures, strict=True)]
        truncated.append(mse((partial * 255).floor() / 255, image))
    return rows, torch.stack(truncated).cpu()


def _average(rows: list[ImageQuality], truncated: Tensor) -> tuple[Quality, ...]:
    """Means over the images of every reconstruction; PSNR is that of the mean error."""
    result = []
    for scale, error_8bit in zip(sorted({row.scale for row in rows}), truncated, strict=True):
        chosen = [row for row in rows if row.scale == scale]
        error = math.fsum(row.mse for row in chosen) / len(chosen)
        quality = Quality(
            scale=scale,
            mse=error,
            psnr=float(psnr_from_mse(torch.tensor(error, dtype=torch.float64))),
            psnr_8bit=float(psnr_from_mse(error_8bit)),
            ssim=math.fsum(row.ssim for row in chosen) / len(chosen),
            target_mse=math.fsum(row.target_mse for row in chosen) / len(chosen),
        )
        result.append(quality)
    return tuple(result)


def _blur_settings(model: MSVQVAE | VQVAE2) -> dict[str, Any]:
    """The blur behind the model's own targets."""
    config = model.config
    if not isinstance(config, MSVQVAEConfig):
        return {}  # its one target is the image itself
    size = config.kernel_size or default_kernel_size(config.resolution)
    return {"kernel_size": size, "sigma_rule": config.sigma_rule}


def _batches(
    tiles: Iterable[tuple[str, Tensor]], batch_size: int
) -> Iterator[tuple[list[str], Tensor]]:
    names: list[str] = []
    images: list[Tensor] = []
    for name, image in tiles:
        if images and (len(images) == batch_size or image.shape != images[0].shape):
            yield names, torch.stack(images)
            names, images = [], []
        names.append(name)
        images.append(image)
    if images:
        yield names, torch.stack(images)


def _conditions(device: torch.device, batch_size: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "metric_range": [0, 1],
        "model_range": [-1, 1],
        "ssim": "Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, reflect border, float64",
        "precision": "float32",
        "batch_size": batch_size,
        "device": f"{device.type} {name}".strip(),
        "versions": {
            "msvq_fast": msvq_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
