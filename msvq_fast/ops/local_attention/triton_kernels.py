"""Local attention in Triton: launches and custom ops (triton_forward.py, triton_backward.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from msvq_fast.ops.local_attention.layout import (
    empty_grads,
    empty_lse,
    empty_tokens,
    flatten,
)
from msvq_fast.ops.local_attention.triton_shapes import (
    DTYPES,
    WIDTHS,
    is_small,
    launch,
    step_rows,
    tile_side,
    variants,
)
from msvq_fast.ops.local_attention.windows import Windows

__all__ = ["local_attention", "local_attention_backward", "unsupported", "variants"]

# Read once, as by the kernels; torch.compile cannot trace the reading.
_INTERPRETED: bool = triton.knobs.runtime.interpret
_SCALES = 4  # of one launch
_MOST_SIDE = 2**15  # a packed position has 15 bits for a coordinate
_SPLITS = 64  # programs per bias offset
_FULL = 2048  # programs that fill any GPU


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
    if q.dtype not in DTYPES:
        return f"the Triton kernel takes float32, bfloat16 or float16, q is {q.dtype}"
    if _INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 products"
    if q.shape[3] > WIDTHS[-1]:
        return f"the Triton kernel takes heads of at most {WIDTHS[-1]}, q has {q.shape[3]}"
    # One comparison a side: torch.compile would compile again for another order of the sides.
    for h, w in (windows.query_grid, *windows.grids):
        if h >= _MOST_SIDE or w >= _MOST_SIDE:
            return f"the Triton kernel takes grids of less than {_MOST_SIDE} a side, not {h} x {w}"
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
    call = _Call(q, keys, values, bias, sizes, rules, scale)
    result = _room_for(out)
    for part in call.parts:
        call.over_queries("forward_kernel", (*_tokens(call.q), *_tokens(result), lse), part)
    return _finished(out, result), lse


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
    call = _Call(q, keys, values, bias, sizes, rules, scale)
    grad_out, out = _vectors(grad_out), _vectors(out)
    delta = torch.empty_like(lse)
    launch(
        "delta_kernel",
        call.planes * triton.cdiv(call.tokens, step_rows(call.width)),
        (*_tokens(out), *_tokens(grad_out), delta, call.heads, call.width // 8, call.tokens),
        q.dtype,
        call.width,
    )
    inputs = (*_tokens(call.q), *_tokens(grad_out))
    results = [*map(_room_for, grads[: 1 + 2 * len(keys)])]
    for part in call.parts:
        call.over_queries("query_kernel", (*inputs, *_tokens(results[0]), lse, delta), part)
    tables = iter(grads[1 + 2 * len(keys) :])
    for n, table in enumerate(call.tables):
        rooms = (results[1 + n], results[1 + len(keys) + n])
        call.over_keys(n, inputs, (lse, delta), rooms)
        if table is not None:
            next(tables).copy_(call.over_offsets(n, inputs, (lse, delta)))
    for grad, result in zip(grads, results, strict=False):
        _finished(grad, result)
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


class _Call:
    """The arguments of one call as the kernels take them, and the launches over them."""

    def __init__(
        self,
        q: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        bias: list[Tensor | None],
        sizes: list[int],
        rules: list[bool],
        scale: float,
    ) -> None:
        self.q, self.keys, self.values = (
            _vectors(q),
            [*map(_vectors, keys)],
            [*map(_vectors, values)],
        )
        self.tables = [
            None if b is None else b.clone(memory_format=torch.contiguous_format) for b in bias
        ]
        self.batch, self.heads, self.tokens, self.width = self.q.shape
        self.planes = self.batch * self.heads
        self.group = self.heads // keys[0].shape[1]
        self.grid = (sizes[0], sizes[1])
        self.scales = [(sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(2, len(sizes), 3)]
        self.own, self.raster, self.include_self, self.shift = map(int, rules)
        self.scale = scale
        self.small = is_small(q.dtype, self.width, self.grid, any(b is not None for b in bias))
        count = len(keys)
        self.parts = [range(i, min(i + _SCALES, count)) for i in range(0, count, _SCALES)]
        """Scales of each launch over queries."""
        self.sums = q.new_empty(self.q.shape, dtype=torch.float32) if count > _SCALES else None

    def over_queries(self, name: str, tensors: tuple[Any, ...], part: range) -> None:
        """Launch a kernel over tiles of queries for some of the scales."""
        # The last slot is always used; the empty ones come first.
        slots = [part[-1]] * (_SCALES - len(part)) + list(part)
        last = part[-1] == len(self.keys) - 1
        tile = tile_side(name, self.q.dtype, self.width, self.small)
        side = 2
        if self.small or self.planes * _cells(self.grid, 2 * tile)[0] < _FULL:
            side = 1
        tiles, across = _cells(self.grid, side * tile)
        arguments = (
            *tensors,
            tensors[-1] if self.sums is None else self.sums,
            *(item for n in slots for item in self._slot(n)),
            self.heads, self.group, self.width // 8, *self.grid, across, tiles, side, self.scale,
            _SCALES - len(part), self.own and last, self.raster, self.include_self, self.shift,
            int(part[0] > 0), int(last),
        )  # fmt: skip
        biased = any(self.tables[n] is not None for n in part)
        self._launch(name, self.planes * tiles, arguments, self.small, biased)

    def over_keys(
        self,
        n: int,
        inputs: tuple[Any, ...],
        sums: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor],
    ) -> None:
        """Launch the gradients of the keys and values of one scale."""
        h, w, _ = self.scales[n]
        small = self.small and min(h, w) > 4
        tiles, across = _cells((h, w), tile_side("key_kernel", self.q.dtype, self.width, small))
        key, value, table, *sides = self._scale(n)
        arguments = (
            *inputs, *key, *value, table, *sums, *_tokens(grads[0]), *_tokens(grads[1]),
            self.heads, self.group, self.width // 8, *self.grid, *sides, across, tiles, self.scale,
            *self._rules(n),
        )  # fmt: skip
        programs = self.planes // self.group * tiles
        self._launch("key_kernel", programs, arguments, small, self.tables[n] is not None)

    def over_offsets(self, n: int, inputs: tuple[Any, ...], sums: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of the bias of one scale, float32."""
        key, value, table, *sides = self._scale(n)
        splits = min(_SPLITS, self.batch * triton.cdiv(self.tokens, step_rows(self.width)))
        parts = self.q.new_empty((*table.shape, splits), dtype=torch.float32)  # one per program
        arguments = (
            *inputs, *key, *value, table, *sums, parts, self.batch,
            self.heads, self.group, self.width // 8, *self.grid, *sides, splits, self.scale,
            *self._rules(n),
        )  # fmt: skip
        self._launch("bias_kernel", parts.numel(), arguments)
        return parts.sum(-1)

    def _launch(
        self,
        name: str,
        programs: int,
        arguments: tuple[Any, ...],
        small: bool = False,
        biased: bool = False,
    ) -> None:
        launch(name, programs, arguments, self.q.dtype, self.width, small, biased)

    def _rules(self, n: int) -> tuple[int, ...]:
        own = int(self.own and n == len(self.keys) - 1)
        return own, self.raster, self.include_self, self.shift

    def _scale(self, n: int) -> tuple[Any, ...]:
        """Keys, values, bias, h, w, radius and size of the bias of a scale."""
        table = self.tables[n]
        h, w, kernel = self.scales[n]
        radius = min(kernel // 2, _MOST_SIDE)  # covers every grid
        size = 0 if table is None else table.shape[-1]
        place = self.q if table is None else table
        return _tokens(self.keys[n]), _tokens(self.values[n]), place, h, w, radius, size

    def _slot(self, n: int) -> tuple[Any, ...]:
        key, value, *rest = self._scale(n)
        return (*key, *value, *rest)


def _cells(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """The number of squares of ``side`` that cover a grid, and how many lie side by side."""
    across = triton.cdiv(grid[1], side)
    return triton.cdiv(grid[0], side) * across, across


def _vectors(t: Tensor) -> Tensor:
    """``t`` where the kernels can read eight channels at a time, else a copy, padded with zeros."""
    *strides, step = t.stride()
    aligned = all(size % 8 == 0 for size in (*strides, t.shape[3])) and t.data_ptr() % 16 == 0
    if aligned and step == 1:
        return t
    copy = t.new_zeros((*t.shape[:3], t.shape[3] + -t.shape[3] % 8))
    copy[..., : t.shape[3]] = t
    return copy


def _room_for(result: Tensor) -> Tensor:
    """Where the kernels can write ``result``: itself, or a padded tensor; see `_finished`."""
    if result.shape[3] % 8 == 0:
        return result
    return result.new_empty((*result.shape[:3], result.shape[3] + -result.shape[3] % 8))


def _finished(result: Tensor, written: Tensor) -> Tensor:
    return result if written is result else result.copy_(written[..., : result.shape[3]])


def _tokens(t: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor and its strides in vectors of eight channels."""
    return t, t.stride(0) // 8, t.stride(1) // 8, t.stride(2) // 8
