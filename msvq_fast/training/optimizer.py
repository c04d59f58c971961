"""Adam as the paper sets it, and its learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import Parameter

Betas = tuple[float, float]
WHY_UNSTABLE = (
    "as the paper prints them can diverge, since Adam's steps grow where a gradient vanishes "
    "(β₁² > β₂); --betas=[0.5,0.9] does not"
)

# How the optimiser moves the weights: what a run may change that goes on from a named checkpoint.
RATES = frozenset(
    {
        "lr",
        "betas",
        "schedule",
        "warmup_epochs",
        "min_lr_fraction",
        "grad_clip",
        "weight_decay",
    }
)


def optimizer_settings(preset: str, lr: float | None, betas: Betas | None) -> tuple[float, Betas]:
    """Return Adam's rate and betas: as asked, else the paper's, or those tried on `tiny`."""
    tiny = preset.endswith("tiny")
    if lr is None:
        lr = 1e-3 if tiny else 3e-4
    if betas is None:
        betas = (0.5, 0.9) if tiny else (0.9, 0.5)
    return lr, betas


def default_schedule(preset: str) -> Literal["cosine", "constant"]:
    """The paper's cosine (§4) for MS-VQVAE, constant for VQ-VAE 2."""
    return "constant" if preset.startswith("vqvae2-") else "cosine"


def default_epochs(preset: str) -> int:
    """The paper's (§4): 250, and 200 of the models behind the transformers."""
    return 200 if preset.endswith("ffhq128") else 250


def is_unstable(betas: Betas) -> bool:
    """Whether Adam's step grows where a gradient vanishes: m falls by β₁ but √v by √β₂."""
    return betas[0] ** 2 > betas[1]


@dataclass(frozen=True)
class Schedule:
    """Learning rate per optimiser step; it has no state, so a resumed run needs none.

    Attributes:
        kind: ``"cosine"`` falls from ``lr`` to ``lr * min_lr_fraction``; ``"constant"`` stays.
        lr: Rate at the end of the warm-up.
        warmup_steps: Steps of linear rise; step 0 already has ``lr / warmup_steps``.
        total_steps: Steps of the run; the last one has the lowest rate.
        min_lr_fraction: Where the cosine ends.
    """

    kind: Literal["cosine", "constant"]
    lr: float
    warmup_steps: int
    total_steps: int
    min_lr_fraction: float = 0.1

    def __call__(self, step: int) -> float:
        """Return the rate of the optimiser step number ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        span = max(self.total_steps - 1 - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / span, 1.0)
        low = self.lr * self.min_lr_fraction
        return low + (self.lr - low) * 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_steps(
    warmup_epochs: float | None, kind: str, *, steps_per_epoch: int, total_steps: int
) -> int:
    """Return the warm-up in steps: as asked, or 5 epochs of cosine, at most a tenth of the run."""
    if warmup_epochs is not None:
        return round(warmup_epochs * steps_per_epoch)
    if kind == "constant":
        return 0
    return min(5 * steps_per_epoch, total_steps // 10)


def build_adam(parameters: Iterable[Parameter], *, lr: float, betas: Betas) -> torch.optim.Adam:
    """Adam with eps 1e-8 and no decay, in one fused kernel where all parameters are floats."""
    return torch.optim.Adam(list(parameters), lr=lr, betas=betas, eps=1e-8, fused=True)


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any], **settings: Any) -> None:
    """Go on from the moments of a saved ``state``, with these ``settings`` whatever it says."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(settings)
