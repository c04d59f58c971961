"""What both priors share: one transformer per scale, checks, saving and loading."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from msvq_fast.nn.outputs import register_output
from msvq_fast.nn.saved import build_and_load, check_no_run, save_weights
from msvq_fast.ops.checks import InputError, may_read
from msvq_fast.priors.transformer import PriorConfig, ScaleTransformer

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclass
class PriorOutput:
    """What a training forward returns.

    Attributes:
        loss: ``()``, the sum over the scales of the mean cross-entropy per counted code.
        nll: ``(M,)``, mean cross-entropy per counted code in nats, no gradient.

    Both are float32, of a float64 prior float64.
    """

    loss: Tensor
    nll: Tensor


register_output(PriorOutput)


class Prior(nn.Module, ABC):
    """A distribution over code grids, coarse to fine: ``p(s_0) p(s_1 | s_0) ...``.

    Args:
        config: Sizes.
        backend: As in `msvq_fast.ops.local_attention`. Not saved.
    """

    order: ClassVar[str]

    def __init__(self, config: PriorConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.scales = nn.ModuleList(
            ScaleTransformer(config, m, order=self.order, backend=backend)
            for m in range(config.num_scales)
        )

    @abstractmethod
    def draw_scale(
        self,
        scale: int,
        coarser: Sequence[Tensor],
        *,
        batch: int,
        seed: int,
        first: int | Tensor,
        labels: Tensor | None,
        fixed: Tensor | None,
    ) -> Tensor:
        """Codes ``(B, h, w)`` of one scale; settings are the subclass's."""

    def scale_model(self, scale: int) -> ScaleTransformer:
        """The transformer of a scale."""
        model = self.scales[scale]
        assert isinstance(model, ScaleTransformer)
        return model

    def image_numbers(self, first: int | Tensor, batch: int) -> Tensor:
        """The ``first`` of `draw_scale` as a number per image ``(B,)``."""
        device = next(self.parameters()).device
        if not isinstance(first, Tensor):
            return torch.arange(first, first + batch, device=device)
        _check_int64("first", first, (batch,))
        return first.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / WEIGHTS_FILE)
        text = json.dumps({"model": type(self).__name__, **dataclasses.asdict(self.config)})
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, backend: str | None = None) -> Self:
        """Load from a folder that `save_pretrained` wrote, as a checkpoint of a run is one.

        The prior is in training mode, as any new module.

        Raises:
            InputError: If a file is missing or corrupt, or holds another model.
        """
        check_no_run(Path(folder))
        path = Path(folder) / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            name = values.pop("model")
            config = PriorConfig(**values)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; expected a folder of a prior") from None
        except Exception as error:  # values of any type meet the checks
            raise InputError(f"{path} is not the configuration of a prior: {error}") from None
        if name != cls.__name__:
            raise InputError(f"{path} holds a {name}; expected a {cls.__name__}")
        return build_and_load(lambda: cls(config, backend=backend), Path(folder) / WEIGHTS_FILE)

    def check_codes(
        self,
        codes: Sequence[Tensor],
        labels: Tensor | None,
        *,
        name: str = "codes",
        batch: int | None = None,
    ) -> None:
        """Raise one clear line for codes or labels that do not fit.

        Args:
            codes: Grids ``(B, h_m, w_m)`` of the first scales.
            labels: ``(B,)`` or None.
            name: What the caller calls the codes.
            batch: B; None is that of the codes.
        """
        grids = self.config.grids
        if not 1 <= len(codes) <= len(grids):
            raise InputError(f"{name} has {len(codes)} grids; expected 1 to {len(grids)}")
        batch = codes[0].shape[0] if batch is None else batch
        self._check_grids(name, codes, batch)
        self._check_labels(labels, batch)

    def check_draw(
        self,
        scale: int,
        coarser: Sequence[Tensor],
        batch: int,
        labels: Tensor | None,
        fixed: Tensor | None,
    ) -> None:
        """Raise one clear line for what a scale cannot be drawn from."""
        grids, num_codes = self.config.grids, self.config.num_codes
        if not 0 <= scale < len(grids):
            raise InputError(f"scale={scale}; expected 0 <= scale < {len(grids)}")
        if len(coarser) != scale:
            raise InputError(f"coarser has {len(coarser)} grids; expected {scale}, those before")
        self._check_grids("coarser", coarser, batch)
        if fixed is not None:
            _check_int64("fixed", fixed, (batch, *grids[scale]))
            if may_read(fixed) and int(fixed.max()) >= num_codes:
                raise InputError(f"fixed has code {int(fixed.max())}; expected below {num_codes}")
        self._check_labels(labels, batch)

    def _check_grids(self, name: str, codes: Sequence[Tensor], batch: int) -> None:
        most = self.config.num_codes - 1
        for m, grid in enumerate(codes):
            _check_int64(f"{name}[{m}]", grid, (batch, *self.config.grids[m]))
            if may_read(grid) and not 0 <= int(grid.min()) <= int(grid.max()) <= most:
                raise InputError(
                    f"{name}[{m}] spans [{int(grid.min())}, {int(grid.max())}]; expected codes of "
                    f"0 to {most}"
                )

    def _check_labels(self, labels: Tensor | None, batch: int) -> None:
        if labels is None:
            return
        most = self.config.num_classes
        if most == 0:
            raise InputError("labels given; this prior has num_classes=0")
        _check_int64("labels", labels, (batch,))
        if may_read(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= most:
            raise InputError(
                f"labels span [{int(labels.min())}, {int(labels.max())}]; expected 0 to {most}, "
                "which stands for none"
            )


def _check_int64(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is a {type(tensor).__name__}; expected an int64 tensor {shape}")
    if tensor.shape != shape or tensor.dtype != torch.int64:
        raise InputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected int64 {shape}")
