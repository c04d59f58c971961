"""The transformer of one scale's codes, given the codes of every coarser scale (§3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msvq_fast.nn.linear import Linear
from msvq_fast.ops import InputError, local_attention
from msvq_fast.ops.checks import check_at_least

Grid = tuple[int, int]
Memory = list[tuple[list[Tensor], list[Tensor]]]
"""Per block the keys and values ``(B, heads, N_n, d)`` of every coarser scale."""


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of a prior; depth, heads and width default to the paper's.

    Attributes:
        grids: ``(h, w)`` of every scale, coarse to fine.
        num_codes: K, codes of every scale.
        kernels: Windows in cells, odd, one per scale: a token of scale m > 0 sees
            ``kernels[n]`` x ``kernels[n]`` cells of every scale n <= m. None is dense attention,
            which scale 0 always has.
        num_classes: Class labels; 0 is none.
        depth: Blocks of each scale's transformer.
        heads: Attention heads.
        width: Channels of a token.
        dropout: Probability, after attention and after the perceptron, in training.
    """

    grids: tuple[Grid, ...]
    num_codes: int
    kernels: tuple[int, ...] | None = None
    num_classes: int = 0
    depth: int = 8
    heads: int = 8
    width: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values and turn lists read from JSON into tuples."""
        object.__setattr__(self, "grids", tuple((int(h), int(w)) for h, w in self.grids))
        if not self.grids or any(min(grid) < 1 for grid in self.grids):
            raise InputError(f"grids={self.grids}; expected one (h, w) of at least 1 per scale")
        for name in ("num_codes", "depth", "heads", "width", "num_classes"):
            if type(getattr(self, name)) is not int:
                raise InputError(f"{name}={getattr(self, name)!r}; expected an int")
        check_at_least(
            1, num_codes=self.num_codes, depth=self.depth, heads=self.heads, width=self.width
        )
        if self.width % self.heads:
            raise InputError(f"width={self.width}; expected a multiple of heads={self.heads}")
        check_at_least(0, num_classes=self.num_classes)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}; expected 0 <= dropout < 1")
        if self.kernels is not None:
            object.__setattr__(self, "kernels", tuple(self.kernels))
            if len(self.kernels) != len(self.grids) or any(
                isinstance(k, bool) or not isinstance(k, int) or k % 2 == 0 or k < (3 if n else 1)
                for n, k in enumerate(self.kernels)
            ):
                raise InputError(
                    f"kernels={self.kernels}; expected {len(self.grids)} odd windows, one per "
                    "scale, at least 3 after the first"
                )

    @property
    def num_scales(self) -> int:
        """M, the number of grids."""
        return len(self.grids)

    def scale_kernels(self, scale: int) -> tuple[int, ...] | None:
        """Windows of the transformer of ``scale``; None is dense."""
        return None if self.kernels is None or scale == 0 else self.kernels[: scale + 1]


class Block(nn.Module):
    """Attention and a perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_query = Linear(width, width)
        self.to_key_value = Linear(width, 2 * width)
        self.to_out = Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(B, heads, N, d)`` of tokens ``(B, N, width)``."""
        x = self.attention_norm(x)
        key, value = self.to_key_value(x).chunk(2, dim=-1)
        return self._split(self.to_query(x)), self._split(key), self._split(value)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention ``(B, heads, N, d)`` and the perceptron say to ``x``."""
        x = x + self.dropout(self.to_out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.perceptron(self.perceptron_norm(x)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ScaleTransformer(nn.Module):
    """Logits of one scale's codes.

    Coarser tokens pass through the same blocks. They see each other and never the own scale, so
    that their keys and values (`context`) are computed once per image, however often the own tokens
    change.

    Args:
        config: Sizes.
        scale: The scale m whose codes are modelled; scales below it are the context.
        order: ``"raster"``: a token sees itself and those before it, and its input says what was
            drawn before it; ``"bidirectional"``: it sees all, and some inputs are masked.
        backend: As in `msvq_fast.ops.local_attention`.
    """

    def __init__(
        self, config: PriorConfig, scale: int, *, order: str, backend: str | None = None
    ) -> None:
        super().__init__()
        width, codes = config.width, config.num_codes
        self.grids = config.grids[: scale + 1]
        self.kernels = config.scale_kernels(scale)
        self.num_codes = codes
        self.order = order
        self.backend = backend
        # Row K of the own table stands for "nothing yet": masked, or before the first token.
        self.codes = nn.ModuleList(
            nn.Embedding(codes + (n == scale), width) for n in range(scale + 1)
        )
        self.positions = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(h * w, width)) for h, w in self.grids
        )
        self.above = nn.Embedding(codes + 1, width) if order == "raster" else None
        # Row num_classes is "no label".
        self.labels = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, codes)
        self.apply(_initialise)

    @property
    def tokens(self) -> int:
        """Tokens of the own scale."""
        return self.grids[-1][0] * self.grids[-1][1]

    def context(self, codes: Sequence[Tensor], labels: Tensor | None = None) -> Memory:
        """Keys and values of the coarser scales in every block.

        Args:
            codes: One ``(B, h_n, w_n)`` int64 per coarser scale.
            labels: ``(B,)`` int64 or None, as in `embed`.
        """
        streams = [
            self._tokens(n, self.codes[n](grid.flatten(1)), labels) for n, grid in enumerate(codes)
        ]
        memory: Memory = []
        for block in self.each_block():
            queries, keys, values = [], [], []
            for x in streams:
                query, key, value = block.project(x)
                queries.append(query)
                keys.append(key)
                values.append(value)
            memory.append((keys, values))
            if len(memory) < len(self.blocks):  # nothing reads the tokens after the last block
                streams = [
                    block.finish(x, self._attend(queries[n], keys[: n + 1], values[: n + 1], n))
                    for n, x in enumerate(streams)
                ]
        return memory

    def embed(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Input tokens ``(B, N, width)`` of own codes ``(B, N)``, K where masked.

        With raster order the input at a cell is the code to its left and the one above it. In the
        first column a dense model takes the last code of the row above as the one before, a
        windowed one "nothing": it would otherwise wait for a whole row.
        """
        if self.above is None:
            return self._tokens(-1, self.codes[-1](codes), labels)
        width = self.grids[-1][1]
        before = F.pad(codes[:, :-1], (1, 0), value=self.num_codes)
        if self.kernels is not None:
            before = before.clone()
            before[:, ::width] = self.num_codes
        above = F.pad(codes, (width, 0), value=self.num_codes)[:, : codes.shape[1]]
        return self._tokens(-1, self.codes[-1](before) + self.above(above), labels)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Logits ``(B, N, K)`` of input tokens ``(B, N, width)`` from `embed`."""
        for block, (keys, values) in zip(self.each_block(), memory, strict=True):
            query, key, value = block.project(x)
            scale = len(self.grids) - 1
            attended = self._attend(query, [*keys, key], [*values, value], scale)
            x = block.finish(x, attended)
        return self.head(self.norm(x))

    def place(self, x: Tensor, cells: Tensor, labels: Tensor | None) -> Tensor:
        """Add positions ``cells (F,)`` of the own scale and the label to ``x (B, F, width)``."""
        return self._labelled(x + self.positions[-1][cells], labels)

    def _tokens(self, scale: int, x: Tensor, labels: Tensor | None) -> Tensor:
        return self._labelled(x + self.positions[scale], labels)

    def _labelled(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if self.labels is None:
            return x
        if labels is None:
            labels = torch.full((x.shape[0],), self.labels.num_embeddings - 1, device=x.device)
        return x + self.labels(labels)[:, None]

    def _attend(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: int
    ) -> Tensor:
        own = scale == len(self.grids) - 1
        raster = own and self.order == "raster"
        if self.kernels is not None:
            return local_attention(
                query,
                keys,
                values,
                grids=self.grids[: scale + 1],
                kernels=self.kernels[: scale + 1],
                order="raster" if raster else "bidirectional",
                # Fig. 3 (right) leaves out the masked token itself: 8 of 9, 24 of 25.
                include_self=raster or not own,
                backend=self.backend,
            )
        mask = None
        if raster:
            count, total = query.shape[2], sum(key.shape[2] for key in keys)
            mask = torch.ones(count, total, dtype=torch.bool, device=query.device)
            mask = mask.tril(total - count)
        return F.scaled_dot_product_attention(
            query, torch.cat(list(keys), 2), torch.cat(list(values), 2), attn_mask=mask
        )

    def each_block(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.blocks if isinstance(block, Block)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
