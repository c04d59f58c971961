"""Training steps and draws on CUDA tensors: the host waits for nothing, all memory modes agree."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from msvq_fast import models
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.optimizer import build_adam
from msvq_fast.training.window import Window
from tests.models.test_memory import assert_same, images, small

GRIDS = ((4, 4), (8, 8))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("restart", [0.0, 0.5])
@pytest.mark.parametrize("memory", models.MEMORY_MODES)
@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
def test_a_training_step_waits_for_nothing(
    device: str, preset: str, memory: str, restart: float
) -> None:
    model = models.from_preset(preset, restart_below=restart)
    model.to(device=device, memory_format=torch.channels_last).train()
    model.defer_codebook_updates()
    model.set_memory(memory, strips=2)
    optimizer = build_adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9))
    config = model.config
    outputs = config.num_scales if preset == "tiny" else 1
    world = World(0, 1, torch.device(device))
    window = Window(outputs, config.num_scales, config.num_codes, world)
    x = (torch.rand(4, 3, 64, 64) * 2 - 1).to(device)

    def step(number: int) -> None:
        with torch.autocast(device, torch.bfloat16):
            out = model(x.contiguous(memory_format=torch.channels_last))
        out.loss.backward()
        window.add(out, number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_codebooks()

    step(1)  # compiles, makes Adam's moments
    with no_synchronisation():
        step(2)
        step(3)
    window.check()
    assert window.read().loss > 0


# There are no kernels in float64.
@pytest.mark.filterwarnings("ignore:.* runs its slow reference on CUDA:UserWarning")
@pytest.mark.parametrize("name", ["celebahq1024-s", "imagenet256-l", "vqvae2-ffhq128"])
def test_memory_modes_agree(device: str, name: str) -> None:
    plain = small(name).to(device).double()
    x = images(plain).to(device)
    for mode, strips in (("sequential", 1), ("strips", 3)):
        other = copy.deepcopy(plain)
        other.set_memory(mode, strips=strips)
        assert_same(copy.deepcopy(plain), other, x)


def test_memory_modes_need_less_and_less(device: str) -> None:
    model = models.from_preset("imagenet256-s", width=64).to(device)
    model.defer_codebook_updates()
    x = (torch.rand(8, 3, 256, 256) * 2 - 1).to(device)
    peaks = []
    for mode in models.MEMORY_MODES:
        model.set_memory(mode)
        for _ in range(2):  # the first one loads libraries
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(x).loss.backward()
            model.zero_grad()
            model.update_codebooks()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert peaks[0] > peaks[1] > peaks[2]


def draw(prior: nn.Module, coarse: Tensor, **settings: object) -> Tensor:
    """Draw scale 1 twice, the second time without waiting after the first logits are there."""
    model = prior.scale_model(1)

    def forbid(*_: object) -> None:
        torch.cuda.set_sync_debug_mode("error")

    for again in (False, True):
        hook = model.head.register_forward_hook(forbid) if again else None
        try:
            codes = prior.draw_scale(1, [coarse], batch=2, seed=0, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            if hook is not None:
                hook.remove()
    return codes


@pytest.mark.parametrize("kernels", [None, (3, 5)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (AutoregressivePrior, {}),
        (AutoregressivePrior, {"top_k": 5, "top_p": 0.9}),
        (MaskGITPrior, {"guidance": 2.0}),
        (MaskGITPrior, {"order": "halton"}),
    ],
)
def test_drawing_waits_for_nothing(
    device: str, kind: type, settings: dict[str, object], kernels: tuple[int, ...] | None
) -> None:
    sizes = {"num_codes": 11, "num_classes": 3, "depth": 2, "heads": 2, "width": 32}
    prior = kind(PriorConfig(GRIDS, kernels=kernels, **sizes)).to(device).eval()
    coarse = torch.randint(11, (2, 4, 4)).to(device)
    labels = torch.tensor([0, 2]).to(device)
    codes = draw(prior, coarse, labels=labels, **settings)
    assert codes.shape == (2, 8, 8)
    assert codes.min() >= 0 and codes.max() < 11


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
def test_a_step_of_a_prior_waits_for_nothing(device: str, kind: type) -> None:
    sizes = {"num_codes": 11, "depth": 2, "heads": 2, "width": 32}
    prior = kind(PriorConfig(GRIDS, kernels=(3, 5), **sizes)).to(device).train()
    codes = [torch.randint(11, (2, h, w)).to(device) for h, w in GRIDS]
    prior(codes).loss.backward()  # compiles
    with no_synchronisation():
        prior(codes).loss.backward()
