"""One clear line for images and code grids that a model cannot take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast.ops.checks import InputError, check_image, may_read


def check_images(x: Tensor, weight: Tensor, stride: int) -> None:
    """Raise unless ``x`` is ``(B, 3, H, W)`` in [-1, 1], sides multiples of ``stride``.

    ``weight`` has the device of the model and, where autocast is off, the dtype that it takes.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"x is a {type(x).__name__}; expected a tensor (B, 3, H, W)")
    if x.dtype == torch.uint8:
        raise InputError("x has dtype torch.uint8; expected float in [-1, 1]: x / 127.5 - 1")
    check_image("x", x)
    if x.shape[1] != 3:
        raise InputError(f"x has {x.shape[1]} channels; expected 3 (RGB)")
    height, width = x.shape[-2:]
    if height % stride or width % stride:
        raise InputError(f"x is {height}x{width} pixels; both sides must be multiples of {stride}")
    if x.device != weight.device:
        raise InputError(f"x is on {x.device} but the model is on {weight.device}")
    device = x.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)
    if x.dtype != weight.dtype and not casts:
        raise InputError(f"x has dtype {x.dtype}; expected the model's {weight.dtype}, or autocast")
    # On a GPU the look at the values would wait for the device.
    if may_read(x):
        low, high = x.detach().aminmax()
        if not (low >= -1.01 and high <= 1.01):  # of NaN too
            raise InputError(f"x spans [{low:.4g}, {high:.4g}]; expected values in [-1, 1]")


def check_hierarchy(codes: Sequence[Tensor], num_scales: int, *, whole: bool) -> None:
    """Raise unless ``codes`` are ``(B, h, w)`` grids, each double the one before."""
    if not 1 <= len(codes) <= num_scales or (whole and len(codes) != num_scales):
        expected = f"{num_scales}" if whole else f"1 to {num_scales}"
        raise InputError(f"codes has {len(codes)} grids; expected {expected}")
    for m, grid in enumerate(codes):
        if not isinstance(grid, Tensor):
            raise InputError(
                f"codes[{m}] is a {type(grid).__name__}; expected an int64 tensor (B, h, w)"
            )
        shape = (*codes[0].shape[:1], *(side << m for side in codes[0].shape[1:]))
        if grid.dim() != 3 or grid.shape != shape:
            raise InputError(
                f"codes[{m}] has shape {tuple(grid.shape)}; expected (B, h, w), each grid "
                "double the one before"
            )
