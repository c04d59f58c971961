"""One optimisation step at 1024 px in every memory mode beside plain PyTorch: time and memory.

Each way has its own process, so that no other's allocations are in its figures.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import machine
import pytest
import torch

from msvq_fast import models
from msvq_fast.training.memory import step_memory
from msvq_fast.training.optimizer import build_adam

PRESET, BATCH, ROUNDS = "celebahq1024-s", 1, 2
WAYS = {
    "reference": ("reference", "default"),
    "default": (None, "default"),
    "sequential": (None, "sequential"),
    "strips": (None, "strips"),
}
_child: dict[str, Callable[[int], None]] = {}


def prepare(backend: str | None, memory: str) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = models.from_preset(PRESET, backend=backend).to(memory_format=torch.channels_last)
    model.defer_codebook_updates()
    model.set_memory(memory)
    optimizer = build_adam(model.parameters(), lr=3e-4, betas=(0.5, 0.9))

    def step(side: int) -> None:
        x = torch.rand(BATCH, 3, side, side) * 2 - 1
        model(x.contiguous(memory_format=torch.channels_last)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_codebooks()

    step(64)  # what libraries load once, Adam's moments
    machine.forget_peak()
    _child["step"] = step


def run() -> None:
    _child["step"](models.PRESETS[PRESET].resolution)


@pytest.mark.parametrize("way", WAYS)
def test_optimisation_step(measure, way: str) -> None:
    backend, memory = WAYS[way]
    config = models.preset_config(PRESET)
    predicted = step_memory(config, batch=BATCH, memory=memory, backend=backend).peak
    spawn = multiprocessing.get_context("spawn")
    figures = {"batch": BATCH, "precision": "fp32", "predicted_bytes": predicted}
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        pool.submit(prepare, backend, memory).result()
        before = pool.submit(machine.status_bytes, "VmRSS").result()
        pool.submit(run).result()
        peak = pool.submit(machine.status_bytes, "VmHWM").result()
        figures |= {"peak_bytes": peak, "step_bytes": peak - before}
        group = f"{PRESET}, one optimisation step at {config.resolution} px"
        measure(group, way, lambda: pool.submit(run).result(), rounds=ROUNDS, warmup=0, **figures)
