from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.data import read_image
from msvq_fast.models import from_preset
from msvq_fast.training import validation
from msvq_fast.training.distributed import World
from msvq_fast.training.evaluate import evaluate
from msvq_fast.training.validation import load_tiles, validate

SMALL = {"resolution": 16, "width": 8, "code_dim": 4, "num_codes": 16, "num_residual_blocks": 1}
ONE = World(0, 1, torch.device("cpu"))


def some_tiles(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
def test_figures_are_those_of_an_evaluation(preset: str) -> None:
    model = from_preset(preset, latents=(2, 4), **SMALL)
    for quantizer in model.quantizers:
        quantizer.codebook.normal_(std=40)  # far out, so that clipping matters
    tiles = some_tiles(5)
    model.train()
    errors, decibels = validate(model, tiles, batch_size=2, world=ONE)
    assert model.training
    result = evaluate(model, [(str(i), tile) for i, tile in enumerate(tiles)])
    assert errors == pytest.approx([q.mse for q in result.reconstructions], rel=1e-5)
    assert decibels == pytest.approx([q.psnr for q in result.reconstructions], abs=1e-4)
    assert (model.decode(model.eval().encode(tiles / 127.5 - 1)).abs() > 1.1).any()


@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
@pytest.mark.parametrize("count", [1, 5])
def test_processes_share_the_tiles(
    monkeypatch: pytest.MonkeyPatch, preset: str, count: int
) -> None:
    model, tiles = from_preset(preset, latents=(2, 4), **SMALL), some_tiles(count)
    alone, _ = validate(model, tiles, batch_size=2, world=ONE)
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(validation, "all_reduce_", lambda t, _: (sums.append(t.clone()), t)[1])
    for rank in range(2):
        validate(model, tiles, batch_size=2, world=World(rank, 2, torch.device("cpu")))
    assert ((sums[0] + sums[1]) / count).tolist() == pytest.approx(alone, rel=1e-6)


def test_tiles_are_spread_over_images_and_in_each(tmp_path: Path) -> None:
    paths = []
    for number, columns in enumerate((9, 1, 2)):
        pixels = np.full((4, 4 * columns, 3), 50 * number, np.uint8)
        pixels[..., 0] = np.arange(columns).repeat(4)  # red is the tile's column
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])

    def places(limit: int, crop: str = "random") -> list[tuple[int, int]]:
        tiles = load_tiles(paths, size=4, resize=None, crop=crop, limit=limit, skipped={})
        assert tiles.shape[1:] == (3, 4, 4) and tiles.dtype == torch.uint8
        return [(int(tile[1, 0, 0]) // 50, int(tile[0, 0, 0])) for tile in tiles]

    assert places(2) == [(0, 4), (1, 0)]
    assert places(7) == [(0, 1), (0, 4), (0, 7), (1, 0), (2, 0), (2, 1)]
    assert places(4) == [(0, 2), (0, 6), (1, 0), (2, 0)]  # the last has a second one
    assert [image for image, _ in places(7, "center")] == [0, 1, 2]
    assert torch.equal(
        load_tiles(paths[1:2], size=4, resize=None, crop="random", limit=9, skipped={})[0],
        read_image(paths[1]),
    )
