"""Images from a prior: coarse ones first, the unlikely thrown away, details drawn again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msvq_fast import priors
from msvq_fast.data import (
    read_centre,
    save_png,
    signed_to_uint8,
    to_float,
    to_uint8,
)
from msvq_fast.models import MSVQVAE, VQVAE2, sum_contributions, weights_digest
from msvq_fast.ops.checks import InputError
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior
from msvq_fast.priors.maskgit import halton_rank
from msvq_fast.training.checkpoint import STATE, find_model, read_state
from msvq_fast.training.distributed import choose_device, require_one_process
from msvq_fast.training.inference import inference_mode, load_model
from msvq_fast.training.prior_config import SampleConfig
from msvq_fast.training.progress import counting
from msvq_fast.training.results import check_picture, check_writable, write_json
from msvq_fast.training.sample_folder import SampleFolder, open_folder

_GROUPS = 4  # parts of a coarse grid that are predicted from the others
_COLUMNS = 8
_SHOWN = 64  # images in the grid where all are written to a folder
_GAIN = 4  # of the finer contributions, which are faint
_VARIATIONS_APART = 1 << 32  # numbers of draws, more than there are images


@torch.no_grad()
def coarse_scores(
    prior: AutoregressivePrior | MaskGITPrior, codes: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Mean log-probability in nats of every image's coarse codes ``(B, h_0, w_0)``: ``(B,)``.

    With ``labels (B,)`` it is given the classes. Of an autoregressive prior it is exact. Of MaskGIT
    it is a pseudo-likelihood: four interleaved quarters of the cells, each given the other three.
    """
    prior.check_codes([codes], labels)
    own = codes.flatten(1)
    if isinstance(prior, AutoregressivePrior):
        log_p = prior.logits([codes], labels)[0].double().log_softmax(-1)
        return log_p.gather(-1, own[..., None])[..., 0].mean(1)
    model = prior.scale_model(0)
    group = halton_rank(model.grids[0]).to(codes.device) % _GROUPS
    memory = model.context([], labels)
    total = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
    for number in range(_GROUPS):
        hidden = (group == number).expand_as(own)
        masked = own.masked_fill(hidden, model.num_codes)
        logits = model(model.embed(masked, labels), memory)
        log_p = logits.double().log_softmax(-1).gather(-1, own[..., None])[..., 0]
        total += log_p.masked_fill(~hidden, 0.0).sum(1)
    return total / own.shape[1]


def run_sample(config: SampleConfig) -> Path:
    """``msvq sample``: draw codes from coarse to fine, decode them and write images and a grid.

    Returns:
        The PNG file.

    Raises:
        InputError: For a bad prior, checkpoint, setting or output path, a folder with images of
            other settings, or several processes.
    """
    require_one_process("sample", "start it without torchrun")
    keep = config.check()
    device = choose_device(config.device)
    prior_folder, model_folder = find_model(config.prior), find_model(config.checkpoint)
    prior = priors.from_pretrained(prior_folder).to(device).eval()
    model = load_model(model_folder, device)
    check_match(prior, prior_folder, model, model_folder)
    settings = _sampling_settings(config, prior)
    labels = _labels(config, prior, prior_folder).to(device) if config.labels else None
    out = check_picture(config.out, [Path(config.inpaint)] if config.inpaint else [])
    if config.folder is not None and Path(config.folder).resolve() in out.resolve().parents:
        raise InputError(
            f"out={config.out!r} lies in folder={config.folder!r}; the grid is no image of the set"
        )
    check_writable(out.parent)
    shown = keep if config.folder is None else min(keep, _SHOWN)
    total = config.images + keep * config.variations
    with (
        _open_folder(config, prior_folder, model_folder) as folder,
        inference_mode(model),
        counting("drawings", total) as progress,
    ):
        fixed, picture = None, None
        if config.inpaint is not None:
            picture, fixed = _inpainting(config, model, prior, device)
        start = time.perf_counter()
        draws = _Draws(prior, config, labels, fixed, settings, progress)
        coarse = draws.coarse(keep, device)
        images = [
            _finish(model, draws, coarse, variation, shown, folder)
            for variation in range(config.variations)
        ]
        seconds = time.perf_counter() - start
    _write_grid(out, config, images, coarse.kept[:shown].tolist(), picture)
    kept = coarse.kept.tolist()
    rate = draws.finished / seconds
    record = {
        "settings": dataclasses.asdict(config),
        "kept": kept,
        **({"labels": [_label(config, i) for i in kept]} if config.labels else {}),
        "scores": coarse.scores,
        "images_per_second": rate,
    }
    write_json(out.with_suffix(".json"), record)
    print(f"{draws.finished} images in {seconds:.2f} s, {rate:.2f} images/s; wrote {out}")
    if folder is not None:
        print(f"{keep * config.variations} images in {folder.folder}")
    return out


