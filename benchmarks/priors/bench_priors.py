"""Windowed priors beside dense ones: likelihood on the same codes, time, memory, growth."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import machine
import pytest
import torch

from msvq_fast.cli import main
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig, from_pretrained
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.tokens import load_tokens

SIDES = (8, 16, 32, 64, 128)
STEPS = 160
DRAWN = (8, 16, 32, 64)
KERNELS = {"native": (3, 5), "dense": None}  # windowed attention runs the native kernels
KINDS = {"autoregressive": AutoregressivePrior, "maskgit": MaskGITPrior}


def build(kind: str, how: str, side: int):
    """Two scales; the finer one is what is timed: one block, two heads of 32."""
    grids = ((side // 2, side // 2), (side, side))
    sizes = {"num_codes": 128, "depth": 1, "heads": 2, "width": 64}
    prior = KINDS[kind](PriorConfig(grids, kernels=KERNELS[how], **sizes))
    codes = [torch.randint(128, (1, h, w)) for h, w in grids]
    return prior, codes


def fine_step(kind: str, how: str, side: int):
    """Forward and backward of the fine scale's transformer."""
    prior, (coarse, fine) = build(kind, how, side)
    model = prior.scale_model(1)

    def step() -> None:
        logits = model(model.embed(fine.flatten(1)), model.context([coarse]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), fine.flatten()).backward()

    return step


def growth(kind: str, how: str, side: int) -> int:
    torch.set_num_threads(2)
    fine_step(kind, how, 8)()  # what torch itself loads
    step = fine_step(kind, how, side)
    machine.forget_peak()
    before = machine.status_bytes("VmHWM")
    step()
    return machine.status_bytes("VmHWM") - before


def peak_bytes(kind: str, how: str, side: int) -> int:
    """Growth of a fresh process's largest size over one training step."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(growth, kind, how, side).result()


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_step(measure, kind: str, side: int, how: str) -> None:
    rounds = 3 if side == 128 else 7
    memory = peak_bytes(kind, how, side)
    step = fine_step(kind, how, side)
    group = f"{kind} training step, {side}² under {side // 2}²"
    measure(group, how, step, rounds=rounds, warmup=1, peak_bytes=memory, tokens=side * side)


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("side", DRAWN)
def test_drawing_code_by_code(measure, side: int, how: str) -> None:
    """Per token the windowed cost stays and the dense one grows."""
    prior, codes = build("autoregressive", how, side)
    prior.eval()

    def draw() -> None:
        prior.draw_scale(1, codes[:1], batch=1, seed=0, decoding="sequential")

    group = f"autoregressive drawing code by code, {side}²"
    measure(group, how, draw, rounds=2, warmup=0 if side == 64 else 1, tokens=side * side)


@pytest.mark.parametrize("side", (*DRAWN, 128))
def test_drawing_by_wavefront(measure, side: int) -> None:
    prior, codes = build("autoregressive", "native", side)
    prior.eval()

    def draw() -> None:
        prior.draw_scale(1, codes[:1], batch=1, seed=0)

    group = f"autoregressive drawing by wavefront, {side}²"
    measure(group, "native", draw, rounds=3, warmup=1, tokens=side * side)


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("side", (16, 32, 64))
def test_maskgit_steps(measure, side: int, how: str) -> None:
    prior, codes = build("maskgit", how, side)
    prior.eval()

    def draw() -> None:
        prior.draw_scale(1, codes[:1], batch=1, seed=0, steps=8)

    measure(f"maskgit drawing in 8 steps, {side}²", how, draw, rounds=5, warmup=1, steps=8)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of the built-in photographs by a briefly trained `tiny`."""
    root = tmp_path_factory.mktemp("stage2")
    assert main(["train", f"--out={root}/model", "--resize=128", "--steps=300"]) == 0
    common = ["tokenize", f"--checkpoint={root}/model", "--resize=128"]
    crops = ["--crop=random", "--repeat=64", "--flip"]
    assert main([*common, *crops, f"--out={root}/train"]) == 0
    assert main([*common, "--split=val", f"--out={root}/val"]) == 0
    return root


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_likelihood(measure, tokens: Path, kind: str, how: str) -> None:
    """Same seed, steps and codes; what is timed is a step of the trained prior, 16 images."""
    attention = "dense" if how == "dense" else "windowed"
    out = tokens / f"{kind}-{attention}"
    places = [f"--tokens={tokens}/train", f"--validation={tokens}/val", f"--out={out}"]
    sizes = ["--depth=4", "--width=128", "--heads=4", "--batch_size=16", "--lr=1e-3"]
    settings = [f"--kind={kind}", f"--attention={attention}", f"--steps={STEPS}"]
    assert main(["train-prior", *places, *sizes, *settings]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    best = min(validations, key=lambda line: line["nats_per_image"])
    figures = {name: best[name] for name in ("nll", "nats_per_image", "step", "images")}
    prior = from_pretrained(find_model(out))
    codes = load_tokens(tokens / "train").batch(torch.arange(16))

    def step() -> None:
        prior(codes).loss.backward()

    group = f"{kind} on the codes of photographs, step of 16 images"
    measure(group, how, step, validation=figures, trained_steps=STEPS)
