"""Arguments of the Triton kernels as they take them, and the launches over them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from msvq_fast.ops.local_attention.triton_shapes import is_small, launch, step_rows, tile_side

MOST_SIDE = 2**15  # a packed position has 15 bits for a coordinate
_SCALES = 4  # of one launch
_SPLITS = 64  # programs per bias offset
_FULL = 2048  # programs that fill any GPU


class Call:
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
            vectors(q),
            [*map(vectors, keys)],
            [*map(vectors, values)],
        )
        self.tables = [None if b is None else aligned(b) for b in bias]
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
        tile = tile_side(name, self.q.dtype, self.width, self.small)
        side = 2
        if self.small or self.planes * _cells(self.grid, 2 * tile)[0] < _FULL:
            side = 1
        tiles, across = _cells(self.grid, side * tile)
        programs = self.planes * tiles
        arguments = (
            *tensors,
            tensors[-1] if self.sums is None else self.sums,
            *self._slots(part),
            self.heads, self.group, self.width // 8, *self.grid, across, tiles, side,
            *_shares(programs, self.q.device), self.scale,
            *self._progress(part),
        )  # fmt: skip
        biased = any(self.tables[n] is not None for n in part)
        self._launch(name, programs, arguments, self.small, biased)

    def over_positions(self, tensors: tuple[Any, ...], positions: Tensor, part: range) -> None:
        """Launch the kernel of a few queries for some of the scales."""
        h, w, _ = self.scales[-1]
        ring = self.keys[-1].shape[2] // w if self.own else h
        arguments = (
            *tensors,
            tensors[-1] if self.sums is None else self.sums,
            positions,
            *self._slots(part),
            self.heads, self.group, self.width // 8, self.tokens, *self.grid, ring, self.scale,
            *self._progress(part),
        )  # fmt: skip
        self._launch("decode_kernel", self.planes * self.tokens, arguments)

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
        programs = self.planes // self.group * tiles
        key, value, table, *sides = self._scale(n)
        arguments = (
            *inputs, *key, *value, table, *sums, *tokens_of(grads[0]), *tokens_of(grads[1]),
            self.heads // self.group, self.group, self.width // 8, *self.grid, *sides, across,
            tiles, *_shares(programs, self.q.device), self.scale, *self._rules(n),
        )  # fmt: skip
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
        radius = min(kernel // 2, MOST_SIDE)  # covers every grid
        size = 0 if table is None else table.shape[-1]
        place = self.q if table is None else table
        return tokens_of(self.keys[n]), tokens_of(self.values[n]), place, h, w, radius, size

    def _slots(self, part: range) -> list[Any]:
        # The last slot is always used; the empty ones come first.
        arguments: list[Any] = []
        for n in [part[-1]] * (_SCALES - len(part)) + list(part):
            key, value, *rest = self._scale(n)
            arguments += [*key, *value, *rest]
        return arguments

    def _progress(self, part: range) -> tuple[int, ...]:
        """First slot in use, rules, whether scales came before and whether none comes after."""
        last = int(part[-1] == len(self.keys) - 1)
        rules = (self.own and last, self.raster, self.include_self, self.shift)
        return (_SCALES - len(part), *rules, int(part[0] > 0), last)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; the interpreter pretends to have a few."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shares(programs: int, device: torch.device) -> tuple[int, int]:
    """Among how many multiprocessors neighbouring programs are shared out, and each one's share."""
    processors = _processors(device)
    return processors, programs // processors


def _cells(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """The number of squares of ``side`` that cover a grid, and how many lie side by side."""
    across = triton.cdiv(grid[1], side)
    return triton.cdiv(grid[0], side) * across, across


def vectors(t: Tensor) -> Tensor:
    """``t`` where the kernels can read eight channels at a time, else a copy, padded with zeros."""
    *strides, step = t.stride()
    aligned = all(size % 8 == 0 for size in (*strides, t.shape[3])) and t.data_ptr() % 16 == 0
    near = t.shape[2] * strides[2] < 2**35  # 32 bits count the vectors of a head
    if aligned and near and step == 1:
        return t
    copy = t.new_zeros((*t.shape[:3], t.shape[3] + -t.shape[3] % 8))
    copy[..., : t.shape[3]] = t
    return copy


def aligned(t: Tensor) -> Tensor:
    """``t`` where the kernels can read it from its beginning on, else a copy."""
    if t.is_contiguous() and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def room_for(result: Tensor) -> Tensor:
    """Where the kernels can write ``result``: itself, or a padded tensor; see `finished`."""
    if result.shape[3] % 8 == 0:
        return result
    return result.new_empty((*result.shape[:3], result.shape[3] + -result.shape[3] % 8))


def finished(result: Tensor, written: Tensor) -> Tensor:
    """``result`` with what the kernels have ``written``."""
    return result if written is result else result.copy_(written[..., : result.shape[3]])


def tokens_of(t: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor and its strides in vectors of eight channels."""
    return t, t.stride(0) // 8, t.stride(1) // 8, t.stride(2) // 8
