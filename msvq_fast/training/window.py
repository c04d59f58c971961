"""Losses and code counts since the last log line, summed on the device without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msvq_fast.metrics import perplexity, usage
from msvq_fast.models import MSVQVAEOutput
from msvq_fast.ops.checks import WorkError
from msvq_fast.training.distributed import World, all_reduce_

_NEVER = 2**53  # more steps than any run has
_LOW_USAGE = 10  # percent


class TrainingError(WorkError):
    """Training cannot go on."""


def check_weights(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raise `TrainingError` rather than save what a last bad gradient may have left.

    The square of a finite gradient may be infinite: that weight would never move again.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingError(f"{name} is not finite after step {step}")
    for name, parameter in model.named_parameters():
        for tensor in optimizer.state.get(parameter, {}).values():
            if not bool(tensor.isfinite().all()):
                raise TrainingError(f"the gradient of {name} had no finite square by step {step}")


class FirstBad:
    """Per part of a loss, the first step in which it was not finite, kept on the device.

    Args:
        names: Of the parts after the first, which is their sum.
        world: The processes.
    """

    def __init__(self, names: Sequence[str], world: World) -> None:
        self.names, self.world = names, world
        size = (1 + len(names),)
        self.steps = torch.full(size, _NEVER, dtype=torch.int64, device=world.device)

    def add(self, parts: Tensor, step: int) -> None:
        """Look at the parts ``(1 + len(names),)`` of ``step``; on a GPU this waits for nothing."""
        bad = torch.where(parts.isfinite(), _NEVER, step)
        self.steps = torch.minimum(self.steps, bad)

    def check(self) -> None:
        """Raise `TrainingError` on all processes if any of them saw a loss that is not finite."""
        first = all_reduce_(self.steps.clone(), self.world, smallest=True).tolist()
        step = min(first)
        if step != _NEVER:
            bad = [name for name, at in zip(self.names, first[1:], strict=True) if at == step]
            what = ", ".join(bad) or "its sum"
            raise TrainingError(f"the loss is not finite at step {step}: {what}")


@dataclass(frozen=True)
class WindowSummary:
    """Means over the steps and processes of a window.

    Attributes:
        loss: Eq. 6.
        reconstruction_loss: Per image that the model reconstructs, on [-1, 1].
        commitment_loss: Per scale.
        psnr: Of the full reconstruction in dB, training crops, before clipping.
        usage: Percent of the codes drawn at least once, per scale.
        perplexity: Per scale.
    """

    loss: float
    reconstruction_loss: list[float]
    commitment_loss: list[float]
    psnr: float
    usage: list[float]
    perplexity: list[float]

    def describe_unused(self, *, restarts: bool) -> str | None:
        """Warn of scales that use few of their codes; None if there are none.

        Args:
            restarts: Whether unused codes restart already.
        """
        unused = [m for m, percent in enumerate(self.usage) if percent < _LOW_USAGE]
        if not unused:
            return None
        remedy = "" if restarts else "; model.restart_below=0.1 revives codes"
        scales = ", ".join(map(str, unused))
        return (
            f"warning: less than {_LOW_USAGE} % of the codes of scale {scales} are in use{remedy}"
        )


class Window:
    """Running sums of one process; `read` and `reduce` combine the processes.

    Args:
        num_losses: Entries of an output's ``reconstruction_loss``.
        num_scales: M.
        num_codes: K.
        world: The processes.
    """

    def __init__(self, num_losses: int, num_scales: int, num_codes: int, world: World) -> None:
        self.num_losses = num_losses
        self.world = world
        parts = 1 + num_losses + num_scales
        device = world.device
        self.totals = torch.zeros(parts, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_scales, num_codes, dtype=torch.int64, device=device)
        self.additions = torch.zeros((), dtype=torch.int64, device=device)
        images = [f" of scale {m}" for m in range(num_losses)] if num_losses > 1 else [""]
        names = [f"reconstruction loss{of}" for of in images]
        names += [f"commitment loss of scale {m}" for m in range(num_scales)]
        self.first_bad = FirstBad(names, world)

    @torch.no_grad()
    def add(self, out: MSVQVAEOutput, step: int) -> None:
        """Add a micro-batch of optimiser step ``step``; on a GPU this waits for nothing."""
        parts = torch.cat([out.loss.reshape(1), out.reconstruction_loss, out.commitment_loss])
        self.totals += parts
        self.counts += torch.stack(out.code_counts)
        self.additions += 1
        self.first_bad.add(parts, step)

    def check(self) -> None:
        """Raise `TrainingError` on all processes if any of them saw a loss that is not finite."""
        self.first_bad.check()

    def reduce(self) -> None:
        """Bring the sums of all processes into rank 0's window; the others' become zero."""
        for tensor in (self.totals, self.counts, self.additions):
            all_reduce_(tensor, self.world)
            if not self.world.leads:
                tensor.zero_()

    def read(self) -> WindowSummary:
        """Return the means and start a new window; only rank 0's result is meant to be used."""
        self.reduce()
        additions = max(int(self.additions), 1)
        means = (self.totals / additions).tolist()
        counts = self.counts.to("cpu", copy=True)
        for tensor in (self.totals, self.counts, self.additions):
            tensor.zero_()
        reconstruction = means[1 : 1 + self.num_losses]
        return WindowSummary(
            loss=means[0],
            reconstruction_loss=reconstruction,
            commitment_loss=means[1 + self.num_losses :],
            # Images span [-1, 1]: a peak of 2, whose square is 4.
            psnr=10 * math.log10(4 / max(reconstruction[-1], 1e-30)),
            usage=usage(counts).tolist(),
            perplexity=perplexity(counts).tolist(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums for a checkpoint, after `reduce`."""
        return {"totals": self.totals, "counts": self.counts, "additions": self.additions}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved sums: rank 0 with all of them, the others with nothing."""
        if self.world.leads:
            for name, tensor in self.state_dict().items():
                tensor.copy_(state[name])
