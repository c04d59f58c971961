"""What MSVQVAE and VQVAE2 share: outputs, checks, codebooks, saving and loading."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from msvq_fast.models.checks import check_hierarchy, check_images
from msvq_fast.models.hub import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    local_folder,
    model_card,
    read_config,
    read_results,
    upload,
)
from msvq_fast.models.presets import AutoencoderConfig, preset_config
from msvq_fast.nn import VectorQuantizer
from msvq_fast.nn.blocks import Chain, Encoder, JoinedConv
from msvq_fast.nn.outputs import register_output
from msvq_fast.nn.saved import build_and_load, save_weights
from msvq_fast.ops.checks import InputError, check_at_least, check_choice

MEMORY_MODES = ("default", "sequential", "strips")
DEFAULT_STRIPS = 8


@dataclass
class MSVQVAEOutput:
    """What a forward pass returns; scale 0 is the coarsest.

    Attributes:
        loss: ``()``, Eq. 6: reconstruction and commitment terms of all scales.
        reconstruction_loss: ``(M,)``, mean squared error of every partial sum against its target,
            no gradient. VQ-VAE 2 has one.
        commitment_loss: ``(M,)``, β times the mean squared distance of latents to their codes, with
            gradient, for a loss of one's own on the partial sums.
        contributions: M images ``(B, 3, H, W)`` whose sum is the reconstruction. VQ-VAE 2 has one.
        codes: M grids ``(B, h_m, w_m)`` int64.
        code_counts: M histograms ``(K,)`` int64 of this batch's codes.

    Losses are float32, of a float64 model float64.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor
    contributions: list[Tensor]
    codes: list[Tensor]
    code_counts: list[Tensor]

    def partial(self, upto: int | None = None) -> Tensor:
        """Reconstruction ``Σ_{m<=upto} C_m`` ``(B, 3, H, W)``; None sums all (Eq. 5)."""
        return sum_contributions(self.contributions, upto)

    @property
    def usage(self) -> Tensor:
        """``(M,)`` percent of the codes that this batch uses, in [0, 100]."""
        return torch.stack([100.0 * (n > 0).float().mean() for n in self.code_counts])

    @property
    def perplexity(self) -> Tensor:
        """``(M,)`` exp of the entropy of this batch's codes, in [1, K]."""
        return torch.stack([_perplexity(n) for n in self.code_counts])


register_output(MSVQVAEOutput)


def sum_contributions(contributions: Sequence[Tensor], upto: int | None = None) -> Tensor:
    """``Σ_{m<=upto} C_m`` ``(B, 3, H, W)``, all of them by default (Eq. 5)."""
    last = len(contributions) - 1 if upto is None else upto
    if not 0 <= last < len(contributions):
        raise InputError(f"upto={upto}; expected 0 <= upto < {len(contributions)}")
    total = contributions[0]
    for contribution in contributions[1 : last + 1]:
        total = total + contribution
    return total


def _perplexity(counts: Tensor) -> Tensor:
    p = counts.double() / counts.sum().clamp_min(1)
    return torch.special.entr(p).sum().exp().float()


