"""What all training runs do alike: start or go on, log, validate, save, and stop between steps."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from msvq_fast.training import checkpoint, distributed, resume
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.interrupt import StopSignals
from msvq_fast.training.optimizer import Betas, Schedule, is_unstable
from msvq_fast.training.prior_config import TrainPriorConfig
from msvq_fast.training.progress import Column, MetricsFile, open_display
from msvq_fast.training.results import check_writable, write_json
from msvq_fast.training.window import TrainingError

# Options that each process may have its own of: places on its machine, and how it computes.
_OWN = frozenset(
    {
        "data",
        "tokens",
        "validation",
        "weights",
        "resume",
        "lpips_weights",
        "workers",
        "device",
        "backend",
    }
)


class Run(ABC):
    """One process of a training run; subclasses say what a step is and what is held out.

    Attributes:
        step: Optimiser steps done; with the configuration it decides everything that follows.
        best: Step and figures of the best validation so far.
        group: Images of an optimiser step, of all processes.
        validates: Whether there is something held out to look at.
    """

    betas: Betas
    schedule: Schedule
    group: int
    steps_per_epoch: int
    total_steps: int
    validates: bool

    def __init__(self, config: TrainConfig | TrainPriorConfig, world: World) -> None:
        self.config, self.world, self.out = config, world, Path(config.out)
        options = {n: v for n, v in config.to_dict().items() if n not in _OWN}
        distributed.require_same(options, world)

    def _choose_start(self) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to go on from and its state, those of a fresh start without one."""
        start = distributed.first_decides(
            lambda: resume.choose_checkpoint(self.config, lambda text: print(text, flush=True)),
            self.world,
        )
        return start, {"step": 0, "best": None} if start is None else checkpoint.read_state(start)

    def _go_on_from(self, start: Path | None, state: dict[str, Any]) -> None:
        self.step: int = state["step"]
        self.best = resume.best_of_run(start, state, self.out)
        resume.check_steps_left(start, self.step, self.total_steps, self.config)

    def _open_files(
        self,
        state: dict[str, Any],
        *,
        grids: list[str],
        columns: tuple[Column, ...],
        notes: Sequence[str],
        tensorboard: bool = False,
    ) -> None:
        """Open what the run writes, and say what it is and what has changed since ``state``."""
        self.metrics = None
        if self.world.leads:
            check_writable(self.out)
            (self.out / checkpoint.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(self.out, step=self.step, tensorboard=tensorboard)
            write_json(self.out / "config.json", self.config.to_dict())
        self.display = open_display(
            leads=self.world.leads,
            step=self.step,
            total_steps=self.total_steps,
            grids=grids,
            columns=columns,
        )
        for note in notes:
            self.display.message(note)
        if self.step:
            done = "; nothing is left to train" if self.step >= self.total_steps else ""
            self.display.message(f"going on after step {self.step}{done}")
            changes = self._changes(state)
            changes += resume.describe_computation(state, self.config, self.world.device.type)
            for change in changes:
                self.display.message(f"warning: {change}")

    def run(self) -> int:
        """Train to the end or to a signal.

        Returns:
            Exit code: 0 at the end, 128 plus the signal's number after one that asks to stop.
        """
        try:
            with StopSignals() as signals:
                return self._train(signals)
        finally:
            self.close()

    def close(self) -> None:
        """Give the terminal back and close the files."""
        self.display.close()
        if self.metrics is not None:
            self.metrics.close()

    def _train(self, signals: StopSignals) -> int:
        self.mark, self.marked_step = time.perf_counter(), self.step
        try:
            while self.step < self.total_steps:
                left = self.steps_per_epoch - self.step % self.steps_per_epoch
                with contextlib.closing(self._batches()) as stream:
                    for _ in range(min(left, self.total_steps - self.step)):
                        self._optimizer_step(stream)
                        stop = distributed.agree(signals.received or self.display.lost, self.world)
                        self._after_step(stop)
                        if stop:
                            # The first process has saved: torchrun ends it as soon as one has left.
                            distributed.agree(stop, self.world)
                            self.display.message(f"stopped after step {self.step}, saved")
                            return 128 + stop
        except RuntimeError as error:
            if (told := self._explain(error)) is None:
                raise
            raise told from error
        return 0

    def _explain(self, error: RuntimeError) -> TrainingError | None:
        """Why the run ended, where it stands and what to try, in one line; None if not foreseen.

        Foreseen are a loss that is no longer finite and another process that cannot be reached.
        """
        found = checkpoint.list_checkpoints(self.out)
        last = f"the last good checkpoint is {found[-1]}" if found else "no checkpoint yet"
        if isinstance(error, TrainingError):
            remedy = "--betas=[0.5,0.9]" if is_unstable(self.betas) else "a lower lr"
            there = f" with resume={found[-1]}" if found else ""  # all else would end the same way
            return TrainingError(f"{error}; {last}; try {remedy}{there}")
        reason = distributed.loss_of_process(error, self.world, f" in step {self.step + 1}")
        return TrainingError(f"{reason}; {last}; go on with resume=auto") if reason else None

    def _after_step(self, stop: int) -> None:
        """Whatever is due: log line, validation, checkpoint."""
        config, step = self.config, self.step
        self.display.advance(step)
        last = step == self.total_steps
        if last or step % config.log_every == 0:
            self._log()
        paused = time.perf_counter()
        best = False
        if self.validates and (last or step % (config.validate_every * self.steps_per_epoch) == 0):
            best = self._validate()
        every = config.checkpoint_every or self.steps_per_epoch
        if last or best or stop or step % every == 0:
            self._save()
            if self.world.leads:
                best_step = None if self.best is None else self.best["step"]
                checkpoint.prune_checkpoints(
                    self.out, keep_last=config.keep_last, best_step=best_step
                )
        self.mark += time.perf_counter() - paused

    def _record_steps(self, figures: dict[str, Any]) -> None:
        """Record means over the steps since the last log line."""
        now = time.perf_counter()
        rate = (self.step - self.marked_step) / max(now - self.mark, 1e-9)
        self.mark, self.marked_step = now, self.step
        self._record(
            {
                "kind": "train",
                "step": self.step,
                "total_steps": self.total_steps,
                "epoch": self.step / self.steps_per_epoch,
                **figures,
                "lr": self.schedule(self.step - 1),
                "steps_per_second": rate,
                "images_per_second": rate * self.group,
                "eta_seconds": (self.total_steps - self.step) / rate,
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)
        self.display.log(record)

    @abstractmethod
    def _changes(self, state: dict[str, Any]) -> list[str]:
        """What differs from the run of ``state`` and is allowed to, a line each."""

    @abstractmethod
    def _batches(self) -> Generator[Tensor, None, None]:
        """What is left of the current epoch, for `_optimizer_step` to take."""

    @abstractmethod
    def _optimizer_step(self, stream: Iterator[Tensor]) -> None:
        """Take one step and count it."""

    @abstractmethod
    def _log(self) -> None:
        """Record the figures since the last log line; raise where the loss is not finite."""

    @abstractmethod
    def _validate(self) -> bool:
        """Record the held-out figures; return whether they are the best so far."""

    @abstractmethod
    def _save(self) -> None:
        """Write a checkpoint, on the first process."""
