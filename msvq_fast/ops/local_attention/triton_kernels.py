"""Local attention in Triton: launches and custom ops (triton_forward.py, triton_backward.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from msvq_fast.ops.backend import KernelVariant
from msvq_fast.ops.local_attention.layout import (
    empty_grads,
    empty_lse,
    empty_tokens,
    flatten,
    rows,
)
from msvq_fast.ops.local_attention.triton_backward import (
    bias_kernel,
    delta_kernel,
    key_kernel,
    query_kernel,
)
from msvq_fast.ops.local_attention.triton_forward import forward_kernel
from msvq_fast.ops.local_attention.windows import Windows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_CHANNELS = 128
# Read once, as by the kernels; torch.compile cannot trace the reading.
_INTERPRETED: bool = triton.knobs.runtime.interpret
_SCALES = 4  # of one launch of the forward
_WHOLE = 2**28 + 1  # a window that covers any grid, one constant for all of them
_SMALL = 256  # queries of a grid that few large tiles cover best
_ROWS = 64  # queries of a step of the elementwise kernels
_POINTERS = ("q", "out", "grad_out", "key", "value", "bias", "grad_q", "grad_key", "grad_value")
_SPLITS = 64  # programs per bias offset


def unsupported(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
) -> str | None:
    """Why this call cannot run here, or None."""
    if q.device.type != "cuda" and not (_INTERPRETED and q.device.type == "cpu"):
        return f"the Triton kernel runs on CUDA tensors, q is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"the Triton kernel takes float32, bfloat16 or float16, q is {q.dtype}"
    if _INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 products"
    if q.shape[3] > _MOST_CHANNELS:
        return f"the Triton kernel takes heads of at most {_MOST_CHANNELS}, q has {q.shape[3]}"
    return None


def local_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, strided like ``q``, and the log-sum-exp ``(B, heads, N_m)`` of its scores."""
    sizes, rules = flatten(windows)
    out, lse = _local_attention(q, list(keys), list(values), list(bias), sizes, rules, scale)
    return out, lse


def local_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    windows: Windows,
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """The gradients of ``q``, ``keys``, ``values`` and ``bias``."""
    sizes, rules = flatten(windows)
    grads = _local_attention_backward(
        grad_out, q, list(keys), list(values), list(bias), out, lse, sizes, rules, scale
    )
    n = len(keys)
    rest = iter(grads[1 + 2 * n :])
    grad_bias = [None if b is None else next(rest) for b in bias]
    return grads[0], grads[1 : 1 + n], grads[1 + n : 1 + 2 * n], grad_bias


@torch.library.custom_op("msvq_fast::local_attention_triton", mutates_args=())
def _local_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_tokens(q), empty_lse(q)
    if q.numel() == 0:
        return out, lse
    q, keys, values = rows(q), [*map(rows, keys)], [*map(rows, values)]
    tables = [None if b is None else b.contiguous() for b in bias]
    batch, heads, _, width = q.shape
    grid, scales = _scales(sizes, tables)
    own, raster, include_self, shift = rules
    tile, block, warps = _tile(q.dtype, width, grid)
    tiles, across = _tiles(grid, tile)
    before = lse
    for start in range(0, len(keys), _SCALES):
        part = range(start, min(start + _SCALES, len(keys)))
        last = part[-1] == len(keys) - 1
        result = out if last else torch.empty(q.shape, dtype=torch.float32, device=q.device)
        # The last slot is always used; the empty ones come first.
        slots = [-1] * (_SCALES - len(part)) + list(part)
        arguments: list[Any] = []
        for n in slots:
            k, v, table = (keys[n], values[n], tables[n]) if n >= 0 else (q, q, None)
            h, w = scales[n][:2] if n >= 0 else (1, 1)
            arguments += [*_tokens(k), *_tokens(v), q if table is None else table, h, w]
        forward_kernel[(batch * heads * tiles,)](
            *_tokens(q), *_tokens(result), lse, before, *arguments,
            heads, heads // keys[0].shape[1], *grid, across, tiles, scale,
            *(scales[n][2] if n >= 0 else 0 for n in slots),
            *(n >= 0 and tables[n] is not None for n in slots),
            FIRST=start == 0, OWN=own and last, RASTER=raster, SELF=include_self, SHIFT=shift,
            **_shape(width, tile, block), num_warps=warps, num_stages=1,
        )  # fmt: skip
        before = result
    return out, lse


