"""Judge a folder of generated images against real ones, as sets: FD, KID and IS."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msvq_fast.data import ImagePath, evaluation_tiles, list_named_images
from msvq_fast.metrics import FeatureExtractor
from msvq_fast.ops import InputError
from msvq_fast.training.config import EvaluateConfig
from msvq_fast.training.distributed import World, gather, require_same
from msvq_fast.training.inference import inference_mode, tile_batches
from msvq_fast.training.judges import FeatureSet, compare_sets, load_judges
from msvq_fast.training.progress import counting
from msvq_fast.training.results import RESULTS_FILE, SetQuality, check_writable, write_json
from msvq_fast.training.resume import describe_images, name_images


def run_evaluate_samples(config: EvaluateConfig, world: World) -> SetQuality:
    """Compare all images of ``config.samples`` with a split of ``config.data``.

    Both are resized and cut alike. Writes ``results.json``.

    Raises:
        InputError: For a missing extractor or size, ``lpips_weights``, bad images or weights, or a
            bad output folder.
    """
    if config.samples is None:
        raise InputError("samples=None; expected a folder of images")
    if config.size is None:
        raise InputError("evaluate --samples needs --size, the side of the images in pixels")
    if config.lpips_weights is not None:
        raise InputError(
            f"lpips_weights={config.lpips_weights!r} with samples; LPIPS compares an image with "
            "its original, and samples have none"
        )
    judges = load_judges(config, world.device)
    extractor = judges.extractor
    if extractor is None:
        raise InputError("evaluate --samples needs --extractor inception or efflite0")
    sources = {
        "originals": list_named_images(config.data, split=config.split),
        "samples": list_named_images(config.samples, split="all"),
    }
    require_same({n: name_images(describe_images(i)) for n, i in sources.items()}, world)
    if world.leads:
        check_writable(Path(config.out))
    skipped: dict[str, str] = {}
    sets: dict[str, FeatureSet] = {}
    for what, images in sources.items():
        with counting(what) if world.leads else contextlib.nullcontext() as progress:
            sets[what] = _read(list(images.values()), config, extractor, skipped, world, progress)
    for part in gather(skipped, world):
        skipped.update(part)
    result = compare_sets(
        extractor,
        sets["originals"],
        sets["samples"],
        paired=False,
        force_fd=judges.force_fd,
        world=world,
    )
    if world.leads:
        settings = {**dataclasses.asdict(config), "skipped": skipped, "processes": world.size}
        settings["versions"] = {"torch": torch.__version__}
        record = {"samples": dataclasses.asdict(result), "settings": settings}
        write_json(Path(config.out) / RESULTS_FILE, record, indent=2)
        print(result.describe())
        for reason in skipped.values():
            print(f"skipped: {reason}")
    return result


def _read(
    paths: list[ImagePath],
    config: EvaluateConfig,
    extractor: FeatureExtractor,
    skipped: dict[str, str],
    world: World,
    progress: Callable[[int], None] | None,
) -> FeatureSet:
    options: dict[str, Any] = {"resize": config.resize, "crop": config.crop, "limit": config.limit}
    tiles = evaluation_tiles(
        paths,
        size=config.size or 0,
        skipped=skipped,
        rank=world.rank,
        world_size=world.size,
        workers=config.workers,
        **options,
    )
    found = FeatureSet(extractor)
    with inference_mode(extractor):
        done = 0
        for names, images in tile_batches(tiles, config.batch_size):
            found.add(names, images.to(world.device))
            done += len(names)
            if progress is not None:
                progress(done)
    return found
