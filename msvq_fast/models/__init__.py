"""Stage 1: MS-VQVAE, its baseline VQ-VAE 2, and the presets of the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msvq_fast.models.autoencoder import (
    DEFAULT_STRIPS,
    MEMORY_MODES,
    MSVQVAEOutput,
    sum_contributions,
)
from msvq_fast.models.hub import local_folder, read_config, read_results, weights_digest
from msvq_fast.models.msvqvae import MSVQVAE
from msvq_fast.models.presets import (
    PAPER_PARAMETERS,
    PRESETS,
    MSVQVAEConfig,
    VQVAE2Config,
    preset_config,
)
from msvq_fast.models.vqvae2 import VQVAE2
from msvq_fast.ops.checks import InputError

__all__ = [
    "DEFAULT_STRIPS",
    "MEMORY_MODES",
    "MSVQVAE",
    "PAPER_PARAMETERS",
    "PRESETS",
    "VQVAE2",
    "MSVQVAEConfig",
    "MSVQVAEOutput",
    "VQVAE2Config",
    "build",
    "from_preset",
    "from_pretrained",
    "preset_config",
    "read_results",
    "sum_contributions",
    "weights_digest",
]


def build(config: MSVQVAEConfig | VQVAE2Config, *, backend: str | None = None) -> MSVQVAE | VQVAE2:
    """The model of a configuration, with fresh weights."""
    if isinstance(config, MSVQVAEConfig):
        return MSVQVAE(config, backend=backend)
    return VQVAE2(config, backend=backend)


def from_preset(name: str, *, backend: str | None = None, **overrides: Any) -> MSVQVAE | VQVAE2:
    """The model of a preset, with fresh weights; ``overrides`` replace fields of its config."""
    return build(preset_config(name, **overrides), backend=backend)


def from_pretrained(source: str | Path, *, backend: str | None = None) -> MSVQVAE | VQVAE2:
    """Load whichever model a folder or a hub repository ``owner/name`` holds, in training mode.

    Raises:
        InputError: As `MSVQVAE.from_pretrained`.
    """
    folder = local_folder(source)
    name = read_config(folder)["model"]
    classes: dict[str, type[MSVQVAE] | type[VQVAE2]] = {"MSVQVAE": MSVQVAE, "VQVAE2": VQVAE2}
    if name not in classes:
        raise InputError(f"{folder} holds a {name!r}; expected one of {', '.join(classes)}")
    return classes[name].from_pretrained(folder, backend=backend)
