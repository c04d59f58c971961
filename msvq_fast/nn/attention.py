"""Cross-scale local attention with its projections and positions (§3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msvq_fast.nn.attention_cache import AttentionCache, ring_rows, write_ring
from msvq_fast.nn.linear import Linear
from msvq_fast.ops import InputError, local_attention, local_attention_at
from msvq_fast.ops.checks import accumulation_dtype
from msvq_fast.ops.local_attention.op import check_kernels, check_order

ROTARY_BASE = 100.0


class LocalAttention(nn.Module):
    """Multi-head attention of a grid of tokens to windows of itself and of coarser grids.

    One query, key, value and output projection serve all scales, so that a model has as many
    parameters as with full attention.

    Args:
        width: Channels of the tokens; a multiple of ``heads``.
        heads: Query heads.
        kernels: Per scale, coarse to fine, an odd window size, 0 (unused) or ``"full"``; the last
            is the own grid's.
        kv_heads: Key and value heads, a divisor of ``heads``; None takes ``heads``.
        order: ``"bidirectional"`` or ``"raster"``, of the own scale.
        include_self: Whether a token attends to itself.
        border: ``"clip"`` or ``"shift"``, as in `msvq_fast.ops.local_attention`.
        relative_bias: Whether each head learns a bias per window offset (zero at first; ``"full"``
            scales have none).
        rotary: Whether queries and keys are rotated by their 2-D position: half of a head's
            channels by the row, half by the column. A coarse cell sits at its centre in fine cells,
            so scales share one geometry. Needs a head width that is a multiple of 4.
        bias: Whether the projections have a bias.
        backend: As in `msvq_fast.ops.local_attention`. `step` takes ``"native"`` as None, since the
            C++ kernel takes whole grids.

    Raises:
        InputError: For widths or heads that do not divide, or windows that do not exist.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kernels: Sequence[int | str],
        *,
        kv_heads: int | None = None,
        order: str = "bidirectional",
        include_self: bool = False,
        border: str = "clip",
        relative_bias: bool = False,
        rotary: bool = False,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width % heads != 0:
            raise InputError(f"width={width} with heads={heads}; expected a multiple of heads")
        if kv_heads < 1 or heads % kv_heads != 0:
            raise InputError(f"kv_heads={kv_heads}; expected a divisor of heads={heads}")
        head_width = width // heads
        if rotary and head_width % 4 != 0:
            raise InputError(f"rotary with heads of width {head_width}; expected a multiple of 4")
        check_kernels(kernels)
        check_order(order, border)
        self.heads = heads
        self.kv_heads = kv_heads
        self.kernels = tuple(kernels)
        self.order = order
        self.include_self = include_self
        self.border = border
        self.rotary = rotary
        self.backend = backend
        self.to_query = Linear(width, width, bias=bias)
        self.to_key_value = Linear(width, 2 * kv_heads * head_width, bias=bias)
        self.to_out = Linear(width, width, bias=bias)
        self.relative_bias: nn.ParameterList | None = None
        if relative_bias:
            self.relative_bias = nn.ParameterList()
            for kernel in self.kernels:
                k = kernel if isinstance(kernel, int) else 0
                size = 2 * k - 1 if border == "shift" and k > 0 else k
                table = torch.zeros(heads, size, size)
                # One without values gets no gradient, which DistributedDataParallel waits for.
                self.relative_bias.append(nn.Parameter(table, requires_grad=size > 0))

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        """Attend from the last of ``tokens`` to all of them.

        Args:
            tokens: One ``(B, h * w, width)`` per scale, coarse to fine.
            grids: ``(h, w)`` of each.

        Returns:
            ``(B, h_m * w_m, width)`` for the last scale.
        """
        if len(tokens) != len(self.kernels) or len(grids) != len(self.kernels):
            raise InputError(
                f"tokens has {len(tokens)} and grids {len(grids)} entries; expected "
                f"{len(self.kernels)}, one per kernel"
            )
        query = self._split(self.to_query(tokens[-1]), self.heads)
        keys, values = [], []
        for x, grid in zip(tokens, grids, strict=True):
            key, value = self._key_value(x, grid, grids[-1])
            keys.append(key)
            values.append(value)
        if self.rotary:
            query = rotate(query, grids[-1], grids[-1])
        out = local_attention(
            query,
            keys,
            values,
            grids=grids,
            kernels=self.kernels,
            order=self.order,
            include_self=self.include_self,
            border=self.border,
            bias=self._bias(query.dtype),
            backend=self.backend,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def start(
        self,
        batch: int,
        grids: Sequence[tuple[int, int]],
        *,
        coarse: Sequence[Tensor] = (),
        skew: int | None = None,
    ) -> AttentionCache:
        """Begin to sample an image token by token: an empty cache, coarse scales projected once.

        Args:
            batch: Images.
            grids: ``(h, w)`` of every scale, the one to be sampled last.
            coarse: ``(B, h * w, width)`` of every scale but the last.
            skew: None if `step` is given the positions one after the other; else that of
                `msvq_fast.nn.fronts`, more than the radius of the own window, which keeps more
                rows.

        Raises:
            InputError: If the order is not raster, or the numbers of scales do not fit.
        """
        if self.order != "raster":
            raise InputError(f"start with order={self.order!r}; expected an attention in 'raster'")
        if len(grids) != len(self.kernels) or len(coarse) != len(self.kernels) - 1:
            raise InputError(
                f"coarse has {len(coarse)} and grids {len(grids)} entries; expected "
                f"{len(self.kernels) - 1} and {len(self.kernels)}"
            )
        own = self.kernels[-1]
        height, width = grids[-1]
        radius, reach = (own // 2,) * 2 if isinstance(own, int) else (height, width - 1)
        if skew is not None and skew <= reach:
            raise InputError(f"skew={skew}; expected more than the radius {reach}")
        pairs = [
            self._key_value(x, grid, grids[-1]) for x, grid in zip(coarse, grids[:-1], strict=True)
        ]
        weight = self.to_key_value.weight
        # The projection of nothing has the dtype that autocast gives to keys.
        like = self.to_key_value(weight.new_empty(0, weight.shape[1]))
        shape = (
            batch,
            self.kv_heads,
            ring_rows(grids[-1], radius, skew) * width,
            weight.shape[0] // (2 * self.kv_heads),
        )
        pairs.append((like.new_zeros(shape), like.new_zeros(shape)))
        angles = None
        if self.rotary:
            angles = rotary_angles(grids[-1], grids[-1], shape[-1] // 4, like)
        return AttentionCache(
            grids=tuple((h, w) for h, w in grids),
            keys=tuple(key for key, _ in pairs),
            values=tuple(value for _, value in pairs),
            angles=angles,
        )

    @torch.no_grad()
    def step(self, x: Tensor, positions: Tensor, cache: AttentionCache) -> Tensor:
        """`forward` for the tokens at ``positions`` alone, from and into ``cache``.

        Every earlier token that they see must have had its step. Shapes depend on F alone and
        nothing waits for the device.

        Args:
            x: ``(B, F, width)`` tokens of the last scale.
            positions: ``(F,)`` int64, their raster positions, the same for the whole batch.
            cache: From `start`; written in place.

        Returns:
            ``(B, F, width)``.
        """
        query = self._split(self.to_query(x), self.heads)
        key, value = (self._split(t, self.kv_heads) for t in self.to_key_value(x).chunk(2, dim=-1))
        if cache.angles is not None:
            angles = cache.angles[positions]
            query, key = turn(query, angles), turn(key, angles)
        ring = (cache.keys[-1], cache.values[-1])
        write_ring(ring, (key, value), positions % ring[0].shape[2])
        out = local_attention_at(
            query,
            cache.keys,
            cache.values,
            positions,
            grids=cache.grids,
            kernels=self.kernels,
            include_self=self.include_self,
            bias=self._bias(query.dtype),
            backend=None if self.backend == "native" else self.backend,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _key_value(
        self, x: Tensor, grid: tuple[int, int], fine: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        key, value = (self._split(t, self.kv_heads) for t in self.to_key_value(x).chunk(2, dim=-1))
        return rotate(key, grid, fine) if self.rotary else key, value

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """``(B, N, heads * d)`` as ``(B, heads, N, d)``, a view."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _bias(self, dtype: torch.dtype) -> list[Tensor | None] | None:
        if self.relative_bias is None:
            return None
        return [table.to(dtype) if table.numel() > 0 else None for table in self.relative_bias]


def rotate(x: Tensor, grid: tuple[int, int], fine: tuple[int, int]) -> Tensor:
    """Rotate channel pairs of ``x (B, heads, h * w, d)`` by angles that grow with the position.

    The cell ``(y, x)`` of ``grid`` sits at ``(y + ½) h_fine / h - ½`` and likewise in x, so the dot
    product of two rotated vectors depends only on their distance in cells of ``fine``. The first
    half of the channels turns with the row, the second with the column; the angle of pair i is
    ``position / 100^(i / pairs)``. Computed in float32 (float64 for float64), returned in the
    dtype of ``x``.
    """
    return turn(x, rotary_angles(grid, fine, x.shape[-1] // 4, x))


def rotary_angles(grid: tuple[int, int], fine: tuple[int, int], pairs: int, like: Tensor) -> Tensor:
    """The angles ``(h * w, 2 * pairs)`` of `rotate` for ``like``: rows first, then columns."""
    dtype, device = accumulation_dtype(like.dtype), like.device
    steps = torch.arange(pairs, dtype=dtype, device=device) / pairs
    frequency = ROTARY_BASE**-steps
    angles = []
    for axis in (0, 1):
        cells = torch.arange(grid[axis], dtype=dtype, device=device)
        position = (cells + 0.5) * (fine[axis] / grid[axis]) - 0.5
        angles.append(position[:, None] * frequency)  # (h or w, pairs)
    rows = angles[0][:, None].expand(grid[0], grid[1], pairs)
    columns = angles[1][None].expand(grid[0], grid[1], pairs)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs of ``x (B, heads, N, d)`` by ``angles (N, d / 2)``, in their dtype."""
    cos, sin = angles.cos(), angles.sin()
    even, odd = x.to(angles.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