@_local_attention.register_fake
def _(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return empty_tokens(q), empty_lse(q)


@torch.library.custom_op("msvq_fast::local_attention_backward_triton", mutates_args=())
def _local_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    out: Tensor,
    lse: Tensor,
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> list[Tensor]:
    grads = empty_grads(q, keys, values, bias)
    if q.numel() == 0:
        return [g.zero_() for g in grads]
    q, keys, values = rows(q), [*map(rows, keys)], [*map(rows, values)]
    grad_out, out = rows(grad_out), rows(out)
    tables = [None if b is None else b.contiguous() for b in bias]
    batch, heads, tokens, width = q.shape
    kv_heads = keys[0].shape[1]
    grid, scales = _scales(sizes, tables)
    own, raster, include_self, shift = rules
    tile, block, warps = _tile(q.dtype, width, grid)
    tiles, across = _tiles(grid, tile)
    last = len(keys) - 1
    delta = torch.empty_like(lse)
    delta_kernel[(batch * heads * triton.cdiv(tokens, _ROWS),)](
        *_tokens(out), *_tokens(grad_out), delta, heads, tokens,
        D=width, DP=_padded(width), BLOCK=_ROWS,
    )  # fmt: skip
    sums = torch.empty(q.shape, dtype=torch.float32, device=q.device) if last > 0 else delta
    tables_of_grads = iter(grads[1 + 2 * len(keys) :])
    for n, (key, value, table) in enumerate(zip(keys, values, tables, strict=True)):
        h, w, kernel = scales[n]
        rules_n = {
            "OWN": own and n == last,
            "RASTER": raster,
            "SELF": include_self,
            "SHIFT": shift,
        }
        inputs = (*_tokens(q), *_tokens(grad_out), *_tokens(key), *_tokens(value))
        numbers = (q if table is None else table, lse, delta)
        sides = (heads, heads // kv_heads, *grid, h, w)
        query_kernel[(batch * heads * tiles,)](
            *inputs, *numbers, sums, *_tokens(grads[0]), *sides, across, tiles, scale,
            KERNEL=kernel, BIAS=table is not None, FIRST=n == 0, LAST=n == last, **rules_n,
            **_shape(width, tile, block), num_warps=warps, num_stages=1,
        )  # fmt: skip
        key_tiles, key_across = _tiles((h, w), tile)
        key_kernel[(batch * kv_heads * key_tiles,)](
            *inputs, *numbers, *_tokens(grads[1 + n]), *_tokens(grads[2 + last + n]),
            *sides, key_across, key_tiles, scale,
            KERNEL=kernel, BIAS=table is not None, **rules_n,
            **_shape(width, tile, block), num_warps=_key_warps(warps), num_stages=1,
        )  # fmt: skip
        if table is not None:
            grad_table = next(tables_of_grads)
            splits = min(_SPLITS, batch * triton.cdiv(tokens, _ROWS))
            parts = torch.empty(
                (*table.shape, splits), dtype=torch.float32, device=q.device
            )  # every program writes its own
            bias_kernel[(parts.numel(),)](
                *inputs, *numbers, parts, batch, *sides, scale, splits,
                KERNEL=kernel, **rules_n, D=width, DP=_padded(width), BLOCK=_ROWS,
            )  # fmt: skip
            grad_table.copy_(parts.sum(-1))
    return grads


@_local_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    out: Tensor,
    lse: Tensor,
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> list[Tensor]:
    return empty_grads(q, keys, values, bias)


def variants() -> list[KernelVariant]:
    """What is compiled ahead of time: every head width, type, window and rule that differs."""
    result = []
    for dtype in _DTYPES:
        for width in (16, 32, 64, 128):
            for kernel in (3, 5, 7, 9):
                result += _variants(dtype, width, kernel, (64, 64))
        for width in (20, 32, 64):
            result += _variants(dtype, width, 5, (8, 8))
        result += _variants(dtype, 32, 5, (64, 64), raster=True)
        result += _variants(dtype, 32, 5, (64, 64), shift=True)
        result += _variants(dtype, 32, 5, (64, 64), bias=True)
        result += _variants(dtype, 32, _WHOLE, (64, 64))
    return result


def _variants(
    dtype: torch.dtype,
    width: int,
    kernel: int,
    grid: tuple[int, int],
    *,
    raster: bool = False,
    shift: bool = False,
    bias: bool = False,
) -> list[KernelVariant]:
    """The kernels of one call with a coarse 3 x 3 window and an own one, and of its backward."""
    tile, block, warps = _tile(dtype, width, grid)
    rules = {"OWN": True, "RASTER": raster, "SELF": False, "SHIFT": shift}
    shape = _shape(width, tile, block)
    plain = {"D": width, "DP": _padded(width), "BLOCK": _ROWS}
    one = {"KERNEL": kernel, "BIAS": bias, **rules, **shape}
    windows = {"K0": 0, "K1": 0, "K2": 3, "K3": kernel, "B0": False, "B1": False, "B2": False}
    kernels: list[tuple[Any, dict[str, Any], int, bool]] = [
        (forward_kernel, {**windows, "B3": bias, "FIRST": True, **rules, **shape}, warps, True),
        (query_kernel, {**one, "FIRST": False, "LAST": True}, warps, True),
        (key_kernel, one, _key_warps(warps), True),
        (delta_kernel, plain, 4, False),
    ]
    if bias:
        kernels.append((bias_kernel, {"KERNEL": kernel, **rules, **plain}, 4, False))
    label = f"{str(dtype).removeprefix('torch.')} d{width} k{kernel} {grid[0]}x{grid[1]}"
    label += " raster" * raster + " shift" * shift + " bias" * bias
    return [
        KernelVariant(
            name=f"{function.__name__} {label}",
            kernel=function,
            signature={name: _type(name, dtype, constants) for name in function.arg_names},
            constants=constants,
            num_warps=num_warps,
            num_stages=1,
            tensor_cores=dots and dtype != torch.float32,
        )
        for function, constants, num_warps, dots in kernels
    ]


def _type(name: str, dtype: torch.dtype, constants: dict[str, Any]) -> str:
    """The Triton type of an argument of any of the kernels."""
    if name in constants:
        return "constexpr"
    if name in ("lse", "before", "delta", "sums", "parts"):
        return "*fp32"
    if name == "scale":
        return "fp32"
    if name in _POINTERS or re.fullmatch(r"[kvb]\d", name):
        return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    return "i32"


def _scales(
    sizes: list[int], tables: list[Tensor | None]
) -> tuple[tuple[int, int], list[tuple[int, int, int]]]:
    """The queries' grid, and (h, w, kernel) of every scale as the kernels are specialised to it."""
    scales = []
    for n, table in enumerate(tables):
        h, w, kernel = sizes[2 + 3 * n : 5 + 3 * n]
        covers = kernel >= 2 * max(h, w) - 1
        scales.append((h, w, _WHOLE if covers and table is None else kernel))
    return (sizes[0], sizes[1]), scales


def _tile(dtype: torch.dtype, width: int, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Side of a tile, keys of a step and warps: the most that fits the registers."""
    if dtype == torch.float32:
        return 4, 16, 4 if width <= 32 else 8
    if grid[0] * grid[1] <= _SMALL and width <= 64:
        return 8, 32, 4
    return 4, 32, 1 if width <= 64 else 2


def _key_warps(warps: int) -> int:
    """Warps of the key gradients, which keep two sums in place of one."""
    return min(4 * warps, 8)


def _tiles(grid: tuple[int, int], tile: int) -> tuple[int, int]:
    """The number of tiles of a grid, and how many lie side by side."""
    across = triton.cdiv(grid[1], tile)
    return triton.cdiv(grid[0], tile) * across, across


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _shape(width: int, tile: int, block: int) -> dict[str, int]:
    return {"D": width, "DP": _padded(width), "T": tile, "BLOCK": block}


def _tokens(t: Tensor) -> tuple[Tensor, int, int, int]:
    return t, t.stride(0), t.stride(1), t.stride(2)
