"""Saved weights and the model that a configuration beside them describes."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from msvq_fast.ops.checks import InputError

Model = TypeVar("Model", bound=nn.Module)


def check_no_run(folder: Path) -> None:
    """Raise if ``folder`` is that of a training run, which holds checkpoints and no saved model."""
    if (folder / "checkpoints").is_dir() and not (folder / "model.safetensors").exists():
        raise InputError(
            f"{folder} is a run, not a saved model; give one of its checkpoints: "
            "msvq_fast.training.checkpoint.find_model finds the best"
        )


def build_and_load(build: Callable[[], Model], path: Path) -> Model:
    """Build a model and load the safetensors ``path`` into it.

    Both may come from strangers. The file cannot lie about its size, the configuration may ask for
    more memory or time than there is: it is refused once the model is larger than its weights.

    Args:
        build: Makes the model of the configuration.
        path: Its weights.

    Raises:
        InputError: If the file is missing or corrupt, or holds another model.
    """
    from safetensors.torch import load_file  # here: models run and are measured without it

    try:
        weights = load_file(path)
        with _Bounded(sum(tensor.numel() for tensor in weights.values())):
            model = build()
        model.load_state_dict(weights)
    except Exception as error:  # safetensors and torch raise their own types
        # torch says what is wrong only from its second line on, and goes through all tensors.
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise InputError(f"{path} cannot be loaded: {reason}") from None
    return model


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of ``model`` as safetensors, with the permissions of any new file."""
    from safetensors.torch import save_file  # here: models run and are measured without it

    path.touch()
    mode = path.stat().st_mode
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # of a disk that knows no permissions
        path.chmod(mode)  # of newer versions the file is its owner's alone


class _Bounded(TorchFunctionMode):
    """Raises before more room is made than twice ``values``, which leaves some for their start."""

    # A TorchDispatchMode would miss none, but loads all of torch.compile.
    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.randn)

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values, self.made = values, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in self.MAKERS:
            self.made += math.prod(args[0] if isinstance(args[0], (tuple, list)) else args)
            if self.made > 2 * self.values:
                raise ValueError(f"it has {self.values} values, the configuration asks for more")
        return func(*args, **(kwargs or {}))
