"""Why a training run ended, where it stands and what to try, in one line."""

from __future__ import annotations

from pathlib import Path

from msvq_fast.training.checkpoint import list_checkpoints, name_last
from msvq_fast.training.distributed import World, loss_of_process
from msvq_fast.training.optimizer import Betas, is_unstable
from msvq_fast.training.window import TrainingError


def explain(
    error: RuntimeError, step: int, out: Path, betas: Betas, world: World
) -> TrainingError | None:
    """What to tell people of an error in optimiser step ``step``; None if it is not foreseen.

    Foreseen are a loss that is no longer finite and another process that cannot be reached.
    """
    if isinstance(error, TrainingError):
        remedy = "--betas=[0.5,0.9]" if is_unstable(betas) else "a lower lr"
        found = list_checkpoints(out)
        there = f" with resume={found[-1]}" if found else ""  # all else would end the same way
        return TrainingError(f"{error}; {name_last(out)}; try {remedy}{there}")
    if (reason := loss_of_process(error, world, f" in step {step}")) is None:
        return None
    return TrainingError(f"{reason}; {name_last(out)}; go on with resume=auto")