class _Coarse(NamedTuple):
    """Coarse images: codes and scores of all in the order they were drawn, numbers of the kept."""

    codes: Tensor
    scores: list[float]
    kept: Tensor


class _Draws:
    """Draws by the numbers of coarse images; ``labels (images,)`` are their classes."""

    def __init__(
        self,
        prior: AutoregressivePrior | MaskGITPrior,
        config: SampleConfig,
        labels: Tensor | None,
        fixed: list[Tensor] | None,
        settings: dict[str, Any],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.prior, self.config, self.labels, self.fixed = prior, config, labels, fixed
        self.settings, self.progress = settings, progress
        self.done = self.finished = 0

    def coarse(self, keep: int, device: torch.device) -> _Coarse:
        """Draw all coarse images and choose which are kept."""
        numbers = torch.arange(self.config.images, device=device)
        batches = numbers.split(self.config.batch_size)
        codes = torch.cat([self._draw(part, part, upto=0)[0] for part in batches])
        scores = torch.cat(
            [coarse_scores(self.prior, codes[part], self._classes(part)) for part in batches]
        )
        best = scores.argsort(descending=True, stable=True)[:keep]
        kept = best if self.config.reject is not None else numbers[:keep]
        return _Coarse(codes, scores.tolist(), kept)

    def finish(self, images: Tensor, coarse: Tensor, variation: int) -> list[Tensor]:
        """Codes of every scale of ``images`` with these coarse ones."""
        self.finished += len(images)
        return self._draw(images, images + variation * _VARIATIONS_APART, coarser=[coarse])

    def skip(self, count: int) -> None:
        """Count images that need no drawing."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done)

    def _draw(self, images: Tensor, first: Tensor, **options: Any) -> list[Tensor]:
        own = self.fixed and [f.expand(len(images), -1, -1) for f in self.fixed]
        codes = priors.sample(
            self.prior,
            len(images),
            seed=self.config.seed,
            first=first,
            labels=self._classes(images),
            fixed=own,
            settings=self.settings,
            **options,
        )
        self.skip(len(images))
        return codes

    def _classes(self, images: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[images]


def _finish(
    model: MSVQVAE | VQVAE2,
    draws: _Draws,
    coarse: _Coarse,
    variation: int,
    shown: int,
    folder: SampleFolder | None,
) -> list[list[Tensor]]:
    """Draw, decode and write one variation of the kept images.

    Returns:
        Batches of the contributions of the first ``shown``: no more are in memory.
    """
    batches = []
    for part in coarse.kept.split(draws.config.batch_size):
        names = [_name(image, variation, draws.config.variations) for image in part.tolist()]
        if shown <= 0 and folder is not None and all(map(folder.has, names)):
            draws.skip(len(part))
            continue
        contributions = _decode(model, draws.finish(part, coarse.codes[part], variation))
        if folder is not None:
            for name, image in zip(names, to_uint8(sum_contributions(contributions)), strict=True):
                folder.write(name, image)
        if shown > 0:
            batches.append([c[:shown] for c in contributions])
        shown -= len(part)
    return batches


def _name(image: int, variation: int, variations: int) -> str:
    return f"{image:06d}" + (f"-{variation}" if variations > 1 else "")


def _open_folder(
    config: SampleConfig, prior_folder: Path, model_folder: Path
) -> AbstractContextManager[SampleFolder | None]:
    if config.folder is None:
        return nullcontext()
    settings = dataclasses.asdict(config)
    for name in ("prior", "checkpoint", "out", "folder", "batch_size", "device"):
        del settings[name]
    settings["prior_sha256"] = weights_digest(prior_folder)
    settings["weights_sha256"] = weights_digest(model_folder)
    return open_folder(Path(config.folder), settings)


def _decode(model: MSVQVAE | VQVAE2, codes: list[Tensor]) -> list[Tensor]:
    return [part.float().cpu() for part in model.contributions(codes)]


def _write_grid(
    out: Path,
    config: SampleConfig,
    images: Sequence[Sequence[Sequence[Tensor]]],
    numbers: Sequence[int],
    picture: Tensor | None,
) -> None:
    """Contributions above, the image they sum to below, as Fig. 5."""
    # Per variation the contributions (numbers, 3, H, W).
    parts = [[torch.cat(part) for part in zip(*batches, strict=True)] for batches in images]
    scales = len(parts[0])
    rows: list[list[Tensor | None]] = []
    labels: list[str] = []
    names = [
        f"contribution {m}" + (f"\naround grey, x {_GAIN}" if m else "") for m in range(scales)
    ]
    columns = [(v, i) for i in range(len(numbers)) for v in range(config.variations)]
    width = config.variations if config.variations > 1 else _COLUMNS
    for first in range(0, len(columns), width):
        block = columns[first : first + width]
        extra: list[Tensor | None] = [] if picture is None else [None]
        if scales > 1:
            for m in range(scales):
                shown = [parts[v][m][i] for v, i in block]
                pictures = [signed_to_uint8(c, _GAIN) if m else to_uint8(c) for c in shown]
                rows.append([*extra, *pictures])
                labels.append(names[m])
        sums = [to_uint8(sum_contributions([p[i : i + 1] for p in parts[v]])[0]) for v, i in block]
        rows.append([*([] if picture is None else [picture]), *sums])
        number = f" {numbers[block[0][1]]}" if config.variations > 1 else ""
        shown_classes = dict.fromkeys(_label(config, numbers[i]) for _, i in block)
        labels.append("\n".join([f"image{number}", *filter(None, shown_classes)]))
    save_png(out, rows, row_labels=labels)


def _inpainting(
    config: SampleConfig,
    model: MSVQVAE | VQVAE2,
    prior: AutoregressivePrior | MaskGITPrior,
    device: torch.device,
) -> tuple[Tensor, list[Tensor]]:
    """The image with a grey hole, and its codes ``(1, h_m, w_m)``, -1 where they are drawn."""
    assert config.inpaint is not None
    height, width = (side * model.stride for side in prior.config.grids[0])
    image = read_centre(config.inpaint, height, width)
    codes = model.encode(to_float(image.to(device))[None])
    fixed = []
    for grid in codes:
        hole = _hole(config, *grid.shape[1:])
        fixed.append(grid.masked_fill(hole.to(device), -1))
    coarse = _hole(config, *codes[0].shape[1:]).float()
    if not coarse.any():
        raise InputError(f"region={tuple(config.region)} holds no cell of the coarsest grid")
    shown = F.interpolate(coarse[None, None], size=(height, width))[0, 0].bool()
    return image.masked_fill(shown, 128), fixed


def _hole(config: SampleConfig, height: int, width: int) -> Tensor:
    """Cells ``(h, w)`` whose centres lie in the region."""
    top, left, bottom, right = config.region
    y = (torch.arange(height) + 0.5)[:, None] / height
    x = (torch.arange(width) + 0.5) / width
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def check_match(
    prior: AutoregressivePrior | MaskGITPrior,
    prior_folder: Path,
    model: MSVQVAE | VQVAE2,
    model_folder: Path,
) -> None:
    """Raise `InputError` unless the prior draws codes of this very model."""
    sizes, latents = prior.config, model.config.latents
    first = sizes.grids[0]
    fits = sizes.num_scales == len(latents) and sizes.num_codes == model.config.num_codes
    ratio = [side // latents[0] for side in latents]
    if not fits or any(
        grid != (first[0] * r, first[1] * r) for grid, r in zip(sizes.grids, ratio, strict=True)
    ):
        raise InputError(
            f"{prior_folder} draws grids {sizes.grids} of {sizes.num_codes} codes; {model_folder} "
            f"has latents {latents} of {model.config.num_codes}"
        )
    if (prior_folder / STATE).is_file():
        learnt = read_state(prior_folder)["model_config"].get("weights_sha256")
        if learnt is not None and learnt != weights_digest(model_folder):
            raise InputError(
                f"{prior_folder} learnt codes of another model than {model_folder}; their meaning "
                "differs"
            )


def _labels(
    config: SampleConfig, prior: AutoregressivePrior | MaskGITPrior, folder: Path
) -> Tensor:
    """Numbers of the classes of all coarse images ``(images,)``."""
    state = read_state(folder)["model_config"] if (folder / STATE).is_file() else {}
    # A prior that no run of train-prior saved knows its classes by number alone.
    classes = state.get("classes", [str(number) for number in range(prior.config.num_classes)])
    assert config.labels is not None
    for name in map(str, config.labels):
        if name not in classes:
            known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
            expected = f"one of its {len(classes)} classes, {known}" if classes else "null"
            raise InputError(f"labels: {folder} learnt no class {name!r}; expected {expected}")
    return torch.tensor([classes.index(_label(config, i)) for i in range(config.images)])


def _label(config: SampleConfig, image: int) -> str:
    """Name of the class of a coarse image, or nothing."""
    return str(config.labels[image % len(config.labels)]) if config.labels else ""


def _sampling_settings(
    config: SampleConfig, prior: AutoregressivePrior | MaskGITPrior
) -> dict[str, Any]:
    if config.variations > 1 and prior.config.num_scales == 1:
        raise InputError(
            f"variations={config.variations}; expected 1: this prior has one scale, so they would "
            "all be the same"
        )
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("temperature", "top_k", "top_p")
    }
    for name in ("steps", "choice_temperature", "guidance", "order"):
        value = getattr(config, name)
        if value is None:
            continue
        if not isinstance(prior, MaskGITPrior):
            raise InputError(f"{name}={value} is of maskgit; this prior is autoregressive")
        settings[name] = value
    return settings
