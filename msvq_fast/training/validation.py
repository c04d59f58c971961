"""How a model in training does on held-out tiles: MSE and PSNR of every partial sum."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msvq_fast.data import ImagePath, evaluation_tiles, to_float
from msvq_fast.metrics import mse, psnr_from_mse, to_unit_range
from msvq_fast.models import MSVQVAE, VQVAE2
from msvq_fast.ops import InputError
from msvq_fast.training.distributed import World, all_reduce_


def load_tiles(
    paths: Sequence[ImagePath],
    *,
    size: int,
    resize: int | None,
    crop: str,
    limit: int,
    skipped: dict[str, str],
) -> Tensor:
    """Load at most ``limit`` tiles, spread evenly over the images and over each image.

    Args:
        paths: Images of ``list_images``.
        size: Side of a tile in pixels.
        resize: As for the training crops.
        crop: ``"random"`` training crops are validated on a grid of tiles, ``"center"`` on
            central ones.
        limit: Most tiles.
        skipped: Filled with unreadable files and the reason.

    Returns:
        uint8 ``(T, 3, size, size)``, T >= 1.
    """
    per_image = -(-limit // min(limit, len(paths)))
    named = evaluation_tiles(
        paths,
        size=size,
        resize=resize,
        crop="tiles" if crop == "random" else "center",
        limit=limit,
        skipped=skipped,
    )
    if crop == "center":
        return torch.stack([tile for _, tile in named])
    chosen: list[Tensor] = []
    for _, group in itertools.groupby(named, key=lambda item: item[0].rpartition(":")[0]):
        tiles = [tile for _, tile in group]
        count = min(per_image, len(tiles))
        chosen += [tiles[(2 * i + 1) * len(tiles) // (2 * count)] for i in range(count)]
    return torch.stack(chosen[:limit])


def load_held_out(paths: Sequence[ImagePath], *, skipped: dict[str, str], **options: Any) -> Tensor:
    """`load_tiles` for a training run: where no image can be read, the error says what to do."""
    try:
        return load_tiles(paths, skipped=skipped, **options)
    except InputError as error:
        if not skipped:
            raise
        raise InputError(
            f"validation: {error}; replace or remove what cannot be read, or train without "
            "validation (validate_every=0)"
        ) from None


@torch.no_grad()
def validate(
    model: MSVQVAE | VQVAE2, tiles: Tensor, *, batch_size: int, world: World
) -> tuple[list[float], list[float]]:
    """MSE and PSNR of ``x̂_m`` against the tiles, both on [0, 1].

    Args:
        model: Left in the mode it was in.
        tiles: uint8 ``(T, 3, S, S)``, the same on all processes, which share the work.
        batch_size: Tiles at a time.
        world: The processes.

    Returns:
        Mean squared error and PSNR (dB, of the mean error) per partial sum, coarse to fine.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    try:
        # A process without tiles has one empty batch.
        for batch in tiles[world.rank :: world.size].split(batch_size):
            x = to_float(batch.to(world.device))
            reference = to_unit_range(x)
            sums = itertools.accumulate(model.contributions(model.encode(x)))
            errors = torch.stack([mse(to_unit_range(s), reference).sum() for s in sums])
            total = total + errors
    finally:
        model.train(was_training)
    mean = all_reduce_(total, world) / len(tiles)
    return mean.tolist(), psnr_from_mse(mean).tolist()
