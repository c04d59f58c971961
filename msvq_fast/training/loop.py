"""The training loop: plain torch, restartable after any step with the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msvq_fast import models
from msvq_fast.data import ImageDataset, batches, batches_per_epoch, list_named_images, to_float
from msvq_fast.models import MSVQVAEConfig, MSVQVAEOutput
from msvq_fast.ops.checks import InputError
from msvq_fast.training import checkpoint, distributed, resume
from msvq_fast.training.config import TrainConfig, how_computed
from msvq_fast.training.distributed import World
from msvq_fast.training.image_losses import ImageLosses
from msvq_fast.training.optimizer import (
    WHY_UNSTABLE,
    Schedule,
    build_adam,
    default_epochs,
    default_schedule,
    is_unstable,
    load_moments,
    optimizer_settings,
    warmup_steps,
)
from msvq_fast.training.progress import AUTOENCODER_COLUMNS
from msvq_fast.training.run import Run
from msvq_fast.training.step_graph import StepGraph, check_graph
from msvq_fast.training.validation import load_held_out, validate
from msvq_fast.training.window import Window, check_weights

_DEFAULT_CROPS = 1024  # crops of an epoch where ``repeat`` is not given


def run_train(config: TrainConfig) -> int:
    """Train a model.

    Returns:
        Exit code: 0 at the end, 128 plus the signal's number after one that asks to stop.

    Raises:
        InputError: For settings that cannot work, before anything is written.
        TrainingError: If the loss is no longer finite, or another process ended.
        OSError: If the run's folder cannot be written.
    """
    config.check()
    with (
        distributed.join(config.device) as world,
        distributed.determinism(config.deterministic, world),
    ):
        return _Run(config, world).run()


class _Run(Run):
    config: TrainConfig

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        check_graph(config, world)
        model_config = models.preset_config(config.preset, **config.model.given())
        self.model_config = model_config
        self._find_data()
        self._plan()
        start, state = self._choose_start()
        if start is not None:
            resume.check_same_run(start, state, config, model_config, self.images, world)
            # They may be left out now: the run stays one that started from them.
            self.config = dataclasses.replace(config, weights=state["config"].get("weights"))
        self._go_on_from(start, state)
        self._build(start)
        self._open_files(
            state,
            grids=[f"{side}x{side}" for side in model_config.latents],
            columns=AUTOENCODER_COLUMNS,
            notes=self._notes(),
            tensorboard=config.tensorboard,
        )

    def _find_data(self) -> None:
        config, size = self.config, self.model_config.resolution
        images = list_named_images(config.data, split="train")
        self.images = resume.describe_images(images)
        wanted = max(_DEFAULT_CROPS, config.batch_size * config.accumulate * self.world.size)
        self.dataset = ImageDataset(
            list(images.values()),
            size=size,
            resize=config.resize,
            crop=config.crop,
            flip=config.flip,
            seed=config.seed,
            repeat=config.repeat or -(-wanted // len(images)),
        )
        self.reported: set[str] = set()
        self.warned = False
        self.unseen: dict[str, str] = {}  # validation images that cannot be read, and why
        self.validates = config.validate_every > 0
        if self.validates:  # now, so that an error does not come after an epoch
            held_out = list_named_images(config.data, split="val")
            cut: dict[str, Any] = {"size": size, "resize": config.resize, "crop": config.crop}
            limit = config.validation_tiles
            paths = list(held_out.values())
            self.tiles = load_held_out(paths, limit=limit, skipped=self.unseen, **cut)
        # A disk may be one machine's own, and may fail for one process alone.
        seen = {"data": resume.name_images(self.images)}
        if self.validates:
            of_images = resume.name_images(resume.describe_images(held_out))
            seen["validation"] = (
                f"{len(self.tiles)} tiles of {of_images}, {len(self.unseen)} unreadable"
            )
        distributed.require_same(seen, self.world)

    def _plan(self) -> None:
        config = self.config
        self.group = config.batch_size * config.accumulate * self.world.size
        micro = batches_per_epoch(
            len(self.dataset), batch_size=config.batch_size, world_size=self.world.size
        )
        self.steps_per_epoch = micro // config.accumulate
        if self.steps_per_epoch == 0:
            raise InputError(
                f"an epoch has {len(self.dataset)} crops, too few for one step of batch_size="
                f"{config.batch_size} x accumulate={config.accumulate} x {self.world.size} "
                "processes; lower them or raise repeat"
            )
        epochs = config.epochs or default_epochs(config.preset)
        self.total_steps = config.steps or epochs * self.steps_per_epoch
        kind = config.schedule or default_schedule(config.preset)
        warmup = warmup_steps(
            config.warmup_epochs,
            kind,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        lr, self.betas = optimizer_settings(config.preset, config.lr, config.betas)
        self.schedule = Schedule(kind, lr, warmup, self.total_steps, config.min_lr_fraction)

    def _build(self, start: Path | None) -> None:
        config, world = self.config, self.world
        how = how_computed(config.to_dict(), world.device.type)
        self.autocast_dtype = torch.bfloat16 if how["precision"] == "bf16" else None
        last = how["channels_last"] == "on"
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        torch.manual_seed(config.seed)
        self.trained: Path | None = None  # whose weights a new run starts from
        if start is not None:
            self.model = models.from_pretrained(start, backend=config.backend)
        else:
            self.model = models.build(self.model_config, backend=config.backend)
            if config.weights is not None:
                self.trained = resume.load_weights(self.model, config.weights)
        self.model.to(device=world.device)
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.model.train()
        self.model.defer_codebook_updates()
        self.model.set_memory(config.memory, strips=config.strips)
        self.optimizer = build_adam(self.model.parameters(), lr=self.schedule.lr, betas=self.betas)
        model_config = self.model_config
        images = model_config.num_scales if isinstance(model_config, MSVQVAEConfig) else 1
        self.window = Window(images, model_config.num_scales, model_config.num_codes, world)
        self.losses = ImageLosses(config, self.model, world, self.total_steps, self.autocast_dtype)
        if start is not None:
            saved = checkpoint.load_optimizer(start)
            load_moments(self.optimizer, saved["optimizer"], betas=self.betas)
            self.window.load_state_dict(saved["window"])
            self.losses.load_state_dict(saved.get("image_losses", {}))
        elif self.trained is None and model_config.codebook_init == "kmeans":
            with contextlib.closing(self._batches()) as stream:
                self.model.initialise_codebooks(self._to_device(next(stream)))
        self.wrapped = distributed.wrap(self.model, world)
        if config.compile and config.memory == "default":
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        elif config.compile:
            self.model.compile_parts()
        self.graph: StepGraph[MSVQVAEOutput] | None = None
        if config.cuda_graph:
            self.graph = StepGraph(self._gradients, self.model.parameters())

    def _notes(self) -> list[str]:
        """What the run is, and what to beware of."""
        parameters = sum(p.numel() for p in self.model.parameters())
        notes = [
            f"{self.config.preset}: {parameters / 1e6:.2f} M parameters on {self.world.device}"
            f" x {self.world.size}; {len(self.dataset.paths)} images, {len(self.dataset)} crops of"
            f" {self.dataset.size} px an epoch; {self.steps_per_epoch} steps an epoch,"
            f" {self.total_steps} in all; into {self.out}",
            *(f"skipped validation image: {reason}" for reason in self.unseen.values()),
        ]
        if self.trained is not None:
            notes.append(f"starts from the weights of {self.trained}")
        if is_unstable(self.betas):
            notes.append(f"warning: betas={self.betas} {WHY_UNSTABLE}")
        return notes

    def _changes(self, state: dict[str, Any]) -> list[str]:
        return resume.describe_changes(state, self.config, self.images, self.world.size)

    def _batches(self) -> Generator[Tensor, None, None]:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        yield from batches(
            self.dataset,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start_batch=done * self.config.accumulate,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.config.workers,
        )

    def _forward(self, x: Tensor) -> MSVQVAEOutput:
        mixed = self.autocast_dtype is not None
        with torch.autocast(self.world.device.type, self.autocast_dtype, enabled=mixed):
            return self.wrapped(x)

    def _gradients(self, x: Tensor) -> MSVQVAEOutput:
        """All of a step that a CUDA graph can hold."""
        out = self._forward(x)
        out.loss.backward()
        self.model.update_codebooks()
        return out

    def _accumulate(self, stream: Iterator[Tensor]) -> None:
        accumulate = self.config.accumulate
        for micro in range(accumulate):
            x = self._to_device(next(stream))
            last = micro == accumulate - 1
            with distributed.gradient_sync(self.wrapped, last):
                out = self._forward(x)
                if last:  # all codes are found: their statistics travel during the backward
                    finish = distributed.start_reducing(self.model.code_statistics(), self.world)
                self.losses.backward(out, x, self.step, micro, accumulate)
            self.window.add(out, self.step + 1)
        finish()

    def _optimizer_step(self, stream: Iterator[Tensor]) -> None:
        if self.graph is None:
            self._accumulate(stream)
        else:
            self.window.add(self.graph(self._to_device(next(stream))), self.step + 1)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.update(self.schedule(self.step))
        if self.graph is None:
            self.model.update_codebooks()
        self.step += 1
        if self.world.device.type == "cpu" and self.world.size == 1:
            self.window.check()  # elsewhere this would wait for the device: only where it must

    def _to_device(self, batch: Tensor) -> Tensor:
        if self.world.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.world.device, non_blocking=True)
        return to_float(batch).contiguous(memory_format=self.memory_format)

    def _log(self) -> None:
        self.window.check()
        summary = self.window.read()
        self._record_steps({**vars(summary), **self.losses.read()})
        warning = summary.describe_unused(restarts=self.model_config.restart_below > 0)
        if warning and self.step >= self.steps_per_epoch and not self.warned:
            self.warned = True
            self.display.message(warning)
        new = {path: why for path, why in self.dataset.skipped.items() if path not in self.reported}
        for part in distributed.gather(new, self.world):  # each process reads images of its own
            new.update(part)
        for path, reason in new.items():
            self.reported.add(path)
            self.display.message(
                f"skipped image {len(self.reported)} of {len(self.dataset.paths)}: {reason}"
            )

    def _validate(self) -> bool:
        self.window.check()
        check_weights(self.model, self.optimizer, self.step)  # NaN latents have codes and images
        errors, psnr = validate(
            self.model, self.tiles, batch_size=self.config.batch_size, world=self.world
        )
        record = {"kind": "validation", "step": self.step, "mse": errors, "psnr": psnr}
        count = len(self.tiles)
        self._record({**record, "tiles": count})
        # A resumed run may have other tiles, whose figures do not compare with those before.
        best = self.best if self.best and self.best.get("tiles") in (None, count) else None
        if not math.isfinite(psnr[-1]) or (best and not psnr[-1] > best["psnr"]):
            return False
        self.best = {"step": self.step, "psnr": psnr[-1], "tiles": count}
        return True

    def _save(self) -> None:
        self.window.check()
        check_weights(self.model, self.optimizer, self.step)
        self.losses.check(self.step)
        self.window.reduce()
        self.losses.reduce()
        if not self.world.leads:
            return
        checkpoint.save_checkpoint(
            self.out,
            model=self.model,
            optimizer={
                "optimizer": self.optimizer.state_dict(),
                "window": self.window.state_dict(),
                "image_losses": self.losses.state_dict(),
            },
            state={
                "step": self.step,
                "epoch": self.step // self.steps_per_epoch,
                "batch": self.step % self.steps_per_epoch * self.config.accumulate,
                "best": self.best,
                **self.images,
                "world_size": self.world.size,
                "device": self.world.device.type,
                "config": self.config.to_dict(),
                "model_config": resume.describe_model(self.model_config),
            },
        )
