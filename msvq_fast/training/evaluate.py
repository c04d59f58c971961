"""Judge a trained model on whole images: quality of every partial sum, health of every codebook."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msvq_fast.data import evaluation_tiles, list_named_images, to_float, to_uint8
from msvq_fast.metrics import LPIPS, CodeUsage, mse, psnr_from_mse, ssim, to_unit_range
from msvq_fast.models import (
    MSVQVAE,
    VQVAE2,
    MSVQVAEConfig,
    sum_contributions,
    weights_digest,
)
from msvq_fast.ops import InputError, default_kernel_size, gaussian_pyramid
from msvq_fast.ops.checks import check_at_least
from msvq_fast.training.checkpoint import VERSIONS, find_model
from msvq_fast.training.config import EvaluateConfig
from msvq_fast.training.distributed import World, all_reduce_, gather, join, require_same
from msvq_fast.training.inference import (
    fitting_size,
    inference_mode,
    load_model,
    tile_batches,
)
from msvq_fast.training.judges import FeatureSet, Judges, compare_sets, load_judges
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
from msvq_fast.training.resume import describe_images, name_images
from msvq_fast.training.samples_evaluation import run_evaluate_samples

_NO_JUDGES = Judges()
# Options that each process may have its own of: how it computes, and places on its machine.
_OWN = frozenset({"out", "batch_size", "workers", "device"})
_PLACES = frozenset(
    {"checkpoint", "data", "samples", "lpips_weights", "inception_weights", "efflite0_weights"}
)
_NONE = torch.zeros(0, 0, dtype=torch.float64)


def evaluate(
    model: MSVQVAE | VQVAE2,
    tiles: Iterable[tuple[str, Tensor]],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    judges: Judges = _NO_JUDGES,
    world: World | None = None,
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
        judges: Networks for LPIPS and for distances between sets, on ``device``. LPIPS sees the
            clipped images as floats, the sets see them rounded to 8 bits.
        world: Processes that share the work, each with ``tiles`` of its own; all get the result.

    Raises:
        InputError: If there is no image, an image does not fit the model, or a reconstruction is
            not finite.
    """
    check_at_least(1, batch_size=batch_size)
    device = torch.device(device)
    world = world or World(0, 1, device)
    start = time.perf_counter()
    extractor = judges.extractor
    sets = None if extractor is None else (FeatureSet(extractor), FeatureSet(extractor))
    usage = [CodeUsage(model.config.num_codes) for _ in range(model.num_scales)]
    grids: list[tuple[int, int]] = []
    rows: list[ImageQuality] = []
    truncated: list[Tensor] = []  # per batch: (reconstructions, B)
    done = 0
    with inference_mode(model.to(device)):
        for names, images in tile_batches(tiles, batch_size):
            x = to_float(images.to(device))
            codes = model.encode(x)
            grids = [(c.shape[1], c.shape[2]) for c in codes]
            for counter, grid in zip(usage, codes, strict=True):
                counter.update(grid)
            contributions = model.contributions(codes)
            judged, truncated_error = _judge(model, names, x, contributions, judges.lpips)
            rows += judged
            truncated.append(truncated_error)
            if sets is not None:
                sets[0].add(names, images.to(device))
                sets[1].add(names, to_uint8(sum_contributions(contributions)))
            done += len(names)
            if progress is not None:
                progress(done)
    for counter in usage:
        all_reduce_(counter.counts, world)
    grids = max(gather(grids, world), key=len)  # a process may have had no image
    errors = torch.cat([e for part in gather(truncated, world) for e in part] or [_NONE], dim=1)
    rows = [row for part in gather(rows, world) for row in part]
    if not rows:
        raise InputError("tiles is empty; expected at least one image")
    rows.sort(key=_place)
    images_done = errors.shape[1]
    reconstructed_set = None
    if extractor is not None and sets is not None:
        reconstructed_set = compare_sets(
            extractor, *sets, paired=True, force_fd=judges.force_fd, world=world
        )
    codebooks = tuple(
        CodebookHealth(m, grids[m], counter.usage, counter.perplexity)
        for m, counter in enumerate(usage)
    )
    return EvaluationResult(
        model=type(model).__name__,
        model_config=dataclasses.asdict(model.config),
        parameters=sum(p.numel() for p in model.parameters()),
        images=images_done,
        reconstructions=_average(rows, errors.mean(dim=1)),
        codebooks=codebooks,
        usage=math.fsum(c.usage for c in codebooks) / len(codebooks),
        perplexity=math.fsum(c.perplexity for c in codebooks) / len(codebooks),
        seconds=time.perf_counter() - start,
        settings={**(settings or {}), **_conditions(device, batch_size, judges, world)},
        per_image=tuple(rows),
        reconstructed_set=reconstructed_set,
    )


