"""The pictures of a comparison: reconstructions, zoomed crops, codebook use, power per scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from msvq_fast.data import (
    curve_chart,
    evaluation_tiles,
    histogram,
    list_images,
    save_png,
    signed_to_uint8,
    to_float,
    to_uint8,
)
from msvq_fast.metrics import (
    CodeUsage,
    mse,
    psnr_from_mse,
    radial_power,
    to_unit_range,
)
from msvq_fast.models import MSVQVAE, VQVAE2
from msvq_fast.training.inference import inference_mode, load_model
from msvq_fast.training.reconstruct import common_gain
from msvq_fast.training.validation import load_tiles

PICTURES = ("reconstructions.png", "crops.png", "codes.png", "spectrum.png")
_SHOWN = 3  # images
_ZOOM = 4


class _View(NamedTuple):
    """What a model makes of images: partial sums and contributions ``(B, 3, H, W)``, codes."""

    sums: list[Tensor]
    contributions: list[Tensor]
    codes: list[Tensor]


class _Found(NamedTuple):
    """What all held-out tiles say: codes per model and scale, mean power per ring."""

    tiles: int
    usage: dict[str, list[CodeUsage]]
    power: dict[str, Tensor]


def draw_comparison(
    folders: Mapping[str, Path],
    out: Path,
    *,
    data: str,
    size: int,
    resize: int | None,
    device: torch.device | str = "cpu",
) -> dict[str, float | None]:
    """Draw the four pictures from the val images of ``data``.

    Args:
        folders: Saved models: ``vqvae2`` and ``msvqvae``.
        out: Folder of the pictures.
        data: A folder of images, ``builtin:photos``, ``wds:SHARDS`` or ``hf:NAME[:SPLIT]``.
        size: Side of the tiles in pixels.
        resize: Shorter side of the images before cutting, None keeps their size.
        device: Where the models run.

    Returns:
        Per contribution, reconstruction and for the images themselves the frequency, in cycles
        per tile, below which half of its power lies; None where it has no power.

    Raises:
        InputError: For bad models or data, or a folder that cannot be written.
    """
    models = {name: load_model(folder, torch.device(device)) for name, folder in folders.items()}
    paths = list_images(data, split="val")
    skipped: dict[str, str] = {}
    cut: dict[str, Any] = {"size": size, "resize": resize, "skipped": skipped}
    shown = load_tiles(paths, crop="random", limit=_SHOWN, **cut)
    views = {name: _view(model, shown) for name, model in models.items()}
    base, ours = views["vqvae2"], views["msvqvae"]
    _draw_reconstructions(out / PICTURES[0], shown, base, ours)
    _draw_crops(out / PICTURES[1], shown, base, ours)
    found = _measure(models, (tile for _, tile in evaluation_tiles(paths, crop="tiles", **cut)))
    for reason in skipped.values():
        print(f"skipped: {reason}")
    _draw_codes(out / PICTURES[2], models, found)
    return _draw_spectrum(out / PICTURES[3], found.power)


def _view(model: MSVQVAE | VQVAE2, images: Tensor) -> _View:
    with inference_mode(model):
        x = to_float(images.to(next(model.parameters()).device))
        codes = model.encode(x)
        contributions = [c.float() for c in model.contributions(codes)]
    return _View(list(itertools.accumulate(contributions)), contributions, codes)


def _measure(models: Mapping[str, MSVQVAE | VQVAE2], tiles: Iterable[Tensor]) -> _Found:
    """Look at one tile at a time: all those of a data set do not fit into memory."""
    usage = {
        name: [CodeUsage(model.config.num_codes) for _ in range(model.num_scales)]
        for name, model in models.items()
    }
    power: dict[str, Tensor] = {}
    count = 0
    for tile in tiles:
        count += 1
        views = {name: _view(model, tile[None]) for name, model in models.items()}
        for name, view in views.items():
            for counter, grid in zip(usage[name], view.codes, strict=True):
                counter.update(grid)
        ours = views["msvqvae"]
        found = {"image": to_float(tile)[None]}
        found |= {f"MS-VQVAE C_{m}": c for m, c in enumerate(ours.contributions)}
        found |= {f"MS-VQVAE sum of 0..{m}": s for m, s in enumerate(ours.sums) if m}
        found["VQ-VAE 2"] = views["vqvae2"].sums[-1]
        for name, image in found.items():
            power[name] = power.get(name, 0) + radial_power(image.cpu())[0]
    return _Found(count, usage, {name: total / count for name, total in power.items()})


def _draw_reconstructions(path: Path, images: Tensor, base: _View, ours: _View) -> None:
    scales = range(len(ours.sums))
    gains = [1, *(common_gain([*ours.contributions[m]]) for m in scales[1:])]
    columns = ["input", "VQ-VAE 2", *(_sum_label(m) for m in scales)]
    columns += [f"MS-VQVAE\ncontribution {m}, x {gains[m]}" for m in scales[1:]]
    labels, rows = [], []
    for i, image in enumerate(images):
        labels.append(
            f"PSNR dB\nVQ-VAE 2\n{_psnr(base, image, i)}\nMS-VQVAE\n{_psnr(ours, image, i)}"
        )
        row = [image, to_uint8(base.sums[-1][i]), *(to_uint8(s[i]) for s in ours.sums)]
        rows.append(row + [signed_to_uint8(ours.contributions[m][i], gains[m]) for m in scales[1:]])
    title = "Held-out photographs: partial sums and contributions"
    save_png(path, rows, row_labels=labels, column_labels=columns, title=title)


def _draw_crops(path: Path, images: Tensor, base: _View, ours: _View) -> None:
    """The most detailed window of every image, enlarged with sharp pixel edges."""
    window = images.shape[-1] // _ZOOM
    rows: list[Sequence[Tensor]] = []
    for i, image in enumerate(images):
        top, left = _most_detailed(image, window)
        pictures = [image, to_uint8(base.sums[-1][i]), *(to_uint8(s[i]) for s in ours.sums)]
        crops = [p[:, top : top + window, left : left + window] for p in pictures]
        rows.append([_enlarged(crop) for crop in crops])
    columns = ["input", "VQ-VAE 2", *(_sum_label(m) for m in range(len(ours.sums)))]
    title = f"Windows of {window} pixels with the most detail, enlarged {_ZOOM} times"
    save_png(path, rows, column_labels=columns, title=title)


def _draw_codes(path: Path, models: Mapping[str, MSVQVAE | VQVAE2], found: _Found) -> None:
    rows = []
    for name in models:
        usage = found.usage[name]
        labels = [f"{u.usage:.0f} % used, perplexity {u.perplexity:.0f}" for u in usage]
        rows.append([histogram(u.counts, label=t) for u, t in zip(usage, labels, strict=True)])
    latents = next(iter(models.values())).config.latents
    columns = [f"scale {m}, {side}x{side}" for m, side in enumerate(latents)]
    names = ["VQ-VAE 2", "MS-VQVAE"]
    title = f"Use of the codebooks over {found.tiles} held-out tiles"
    save_png(path, rows, row_labels=names, column_labels=columns, title=title)


def _draw_spectrum(path: Path, power: Mapping[str, Tensor]) -> dict[str, float | None]:
    cycles = torch.arange(1, len(power["image"]) + 1).double()
    parts = ["image", *(name for name in power if " C_" in name)]
    wholes = [name for name in power if name not in parts[1:]]
    charts = [
        curve_chart(
            {name: power[name] for name in names},
            x=cycles,
            x_label="cycles per tile",
            y_label="power, mean over held-out tiles",
        )
        for names in (parts, wholes)
    ]
    columns = ["what each scale contributes", "whole reconstructions"]
    save_png(path, [charts], column_labels=columns, title="Radial power spectrum")
    return {name: _half_power(p) for name, p in power.items()}


def _half_power(power: Tensor) -> float | None:
    """Frequency below which half the power lies, between rings by linear interpolation.

    None without any power, as of a set of black images.
    """
    rings = torch.arange(1, len(power) + 1).double()
    # A ring of k cycles has a circumference, and so a number of frequencies, in proportion to k.
    total = (power * rings).cumsum(0)
    half = float(total[-1]) / 2
    if half == 0:
        return None
    k = int((total < half).sum())
    below = float(total[k - 1]) if k else 0.0
    return k + 0.5 + (half - below) / (float(total[k]) - below)


def _sum_label(m: int) -> str:
    return "MS-VQVAE\nscale 0 alone" if m == 0 else f"MS-VQVAE\nsum of 0..{m}"


def _psnr(view: _View, image: Tensor, i: int) -> str:
    error = mse(to_unit_range(view.sums[-1][i : i + 1].cpu()), to_unit_range(to_float(image)[None]))
    return f"{float(psnr_from_mse(error)):.2f}"


def _most_detailed(image: Tensor, window: int) -> tuple[int, int]:
    """Top left corner of the window with the most squared differences between neighbours."""
    grey = image.double().mean(dim=0)
    energy = F.pad(grey.diff(dim=0).square(), (0, 0, 0, 1))
    energy = energy + F.pad(grey.diff(dim=1).square(), (0, 1, 0, 0))
    step = max(1, window // 8)
    total = F.avg_pool2d(energy[None, None], window, stride=step)[0, 0]
    place = int(total.argmax())
    return place // total.shape[1] * step, place % total.shape[1] * step


def _enlarged(crop: Tensor) -> Tensor:
    return crop.repeat_interleave(_ZOOM, dim=1).repeat_interleave(_ZOOM, dim=2)
