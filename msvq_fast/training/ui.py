"""``msvq ui``: a page that takes an image and shows what every scale makes of it."""

from __future__ import annotations

import importlib
import itertools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msvq_fast import priors
from msvq_fast.data import (
    code_map,
    read_centre,
    signed_to_uint8,
    to_float,
    to_uint8,
)
from msvq_fast.metrics import mse, psnr_from_mse, to_unit_range
from msvq_fast.models import MSVQVAE, VQVAE2
from msvq_fast.ops import InputError
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.distributed import choose_device
from msvq_fast.training.inference import inference_mode, load_model
from msvq_fast.training.reconstruct import common_gain
from msvq_fast.training.sample import check_match
from msvq_fast.training.share_config import UiConfig

MOST_DRAWINGS = 8
_LEAST_SIDE = 256  # pixels of a picture on the page
Shown = list[tuple[Any, str]]  # pictures (H, W, 3) uint8 as NumPy arrays, and what they are


class Viewer:
    """A model, maybe with a prior over its codes, that turns an image file into pictures.

    Args:
        model: Left in its mode.
        prior: Of this very model's codes, at its resolution; None cannot draw.
        device: Where both run.

    Raises:
        InputError: For a prior of images of another size, which the page does not show.
    """

    def __init__(
        self,
        model: MSVQVAE | VQVAE2,
        prior: AutoregressivePrior | MaskGITPrior | None,
        device: torch.device,
    ) -> None:
        grids = tuple((side, side) for side in model.config.latents)
        if prior is not None and prior.config.grids != grids:
            raise InputError(
                f"prior draws grids {prior.config.grids}; the page shows images of "
                f"{model.config.resolution} px, whose grids are {grids}"
            )
        self.model, self.prior, self.device = model.to(device), prior, device
        if prior is not None:
            prior.to(device).eval()
        # The page calls from several threads: one could end the mode that another one runs in.
        self._alone = threading.Lock()

    def read(self, path: str | Path) -> Tensor:
        """The centre of an image as the model takes it: ``(1, 3, S, S)`` in [-1, 1]."""
        size = self.model.config.resolution
        return to_float(read_centre(path, size, size).to(self.device))[None]

    def look(self, path: str | Path) -> tuple[Shown, Shown, Shown]:
        """Partial sums, contributions and token maps of an image, coarse to fine."""
        x = self.read(path)
        with self._alone, inference_mode(self.model):
            codes = self.model.encode(x)
            parts = [part.float() for part in self.model.contributions(codes)]
        sums: Shown = [(_picture(to_uint8(x[0])), "image")]
        for m, partial in enumerate(itertools.accumulate(parts)):
            error = mse(to_unit_range(partial), to_unit_range(x))
            named = f"sum of 0..{m}" if m else "sum of 0" if len(parts) > 1 else "reconstruction"
            caption = f"{named}, PSNR {float(psnr_from_mse(error)):.1f} dB"
            sums.append((_picture(to_uint8(partial[0])), caption))
        contributions: Shown = []
        for m, part in enumerate(parts):
            gain = common_gain([part]) if m else 1
            shown = signed_to_uint8(part[0], gain) if m else to_uint8(part[0])
            how = f" around grey, x {gain}" if m else ""
            contributions.append((_picture(shown), f"contribution {m}{how}"))
        return sums, contributions, [self._map(m, grid[0]) for m, grid in enumerate(codes)]

    def redraw(self, path: str | Path, count: int | None, seed: int | None) -> Shown:
        """The image with its details drawn anew ``count`` times; the codes of scale 0 stay.

        Raises:
            InputError: Without a prior, for a count out of 1 to 8, or for an emptied field (None).
        """
        if self.prior is None:
            raise InputError("prior=None; drawing needs one")
        if count is None or not 1 <= count <= MOST_DRAWINGS:
            raise InputError(f"count={count}; expected 1 to {MOST_DRAWINGS}")
        if seed is None:
            raise InputError("seed=None; expected a whole number")
        with self._alone, inference_mode(self.model):
            coarse = self.model.encode(self.read(path))[0].expand(count, -1, -1)
            codes = priors.sample(self.prior, count, seed=seed, coarser=[coarse])
            images = self.model.decode(codes).float()
        return [(_picture(to_uint8(image)), f"drawing {i}") for i, image in enumerate(images)]

    def _map(self, m: int, grid: Tensor) -> tuple[Any, str]:
        colours, used = code_map(grid, self.model.config.num_codes), len(grid.unique())
        return _picture(colours), f"codes {m}, {grid.shape[0]}x{grid.shape[1]}, {used} different"


