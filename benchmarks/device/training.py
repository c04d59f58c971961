"""Whole training steps: the presets at their resolution, and the priors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from device.quantizer import plain_search
from device.rows import OURS, Bench, Case, Cost, Row, bound
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msvq_fast import models
from msvq_fast.ops.vector_quantize import reference
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig
from msvq_fast.training.optimizer import build_adam
from msvq_fast.training.step_graph import WARM_UPS, StepGraph

# preset: batch, rank
PRESETS = {
    "celebahq1024-s": (8, 0),
    "celebahq1024-m": (8, 1),
    "celebahq1024-l": (8, 1),
    "imagenet256-s": (64, 2),
    "imagenet256-l": (64, 2),
    "ffhq128": (128, 2),
    "vqvae2-celebahq1024-s": (8, 3),
}
MEMORY_MODES = ("sequential", "strips")
GRAPH = "CUDA graph"
PLAIN = {"torch eager": False, "torch.compile": True}
PRIORS = {"autoregressive": AutoregressivePrior, "maskgit": MaskGITPrior}


def step(bench: Bench, preset: str, batch: int, name: str) -> Case:
    """Forward, backward, Adam and codebooks in bfloat16 autocast, as `msvq train` does them."""
    plain = name in PLAIN
    # The plain model searches as people write it; the reference proper is exact and far slower.
    search = mock.patch.object(reference, "nearest_code", _plain_nearest_code)
    patch = search if plain else contextlib.nullcontext()
    model = models.from_preset(
        bench.size(preset, "vqvae2-tiny" if preset.startswith("vqvae2") else "tiny"),
        backend="reference" if plain else None,
    )
    side = model.config.resolution
    model.to(device=bench.device, memory_format=torch.channels_last).train()
    modes = name.split(", ")[1:]
    images = torch.rand(bench.size(batch, 2), 3, side, side, device=bench.device) * 2 - 1
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad(), patch:
        model.initialise_codebooks(images)
    model.defer_codebook_updates()
    optimizer = build_adam(model.parameters(), lr=1e-4, betas=(0.5, 0.9))
    compiled = PLAIN.get(name, name.endswith("torch.compile")) and not bench.tiny
    forward: Callable[[Tensor], Any] = model

    def gradients(x: Tensor) -> Tensor:
        with patch, torch.autocast(bench.device, torch.bfloat16, enabled=not bench.tiny):
            loss = forward(x).loss
        loss.backward()
        model.update_codebooks()
        return loss.detach()

    def run(gradients: Callable[[Tensor], Tensor] = gradients) -> Tensor:
        loss = gradients(images)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    graph = None
    if GRAPH in modes and not bench.tiny:
        graph = StepGraph(gradients, model.parameters())

    def then() -> Tensor:
        nonlocal forward
        if compiled and forward is model:  # not before: what counts has hooks on the modules
            forward = torch.compile(model)
        for mode in set(modes) & set(MEMORY_MODES):
            model.set_memory(mode)
        return run(graph).clone() if graph else run()

    extra = {"batch": len(images), "parameters": _count(model)}
    # Operations are counted before any are run again: a mode's floor is that of the default.
    return _training_case(run, len(images), extra, then=then)


def prior_step(bench: Bench, kind: str, kernels: tuple[int, ...] | None) -> Case:
    """Forward, backward and Adam of a prior at the paper's width and depth."""
    grids = bench.size(((32, 32), (64, 64)), ((4, 4), (8, 8)))
    sizes = bench.size({}, {"depth": 1, "heads": 2, "width": 16})
    config = PriorConfig(grids, num_codes=bench.size(512, 8), kernels=kernels, **sizes)
    prior = PRIORS[kind](config).to(bench.device).train()
    batch = bench.size(8, 1)
    codes = [torch.randint(config.num_codes, (batch, h, w), device=bench.device) for h, w in grids]
    optimizer = build_adam(prior.parameters(), lr=1e-4, betas=(0.9, 0.95))

    def run() -> Tensor:
        with torch.autocast(bench.device, torch.bfloat16, enabled=not bench.tiny):
            loss = prior(codes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return _training_case(run, batch, {"batch": batch, "parameters": _count(prior)})


def _training_case(
    run: Callable[[], Tensor],
    images: int,
    extra: dict[str, Any],
    then: Callable[[], Tensor] | None = None,
) -> Case:
    """Convolutions and matrix products are counted in an untimed step; they are the floor.

    ``then`` is what is timed, ``run`` itself by default.
    """
    then = then or run

    def check() -> dict[str, Any]:
        with FlopCounterMode(display=False) as counter:
            first = run()
        if on_gpu := torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        losses = [float(first), *(float(then()) for _ in range(WARM_UPS + 1))]
        assert all(loss == loss and abs(loss) < 1e6 for loss in losses), f"losses {losses}"
        case.cost = Cost(0.0, counter.get_total_flops())
        found = {"counted_flops": counter.get_total_flops(), "losses": losses}
        if on_gpu:  # of a graph only while it is recorded: a replay allocates nothing
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return found

    case = Case(then, check, extra={**extra, "images": images})  # its cost is known after check
    return case


def _plain_nearest_code(z: Tensor, codebook: Tensor, dim: int) -> Tensor:
    rows = z.movedim(dim, -1)
    return plain_search(rows.reshape(-1, rows.shape[-1]), codebook).view(rows.shape[:-1])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def rows() -> list[Row]:
    found = []
    for preset, (batch, rank) in PRESETS.items():
        names = {OURS: rank, f"{OURS}, {GRAPH}": rank}
        if preset == "celebahq1024-s":
            names |= {f"{OURS}, {mode}": 0 for mode in MEMORY_MODES}
            names |= {f"{OURS}, {mode}, {GRAPH}": 1 for mode in MEMORY_MODES}
            names |= {"torch eager": 1, "torch.compile": 2, f"{OURS} under torch.compile": 3}
        elif preset.startswith("celebahq1024"):
            names |= {f"{OURS}, {mode}": 2 for mode in MEMORY_MODES}
        for name, row_rank in names.items():
            found.append(
                Row(
                    "training",
                    f"training step {preset}, batch {batch}, bfloat16",
                    name,
                    bound(step, preset, batch, name),
                    row_rank,
                    40.0 if "compile" in name else 8.0,
                )
            )
    for kind in PRIORS:
        for name, kernels in ((OURS, (3, 5)), ("dense", None)):
            found.append(
                Row(
                    "training",
                    f"{kind} prior, training step, 32² and 64², batch 8, bfloat16",
                    name,
                    bound(prior_step, kind, kernels),
                    2 if name == OURS else 3,
                    8.0,
                )
            )
    return found
