"""What two ops or more share: errors, one line each, and what is computed in which precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class InputError(ValueError):
    """Bad input from the caller: the message is one line for people, no traceback needed."""


class WorkError(RuntimeError):
    """Good input, and yet the work came to nothing: one line for people, no traceback needed."""


def check_float(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is float32, float64, bfloat16 or float16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{name} has dtype {tensor.dtype}; expected float32, float64, bfloat16 or float16"
        )


def check_image(name: str, x: Tensor, *, allow_uint8: bool = False) -> None:
    """Raise unless ``x`` is a ``(B, C, H, W)`` image batch with H, W >= 1 of a float dtype."""
    if x.dim() != 4:
        raise InputError(f"{name} has shape {tuple(x.shape)}; expected 4 dimensions (B, C, H, W)")
    if x.shape[-1] < 1 or x.shape[-2] < 1:
        raise InputError(f"{name} has shape {tuple(x.shape)}; height and width must be at least 1")
    if not (allow_uint8 and x.dtype == torch.uint8):
        check_float(name, x)


def check_same_device(**tensors: Tensor) -> None:
    """Raise unless all keyword tensors are on the first one's device."""
    (first, head), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != head.device:
            raise InputError(f"{name} is on {tensor.device} but {first} is on {head.device}")


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise unless all keyword tensors have the first one's dtype."""
    (first, head), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.dtype != head.dtype:
            raise InputError(f"{name} has dtype {tensor.dtype} but {first} has {head.dtype}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise InputError(f"{name}={value!r}; expected one of {expected}")


def check_at_least(least: int, **values: float) -> None:
    """Raise unless all keyword numbers are ``least`` or more."""
    for name, value in values.items():
        if not (_is_number(value) and value >= least):
            raise InputError(f"{name}={value!r}; expected at least {least}")


def check_count(**values: int) -> None:
    """Raise unless all keyword numbers are ints of 1 or more, NumPy's included."""
    for name, value in values.items():
        whole = isinstance(value, (int, Integral, torch.SymInt)) and not isinstance(value, bool)
        if not whole or value < 1:
            raise InputError(f"{name}={value!r}; expected an int of at least 1")


def check_not_negative(**values: float) -> None:
    """Raise unless all keyword numbers are finite and 0 or more."""
    for name, value in values.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise InputError(f"{name}={value!r}; expected a finite number >= 0")


def check_decay(decay: float) -> None:
    """Raise unless ``decay`` is a share of what was that leaves some for what is new."""
    if not (_is_number(decay) and 0 <= decay < 1):
        raise InputError(f"decay={decay!r}; expected 0 <= decay < 1")


def _is_number(value: object) -> bool:
    """Not so None, nor the string that a YAML file has for 1e-3."""
    # The first two are those of most calls, and found at once.
    return isinstance(value, (float, int, Real, Tensor, torch.SymInt, torch.SymFloat))


def may_read(tensor: Tensor) -> bool:
    """Whether looking at values costs no wait for a device, and there are values to look at.

    Subclasses are not looked at: a fake tensor has sizes only. Nor are those of `torch.func.vmap`.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not is_transformed()
    on_host = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and on_host and tensor.numel() > 0


def is_transformed() -> bool:
    """Whether the call is inside of a transform of ``torch.func`` or forward-mode differentiation.

    Kernels have no rules for them and would drop tangents without a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether something sees PyTorch's operations one by one, to change, record or count them.

    A kernel of ours that runs between them, and may write where one of them wrote, is unseen.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
    )


def is_in_onnx_export() -> bool:
    """Whether `torch.onnx.export` traces the call.

    PyTorch's own answer loads its exporter, and then takes a tenth of the time of an op's call, so
    it is asked only where something traces at all.
    """
    return is_watched() and torch.onnx.is_in_onnx_export()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, losses and filters of ``dtype`` inputs are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Products in the dtype of their inputs; the meta device has no autocast to switch off."""
    if device == "meta":
        return nullcontext()
    return torch.autocast(device_type=device, enabled=False)
