from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msvq_fast.models import PRESETS
from msvq_fast.training import prior
from msvq_fast.training.optimizer import (
    Schedule,
    default_epochs,
    optimizer_settings,
    warmup_steps,
)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    schedule = Schedule("cosine", 3e-4, warmup_steps=10, total_steps=100)
    assert [schedule(step) for step in range(10)] == pytest.approx(
        [3e-5 * (step + 1) for step in range(10)]
    )


def test_cosine_passes_through_its_middle_and_ends_at_a_tenth() -> None:
    schedule = Schedule("cosine", 1.0, warmup_steps=20, total_steps=121)
    rates = [schedule(step) for step in range(121)]
    assert rates[20] == pytest.approx(1.0)
    assert rates[70] == pytest.approx(0.55)
    assert rates[120] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))


def test_constant_stays_after_its_warm_up() -> None:
    schedule = Schedule("constant", 2.0, warmup_steps=4, total_steps=10)
    assert [schedule(step) for step in range(10)] == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]


def test_a_run_of_one_step_has_the_peak_rate() -> None:
    assert Schedule("cosine", 1.0, warmup_steps=0, total_steps=1)(0) == 1.0


@pytest.mark.parametrize(
    ("asked", "kind", "total", "expected"),
    [
        (None, "cosine", 250 * 64, 5 * 64),  # the paper's five epochs
        (None, "cosine", 1000, 100),  # but at most a tenth of a short run
        (None, "constant", 250 * 64, 0),
        (0.0, "cosine", 1000, 0),
        (0.5, "constant", 1000, 32),
    ],
)
def test_warm_up_in_steps(asked: float | None, kind: str, total: int, expected: int) -> None:
    assert warmup_steps(asked, kind, steps_per_epoch=64, total_steps=total) == expected


def test_epochs_of_the_paper() -> None:
    assert [default_epochs(name) for name in ("imagenet256-s", "vqvae2-ffhq128")] == [250, 200]
    assert prior.DEFAULT_EPOCHS == 50


@pytest.mark.parametrize("preset", PRESETS)
def test_adam_of_the_paper(preset: str) -> None:
    expected = (1e-3, (0.5, 0.9)) if preset.endswith("tiny") else (3e-4, (0.9, 0.5))
    assert optimizer_settings(preset, None, None) == expected
    assert optimizer_settings(preset, 0.1, (0.2, 0.3)) == (0.1, (0.2, 0.3))


def test_settings_reach_the_optimiser(
    tmp_path: Path, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    class Spied(torch.optim.Adam):
        def step(self) -> None:
            (group,) = self.param_groups
            given.update({name: group[name] for name in ("lr", "betas")})
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in group["params"]])))
            super().step()

    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.optim, "Adam", Spied)
    options = ("--lr=0.5", "--betas=[0.8,0.7]", "--grad_clip=0.125", "--validate_every=0")
    assert train(tmp_path, "--steps=1", "--warmup_epochs=0", *options) == 0
    assert given == {"lr": 0.5, "betas": (0.8, 0.7)}
    assert norms == pytest.approx([0.125], rel=1e-4)