def run_evaluate(config: EvaluateConfig) -> EvaluationResult | None:
    """``msvq evaluate``: judge a checkpoint or a folder of samples; print and write the figures.

    Under ``torchrun`` the processes share the images; the first one prints and writes.

    Returns:
        The result of a checkpoint, None for samples.

    Raises:
        InputError: For a bad checkpoint, data, setting, weights file or output folder, before any
            work is done where that can be known.
    """
    check_at_least(1, batch_size=config.batch_size)
    if (config.checkpoint is None) == (config.samples is None):
        given = "neither" if config.checkpoint is None else "both"
        raise InputError(f"evaluate needs --checkpoint or --samples, one of them; {given} given")
    options = {
        name: "given" if name in _PLACES and value is not None else value
        for name, value in dataclasses.asdict(config).items()
        if name not in _OWN
    }
    with join(config.device) as world:
        require_same(options, world)
        if config.checkpoint is None:
            run_evaluate_samples(config, world)
            return None
        return _evaluate_checkpoint(config, config.checkpoint, world)


def _evaluate_checkpoint(config: EvaluateConfig, checkpoint: str, world: World) -> EvaluationResult:
    folder = find_model(checkpoint)
    model = load_model(folder, world.device)
    size = fitting_size(config.size, model)
    images = list_named_images(config.data, split=config.split)
    paths, digest = list(images.values()), weights_digest(folder)
    require_same({"data": name_images(describe_images(images)), "checkpoint": digest}, world)
    skipped: dict[str, str] = {}
    tiles = evaluation_tiles(
        paths,
        size=size,
        resize=config.resize,
        crop=config.crop,
        limit=config.limit,
        skipped=skipped,
        rank=world.rank,
        world_size=world.size,
        workers=config.workers,
    )
    if world.leads:
        check_writable(Path(config.out))
    settings = {
        **dataclasses.asdict(config),
        "size": size,
        "resize": config.resize or (size if config.crop == "center" else None),
        "weights_sha256": digest,
        "skipped": skipped,  # filled while the tiles are read
    }
    judges = load_judges(config, world.device)
    with counting("images") if world.leads else contextlib.nullcontext() as progress:
        result = evaluate(
            model,
            tiles,
            batch_size=config.batch_size,
            device=world.device,
            settings=settings,
            progress=progress,
            judges=judges,
            world=world,
        )
    for part in gather(skipped, world):
        skipped.update(part)
    result = dataclasses.replace(result, settings={**result.settings, "skipped": skipped})
    if world.leads:
        write_results(result, config.out)
        print_table(result)
        for reason in skipped.values():
            print(f"skipped: {reason}")
    return result


def _judge(
    model: MSVQVAE | VQVAE2,
    names: list[str],
    x: Tensor,
    contributions: list[Tensor],
    lpips: LPIPS | None,
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
        columns = [error, psnr_from_mse(error), ssim(partial, image)]
        columns.append(mse(partial, to_unit_range(target)))
        if lpips is not None:
            columns.append(lpips(partial * 2 - 1, x))
        figures = torch.stack(columns, dim=1).tolist()
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
            lpips=_mean_lpips(chosen),
        )
        result.append(quality)
    return tuple(result)


def _mean_lpips(rows: Sequence[ImageQuality]) -> float | None:
    values = [row.lpips for row in rows if row.lpips is not None]
    return math.fsum(values) / len(values) if values else None


def _place(row: ImageQuality) -> tuple[str, int, int, int]:
    """Where a row stands, whatever the batches and processes: file, tile, scale."""
    tile = re.fullmatch(r"(.*):(\d+),(\d+)", row.image)
    name, *place = tile.groups() if tile else (row.image, 0, 0)
    return name, int(place[0]), int(place[1]), row.scale


def _blur_settings(model: MSVQVAE | VQVAE2) -> dict[str, Any]:
    """The blur behind the model's own targets."""
    config = model.config
    if not isinstance(config, MSVQVAEConfig):
        return {}  # its one target is the image itself
    size = config.kernel_size or default_kernel_size(config.resolution)
    return {"kernel_size": size, "sigma_rule": config.sigma_rule}


def _conditions(
    device: torch.device, batch_size: int, judges: Judges, world: World
) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "metric_range": [0, 1],
        "model_range": [-1, 1],
        "ssim": "Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, reflect border, float64",
        "lpips": judges.lpips and {"net": judges.lpips.net, "sha256": judges.lpips.sha256},
        "set_images": "uint8, reconstructions rounded to nearest",
        "precision": "float32",
        "processes": world.size,
        "batch_size": batch_size,
        "device": f"{device.type} {name}".strip(),
        "versions": VERSIONS,
    }
