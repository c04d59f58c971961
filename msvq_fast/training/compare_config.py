"""What a comparison is made of. Free of torch: the command line builds its help from here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from msvq_fast.training.config import EvaluateConfig, ModelOverrides, TrainConfig

BASELINE = "vqvae2-"  # in front of a preset: the same latents in the paper's baseline


@dataclass
class CompareConfig:
    """What ``msvq compare`` trains and judges; started again it goes on where it was stopped.

    Every (model, seed) is a run of its own below ``out``. Processes with other seeds and the same
    ``out`` share the work; a last call with all seeds only reports.

    Attributes:
        preset: Preset of MS-VQVAE; VQ-VAE 2 is the preset of the same latents.
        data: A folder of images, ``builtin:photos``, ``wds:SHARDS`` or ``hf:NAME[:SPLIT]``; trained
            on train, judged on val.
        pictures: Data whose val images the figures show; None is ``data``.
        out: Folder for runs, comparison.json, table.txt and the figures.
        seeds: Of weights, data order and crops; both models see the same crops.
        width_scale: Factor on the channels of both models.
        resolution: Side of the crops in pixels; the latent grids scale with it.
        epochs: Passes over the data; None with no ``steps`` is the paper's:
            250, of `ffhq128` 200.
        steps: Optimiser steps; wins over ``epochs``.
        batch_size: Images per micro-batch.
        accumulate: Micro-batches per optimiser step.
        lr: Peak learning rate of both models; None as for ``msvq train``.
        betas: Adam's two decay rates; None as for ``msvq train``.
        schedule: Of both models; None is cosine for MS-VQVAE (the paper's) and constant for
            VQ-VAE 2, which confounds model and schedule.
        codebook_init: Of both models; None is the preset's.
        restart_below: Of both models; None is the preset's.
        gradient: Of both models' quantizers; None is the preset's.
        resize: Shorter side of the images in pixels before cropping; None keeps their size where a
            crop fits.
        precision: bf16 is autocast; auto is bf16 on CUDA and fp32 elsewhere.
        channels_last: Memory format of the convolutions; auto is on for CUDA and for bf16.
        workers: Threads that decode images ahead; 0 decodes between steps.
        log_every: Optimiser steps between log lines.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
        lpips_weights: As for ``msvq evaluate``.
        extractor: As for ``msvq evaluate``.
        inception_weights: As for ``msvq evaluate``.
        efflite0_weights: As for ``msvq evaluate``.
        force_fd: As for ``msvq evaluate``.
    """

    preset: str = "imagenet256-s"
    data: str = "builtin:photos"
    pictures: str | None = None
    out: str = "runs/compare"
    seeds: tuple[int, ...] = (0, 1, 2)
    width_scale: float = 1.0
    resolution: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    betas: tuple[float, float] | None = None
    schedule: Literal["cosine", "constant"] | None = None
    codebook_init: Literal["uniform", "kmeans"] | None = None
    restart_below: float | None = None
    gradient: Literal["straight-through", "rotation"] | None = None
    resize: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto", "on", "off"] = "auto"
    workers: int = 2
    log_every: int = 50
    device: str = "auto"
    lpips_weights: str | None = None
    extractor: Literal["inception", "efflite0"] | None = None
    inception_weights: str | None = None
    efflite0_weights: str | None = None
    force_fd: bool = False

    def check(self) -> None:
        """Raise InputError for the first field out of its range, in one line."""
        from msvq_fast.models import preset_config
        from msvq_fast.ops.checks import InputError

        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds={list(self.seeds)}; expected at least one, each once")
        if not 0 < self.width_scale < float("inf"):
            raise InputError(f"width_scale={self.width_scale}; expected a positive finite number")
        if self.preset.startswith(BASELINE):
            raise InputError(
                f"preset={self.preset!r}; expected a preset of MS-VQVAE such as "
                f"{self.preset.removeprefix(BASELINE)!r}, its baseline is trained beside it"
            )
        stride = preset_config(self.preset).stride
        if self.resolution is not None and (self.resolution < 1 or self.resolution % stride):
            raise InputError(
                f"resolution={self.resolution}; expected a multiple of {stride}, the pixels of a "
                f"cell of {self.preset}'s coarsest grid"
            )

    def settings(self) -> dict[str, Any]:
        """What decides the figures of a run, as JSON gives it back."""
        free = ("out", "seeds", "pictures", "workers", "log_every", "device")
        plain = {name: value for name, value in asdict(self).items() if name not in free}
        plain["betas"] = None if self.betas is None else list(self.betas)
        return plain

    def training(self, preset: str, seed: int, out: str) -> TrainConfig:
        """One model's training, the last checkpoint of which is judged."""
        from msvq_fast.models import preset_config

        base = preset_config(preset)
        model = ModelOverrides(
            width=max(2, round(base.width * self.width_scale)),
            codebook_init=self.codebook_init,
            restart_below=self.restart_below,
            gradient=self.gradient,
        )
        if self.resolution is not None:
            model.resolution = self.resolution
            model.latents = tuple(n * self.resolution // base.resolution for n in base.latents)
        return TrainConfig(
            preset=preset,
            data=self.data,
            out=out,
            epochs=self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            lr=self.lr,
            betas=self.betas,
            schedule=self.schedule,
            precision=self.precision,
            channels_last=self.channels_last,
            resize=self.resize,
            workers=self.workers,
            seed=seed,
            device=self.device,
            validate_every=0,  # the best checkpoint would be chosen on the images that judge it
            keep_last=1,
            log_every=self.log_every,
            resume="auto",
            model=model,
        )

    def evaluation(self, checkpoint: str, out: str) -> EvaluateConfig:
        """One model's evaluation on all tiles of the held-out images."""
        return EvaluateConfig(
            checkpoint=checkpoint,
            data=self.data,
            out=out,
            resize=self.resize,
            workers=self.workers,
            device=self.device,
            lpips_weights=self.lpips_weights,
            extractor=self.extractor,
            inception_weights=self.inception_weights,
            efflite0_weights=self.efflite0_weights,
            force_fd=self.force_fd,
        )
