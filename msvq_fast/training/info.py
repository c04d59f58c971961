"""``msvq info``: what runs here and why not the rest, and the presets beside the paper."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import msvq_fast
from msvq_fast import models, ops
from msvq_fast.ops.backend import BACKENDS
from msvq_fast.training.config import InfoConfig
from msvq_fast.training.memory import batch_memory, step_memory
from msvq_fast.training.results import print_whole, table_console


def run_info(config: InfoConfig) -> int:
    """Print presets, predicted memory, or versions and ops by backend; return exit code 0."""
    console = table_console()
    if config.memory:
        print_whole(console, memory_table(config))
        console.print(
            f"{config.preset}, {config.precision}, batch {config.batch}, counted from "
            "sizes. Workspaces of the convolutions and what the allocator leaves unused come on "
            "top: 1 to 2 GB on a GPU is usual.",
            soft_wrap=True,
        )
        return 0
    if config.presets:
        print_whole(console, presets_table())
        console.print(
            "The paper prints no FFHQ autoencoder: that is what Table 4 leaves after 13.32 M of "
            "transformers.",
            soft_wrap=True,
        )
        return 0
    for name, value in versions().items():
        console.print(f"{name:<10} {value}", markup=False)
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            console.print("", ops_table(device), sep="\n")
        else:
            console.print("\nno CUDA device is seen, so nothing can be tried on cuda tensors")
    return 0


def versions() -> dict[str, str]:
    """Return what a bug report needs: versions, processor, devices."""
    cuda = torch.version.cuda or "none"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices = ", ".join(names)
    else:
        devices = "none seen"
    return {
        "msvq_fast": msvq_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else "not installed",
        "CUDA": f"{cuda} in torch; devices: {devices}",
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }


def ops_table(device: str) -> Table:
    """Run every op with every backend on small tensors of ``device`` and say how it went."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(f"on {device} tensors", no_wrap=True)
    for backend in BACKENDS:
        table.add_column(backend)
    for name, call in _sample_calls(device).items():
        table.add_row(name, *(_outcome(call, backend) for backend in BACKENDS))
    return table


def presets_table() -> Table:
    """Presets with their parameters, counted on the meta device, and the paper's figures."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("preset", "pixels", "latents", "K", "D", "parameters", "paper", "difference"):
        table.add_column(title, no_wrap=True, justify="left" if title == "preset" else "right")
    for name, config in models.PRESETS.items():
        count = count_parameters(name)
        paper = models.PAPER_PARAMETERS.get(name)
        table.add_row(
            name,
            str(config.resolution),
            "-".join(map(str, config.latents)),
            str(config.num_codes),
            str(config.code_dim),
            f"{count / 1e6:.3f} M",
            f"{paper} M" if paper is not None else "-",
            f"{100 * (count / 1e6 / paper - 1):+.2f} %" if paper is not None else "-",
        )
    return table


def memory_table(config: InfoConfig) -> Table:
    """What a training step needs in every memory mode, and how many images a card holds."""
    if config.batch < 1 or config.strips < 1 or not 0 < config.card_gib < math.inf:
        raise ops.InputError(
            f"batch={config.batch}, strips={config.strips}, card_gib={config.card_gib}; "
            "all must be positive and finite"
        )
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("memory", no_wrap=True)
    for title in ("weights + Adam", "kept", "peak of step", "per image", "largest batch"):
        table.add_column(title, justify="right", no_wrap=True)
    model_config = models.preset_config(config.preset)
    for mode in models.MEMORY_MODES:
        options: dict[str, Any] = {"memory": mode, "strips": config.strips}
        options["bf16"] = config.precision == "bf16"
        step = step_memory(model_config, batch=config.batch, **options)
        growth = batch_memory(model_config, **options)
        fits = growth.largest_batch(int(config.card_gib * 2**30))
        sizes = (step.state, step.kept, step.total, growth.per_image)
        table.add_row(mode, *(f"{size / 2**20:.1f} MiB" for size in sizes), str(fits))
    return table


def count_parameters(preset: str) -> int:
    """Return how many parameters a preset has; codebooks are buffers and do not count."""
    with torch.device("meta"):
        model = models.build(models.preset_config(preset))
    return sum(parameter.numel() for parameter in model.parameters())


def _outcome(call: Callable[[str], object], backend: str) -> str:
    try:
        call(backend)
    except ops.InputError as error:
        return str(error).partition(": ")[2] or str(error)
    except Exception as error:  # a broken installation should still print its table
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "available"


def _sample_calls(device: str) -> dict[str, Callable[[str], object]]:
    image = torch.zeros(1, 3, 16, 16, device=device)
    z = torch.zeros(16, 64, device=device)
    codebook = torch.zeros(4, 64, device=device)
    query = torch.zeros(1, 1, 16, 16, device=device)
    coarse = torch.zeros(1, 1, 4, 16, device=device)
    features = torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16, device=device)
    features = features.to(memory_format=torch.channels_last)
    weight, bias = features.new_zeros(16, 3, 4, 4), features.new_zeros(3)

    def update(backend: str) -> None:
        mass, counts = torch.ones(4, device=device), torch.ones(4, dtype=torch.int64, device=device)
        ops.ema_update_(codebook, mass, codebook.clone(), counts, codebook.clone(), backend=backend)

    def attend(backend: str) -> Tensor:
        return ops.local_attention(
            query,
            [coarse, query],
            [coarse, query],
            grids=[(2, 2), (4, 4)],
            kernels=[3, 3],
            backend=backend,
        )

    return {
        "nearest_code": lambda b: ops.nearest_code(z, codebook, backend=b),
        "vector_quantize": lambda b: ops.vector_quantize(z, codebook, dim=-1, backend=b),
        "ema_update_": update,
        "gaussian_blur": lambda b: ops.gaussian_blur(image, 3, backend=b),
        "multiscale_loss": lambda b: ops.multiscale_loss([image, image], image, backend=b),
        "local_attention": attend,
        "conv_bias_relu": lambda b: ops.conv_bias_relu(
            features, weight, bias, stride=2, padding=1, transposed=True, backend=b
        ),
        "upsample_image": lambda b: ops.upsample_image(features, weight, bias, backend=b),
    }