def build_page(viewer: Viewer) -> Any:
    """The gradio page of a viewer."""
    gradio = importlib.import_module("gradio")

    def guarded(call: Any, path: str | None, *values: Any) -> Any:
        try:
            if path is None:
                raise InputError("no image yet; upload one first")
            return call(path, *values)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    config = viewer.model.config
    name = f"{type(viewer.model).__name__}, {config.resolution} px"
    with gradio.Blocks(title=name, analytics_enabled=False) as page:
        gradio.Markdown(
            f"## {name}: {config.num_scales} scales of {config.num_codes} codes\n"
            f"The centre of the image is resized to {config.resolution} pixels."
        )
        with gradio.Row():
            image = gradio.Image(type="filepath", label="Image", sources=["upload"], height=280)
            with gradio.Column():
                show = gradio.Button("Show", variant="primary", elem_id="show")
                if viewer.prior is not None:
                    count = gradio.Slider(1, MOST_DRAWINGS, value=4, step=1, label="Drawings")
                    seed = gradio.Number(0, precision=0, label="Seed")
                    draw = gradio.Button("Redraw details", elem_id="draw")
        names = {"sums": "Partial sums", "contributions": "Contributions", "maps": "Token maps"}
        # Not gradio's own WebP, which loses detail and colours.
        frame: dict[str, Any] = {"columns": 5, "height": "auto", "format": "png"}
        galleries = [
            gradio.Gallery(label=label, elem_id=key, object_fit="contain", **frame)
            for key, label in names.items()
        ]
        show.click(lambda path: guarded(viewer.look, path), image, galleries)
        if viewer.prior is not None:
            drawn = gradio.Gallery(label="Details drawn anew", elem_id="drawn", **frame)
            draw.click(
                lambda path, *numbers: guarded(
                    viewer.redraw, path, *(None if n is None else int(n) for n in numbers)
                ),
                [image, count, seed],
                drawn,
            )
    return page


def run_ui(config: UiConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        InputError: For a bad checkpoint or prior, a port that is taken, or if gradio is missing.
    """
    try:
        gradio = importlib.import_module("gradio")
    except ImportError:
        raise InputError(
            "msvq ui needs gradio, which is not installed: pip install 'msvq-fast[ui]'"
        ) from None
    device = choose_device(config.device)
    model_folder = find_model(config.checkpoint)
    model, prior = load_model(model_folder, device), None
    if config.prior is not None:
        prior_folder = find_model(config.prior)
        prior = priors.from_pretrained(prior_folder)
        check_match(prior, prior_folder, model, model_folder)
    page = build_page(Viewer(model, prior, device))
    # The fonts of the machine: the default theme's come from another site.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    print(f"http://{config.host}:{config.port} until Ctrl-C", flush=True)
    try:
        page.launch(server_name=config.host, server_port=config.port, theme=theme, quiet=True)
    except OSError as error:
        raise InputError(
            f"port={config.port} of host={config.host!r} cannot be used; is it taken? give another"
        ) from error


def _picture(image: Tensor) -> Any:
    """``(3, H, W)`` uint8 as an array ``(H, W, 3)``; small ones with larger pixels.

    A browser would blur what it enlarges itself.
    """
    times = max(1, _LEAST_SIDE // image.shape[-1])
    larger = image.cpu().repeat_interleave(times, 1).repeat_interleave(times, 2)
    return larger.permute(1, 2, 0).numpy()