class Autoencoder(nn.Module, ABC):
    """A hierarchy of quantized grids; subclasses say how grids become images.

    Args:
        config: Sizes and settings.
        backend: None picks the fastest kernels; ``"reference"`` is plain PyTorch with the same
            state_dict and the same results. Not saved with the model.
        memory: What a training step keeps, see `set_memory`. Not saved with the model.
    """

    config_class: ClassVar[type[AutoencoderConfig]]
    config: AutoencoderConfig
    encoder: Encoder

    def __init__(
        self, config: AutoencoderConfig, *, backend: str | None = None, memory: str = "default"
    ) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise InputError(
                f"config is a {type(config).__name__}; {type(self).__name__} takes a "
                f"{self.config_class.__name__}"
            )
        self.config = config
        self.backend = backend
        self.set_memory(memory)

    def set_memory(self, mode: str, *, strips: int = DEFAULT_STRIPS) -> None:
        """Choose between keeping activations and computing them again in the backward.

        All modes give the same codes, the same codebooks and, up to the order of sums, the same
        losses and gradients. Codes are found once, in the forward.

        Args:
            mode: ``"default"`` keeps every activation. ``"sequential"`` runs each decoder, and the
                encoder down to its finest features, again when the backward reaches it, one after
                the other: at any time only one of them has activations. ``"strips"`` does so strip
                by strip of the image's rows, each strip with the rows that it depends on.
            strips: How many; more need less memory and compute more rows twice.

        Raises:
            InputError: For an unknown mode or a number below 1.
        """
        check_choice("memory", mode, MEMORY_MODES)
        check_at_least(1, strips=strips)
        self.memory, self.strips = mode, strips

    def compile_parts(self, **options: Any) -> None:
        """Compile the convolutions on their own: what a memory mode runs again is run compiled.

        Args:
            **options: As ``torch.compile`` takes them. Parts that run in strips stay eager.
        """
        for part in self.modules():
            if isinstance(part, Chain):
                part.compile(**options)

    def _choose_layers(self) -> None:
        """Once all parts are there: the reference runs layer by layer."""
        for part in self.modules():
            if isinstance(part, Chain):
                part.joined = self.backend != "reference"

    def _build_quantizers(self, context: Sequence[int]) -> None:
        """1x1 convolutions to the latents and codebooks; ``context[m]`` channels join scale m."""
        config = self.config
        self.to_latent = nn.ModuleList(
            JoinedConv(config.width + channels, config.code_dim) for channels in context
        )
        self.quantizers = nn.ModuleList(
            VectorQuantizer(
                config.num_codes,
                config.code_dim,
                commitment_weight=config.commitment_weight,
                decay=config.decay,
                restart_below=config.restart_below,
                gradient=config.gradient,
                backend=self.backend,
            )
            for _ in context
        )

    @classmethod
    def from_preset(cls, name: str, *, backend: str | None = None, **overrides: Any) -> Self:
        """Build a preset of this model with fresh weights; ``overrides`` replace config fields."""
        return cls(preset_config(name, **overrides), backend=backend)

    @property
    def num_scales(self) -> int:
        """M, the number of grids."""
        return self.config.num_scales

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.config.stride

    @abstractmethod
    def contributions(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Images ``(B, 3, H, W)`` that the given grids stand for, to be summed (Eq. 5)."""

    @abstractmethod
    def _condition(self, m: int, z_q: Tensor) -> Tensor | None:
        """z_d,m for scale m + 1 of z_q,m ``(B, D, h_m, w_m)``; the finest scale has none."""

    def encode(self, x: Tensor) -> list[Tensor]:
        """Codes of images ``(B, 3, H, W)`` in [-1, 1]: M grids ``(B, h_m, w_m)`` int64."""
        self._check_image(x)
        return self._encode(x)

    def _encode(
        self, x: Tensor, prepare: Callable[[int, Tensor], None] | None = None
    ) -> list[Tensor]:
        """Codes of ``x``, coarse to fine; ``prepare(m, z)`` sees z_e,m before it is quantized."""
        codes = []
        z_d = None
        for m, feature in enumerate(self._features(x)):
            z = self._latent(m, feature, z_d)
            if prepare is not None:
                prepare(m, z)
            codes.append(self._quantizer(m).encode(z))
            z_d = self._condition(m, self._lookup(m, codes[m]))
        return codes

    def latents(self, x: Tensor, codes: Sequence[Tensor]) -> list[Tensor]:
        """z_e,m ``(B, D, h_m, w_m)`` of images before they are quantized, coarse to fine.

        Args:
            x: Images ``(B, 3, H, W)`` in [-1, 1].
            codes: M grids ``(B, h_m, w_m)`` int64; scale m is computed given those below m.
        """
        self._check_image(x)
        check_hierarchy(codes, self.num_scales, whole=True)
        shape = (x.shape[0], *(side // self.stride for side in x.shape[2:]))
        if codes[0].shape != shape:
            raise InputError(
                f"codes[0] has shape {tuple(codes[0].shape)}; expected {shape} for x of "
                f"{tuple(x.shape)}"
            )
        found: list[Tensor] = []
        z_d = None
        for m, feature in enumerate(self._features(x)):
            found.append(self._latent(m, feature, z_d))
            z_d = self._condition(m, self._lookup(m, codes[m]))
        return found

    def decode(self, codes: Sequence[Tensor], upto: int | None = None) -> Tensor:
        """Images ``(B, 3, H, W)`` of code grids, linear output near [-1, 1].

        Args:
            codes: Grids ``(B, h_m, w_m)`` int64, coarse to fine.
            upto: Last scale that is summed; None takes all that are given.
        """
        return sum_contributions(self.contributions(codes), upto)

    def reconstruct(self, x: Tensor, upto: int | None = None) -> Tensor:
        """``decode(encode(x), upto)`` ``(B, 3, H, W)``."""
        return self.decode(self.encode(x), upto)

    def defer_codebook_updates(self, defer: bool = True) -> None:
        """Collect statistics in training forwards; only `update_codebooks` moves the codebooks."""
        for quantizer in self._quantizers():
            quantizer.defer_updates = defer

    @torch.no_grad()
    def initialise_codebooks(self, x: Tensor) -> None:
        """Start every codebook as k-means of the latents of images ``(B, 3, H, W)`` in [-1, 1]."""
        self._check_image(x)
        self._encode(x, lambda m, z: self._quantizer(m).initialise(z))

    def code_statistics(self) -> list[tuple[Tensor, ...]]:
        """Statistics per scale, see `VectorQuantizer.code_statistics`, to exchange in place."""
        return [quantizer.code_statistics() for quantizer in self._quantizers()]

    def update_codebooks(self) -> None:
        """Apply the collected statistics once (Eq. 3-4)."""
        for quantizer in self._quantizers():
            quantizer.update_codebook()

    def save_pretrained(self, folder: str | Path, *, results: str | Path | None = None) -> None:
        """Write weights, ``config.json`` and a model card ``README.md``.

        Args:
            folder: Made if missing.
            results: The ``results.json`` of an evaluation of this very model, for the card.

        Raises:
            InputError: If weights are sharded, or ``results`` cannot be read or is of others.
        """
        for name, tensor in self.state_dict().items():
            if hasattr(tensor, "full_tensor"):
                raise InputError(
                    f"{name} is sharded over processes; expected whole weights: load what "
                    "get_model_state_dict gathers (full_state_dict=True) into another model"
                )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / WEIGHTS_FILE)
        values = {"model": type(self).__name__, **dataclasses.asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")
        measured = None if results is None else read_results(results, folder)
        parameters = sum(p.numel() for p in self.parameters())
        (folder / CARD_FILE).write_text(model_card(values, parameters, measured), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path, *, backend: str | None = None) -> Self:
        """Load from a folder that `save_pretrained` wrote, or a hub repository ``owner/name``.

        A checkpoint of a run is such a folder. The model is in training mode, as any new module.

        Raises:
            InputError: If a file is missing or corrupt, or holds another model.
        """
        folder = local_folder(source)
        values = read_config(folder)
        name = values.pop("model")
        if name != cls.__name__:
            raise InputError(f"{folder / CONFIG_FILE} holds a {name}; expected a {cls.__name__}")
        try:
            config = cls.config_class(**values)
        except TypeError as error:
            raise InputError(f"{folder / CONFIG_FILE} does not fit this version: {error}") from None
        return build_and_load(lambda: cls(config, backend=backend), folder / WEIGHTS_FILE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        results: str | Path | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the hub; return the address of the commit.

        Args:
            repo_id: ``owner/name``, made if missing.
            private: Of a repository that is made.
            token: None and True take the one of ``hf auth login``, False takes none.
            results: As in `save_pretrained`.

        Raises:
            InputError: As `save_pretrained`, or with what the hub says, in one line.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, results=results)
            return upload(Path(folder), repo_id, private=private, token=token)

    def _features(self, x: Tensor) -> list[Tensor]:
        """The encoder's feature maps ``(B, width, h_m, w_m)``, coarsest first."""
        return self.encoder(x, run=self._replayed)

    def _replayed(self, part: nn.Module, x: Tensor) -> Tensor:
        """``part(x)``, kept for the backward or run again, as the memory mode says."""
        if self.memory == "default":
            return part(x)
        # Here, since it loads torch.compile: a second that no other mode has to wait for.
        from msvq_fast.nn.replay import replay

        return replay(part, x, strips=self.strips if self.memory == "strips" else 1)

    def _latent(self, m: int, feature: Tensor, z_d: Tensor | None) -> Tensor:
        """z_e,m ``(B, D, h_m, w_m)`` of the encoder's features and the coarser scale's z_d."""
        return self.to_latent[m](feature, z_d)

    def _lookup(self, m: int, codes: Tensor) -> Tensor:
        """z_q,m ``(B, D, h_m, w_m)`` of codes, in the dtype of the weights."""
        return self._quantizer(m).lookup(codes).to(next(self.parameters()).dtype)

    def _quantizer(self, m: int) -> VectorQuantizer:
        quantizer = self.quantizers[m]
        assert isinstance(quantizer, VectorQuantizer)
        return quantizer

    def _quantizers(self) -> list[VectorQuantizer]:
        return [self._quantizer(m) for m in range(self.num_scales)]

    def _check_image(self, x: Tensor) -> None:
        check_images(x, next(self.parameters()), self.stride)
