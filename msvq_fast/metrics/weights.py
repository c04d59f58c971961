"""Weights of the networks that judge images: always a file of the user's, never bundled."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from msvq_fast.ops import InputError


class Judge(nn.Module):
    """A network with published weights.

    Attributes:
        sha256: Of the weights it was loaded from, empty for random ones.
    """

    sha256: str = ""


Network = TypeVar("Network", bound=Judge)
_SUFFIXES = (".pth", ".pt", ".safetensors")


def read_weights(source: str | Path, *, argument: str, holds: str) -> dict[str, Tensor]:
    """Read one file of weights, or all files of a folder as one, on the CPU.

    Args:
        source: A file of ``torch.save`` (tensors only, no code is run) or safetensors, or a folder
            of such files.
        argument: Name of the option, for the message.
        holds: What the file must hold, for the message.

    Raises:
        InputError: If there is no such file, or it is not a table of tensors; in one line.
    """
    path = Path(source).expanduser()
    files = _files(path)
    if not files:
        what = "holds no .pth, .pt or .safetensors" if path.is_dir() else "does not exist"
        raise InputError(f"{argument}={str(source)!r} {what}; expected {holds}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_file(file, argument, holds))
    return tensors


def _files(path: Path) -> list[Path]:
    """The file itself, or the weight files directly in a folder, sorted; empty if there is none."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    return [path] if path.is_file() else []


def _sha256(source: str | Path) -> str:
    """SHA-256 of the bytes that `read_weights` reads, files of a folder in their order."""
    digest = hashlib.sha256()
    for file in _files(Path(source).expanduser()):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def fill(
    network: Network,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    *,
    argument: str,
    holds: str,
) -> Network:
    """Load ``tensors`` into ``network`` and freeze it; all it holds must be there and fit.

    Args:
        network: Filled in place and returned, in evaluation mode and without gradients.
        tensors: May hold more than the network has, and may lack the counters of batch
            normalisation.
        source: Where `read_weights` found them.
        argument: As in `read_weights`.
        holds: As in `read_weights`.

    Raises:
        InputError: For the first tensor that is missing or has another shape.
    """
    wanted = {k: v for k, v in network.state_dict().items() if not k.endswith("batches_tracked")}
    given = f"{argument}={str(source)!r}"
    for name, own in wanted.items():
        if name not in tensors:
            raise InputError(f"{given} has no tensor {name!r}; expected {holds}")
        if tensors[name].shape != own.shape:
            raise InputError(
                f"{given} has {name!r} of shape {tuple(tensors[name].shape)}, expected "
                f"{tuple(own.shape)}: {holds}"
            )
    network.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    network.sha256 = _sha256(source)
    return network.eval().requires_grad_(False)


def _read_file(file: Path, argument: str, holds: str) -> dict[str, Tensor]:
    loaded: Any
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{argument}: cannot read {str(file)!r}: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{argument}: {str(file)!r} is no file of tensors ({reason}); expected {holds}"
        ) from None
    except Exception as error:  # safetensors' own error type is not public in all its versions
        raise InputError(
            f"{argument}: {str(file)!r} is corrupt ({error}); expected {holds}"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise InputError(f"{argument}: {str(file)!r} is no table of tensors; expected {holds}")
    return loaded
