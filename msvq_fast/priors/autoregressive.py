"""The autoregressive prior (Eq. 9), dense or windowed, and its exact wavefront decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msvq_fast.ops.checks import accumulation_dtype, check_choice
from msvq_fast.priors.prior import Prior, PriorOutput
from msvq_fast.priors.sampling import check_sampling, draw_codes, uniforms
from msvq_fast.priors.transformer import Memory, ScaleTransformer

_TILE = 16  # slots of a windowed model that share matrix products while drawing


class AutoregressivePrior(Prior):
    """``p(s_m) = Π_i p(s_m,i | s_m,j<i, s_n<m)`` with one transformer per scale (Eq. 9).

    Example:
        >>> prior = AutoregressivePrior(PriorConfig(grids=((4, 4), (8, 8)), num_codes=512))
        >>> codes = prior.draw_scale(0, [], batch=2, seed=0)
    """

    order = "raster"

    def logits(self, codes: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
        """Logits ``(B, N_m, K)`` per scale of codes ``(B, h_m, w_m)``, all cells at once."""
        self.check_codes(codes, labels)
        result = []
        for m, grid in enumerate(codes):
            model = self.scale_model(m)
            memory = model.context(codes[:m], labels)
            result.append(model(model.embed(grid.flatten(1), labels), memory))
        return result

    def forward(self, codes: Sequence[Tensor], labels: Tensor | None = None) -> PriorOutput:
        """Cross-entropy of every code of grids ``(B, h_m, w_m)`` int64, coarse to fine."""
        losses = [
            F.cross_entropy(
                logits.flatten(0, 1).to(accumulation_dtype(logits.dtype)), grid.flatten()
            )
            for logits, grid in zip(self.logits(codes, labels), codes, strict=True)
        ]
        nll = torch.stack(losses)
        return PriorOutput(loss=nll.sum(), nll=nll.detach())

    @torch.no_grad()
    def draw_scale(
        self,
        scale: int,
        coarser: Sequence[Tensor],
        *,
        batch: int,
        seed: int,
        first: int | Tensor = 0,
        labels: Tensor | None = None,
        fixed: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        decoding: str = "wavefront",
    ) -> Tensor:
        """Draw the codes of one scale.

        Args:
            scale: Which.
            coarser: Codes ``(B, h_n, w_n)`` of every coarser scale.
            batch: B.
            seed: With the number of the image, the scale and the cell it decides every draw.
            first: Number of the first image of the batch, or the numbers of all ``(B,)``.
            labels: ``(B,)`` int64.
            fixed: ``(B, h, w)`` int64, codes to keep where not negative (inpainting).
            temperature: As in `draw_codes`.
            top_k: As in `draw_codes`.
            top_p: As in `draw_codes`.
            decoding: ``"wavefront"`` draws all cells together that cannot see each other, for
                windowed attention; ``"sequential"`` one by one, with the same result bit for bit.
                Dense attention is sequential either way.

        Returns:
            ``(B, h, w)`` int64.
        """
        check_sampling(temperature, top_k, top_p)
        check_choice("decoding", decoding, ("wavefront", "sequential"))
        self.check_draw(scale, coarser, batch, labels, fixed)
        model = self.scale_model(scale)
        decoder = _Decoder(model, model.context(coarser, labels), batch, labels)
        images = self.image_numbers(first, batch)
        kept = None if fixed is None else F.pad(fixed.flatten(1), (0, 1), value=-1)
        for cells in fronts(model, decoding == "wavefront").to(images.device):
            drawn = draw_codes(
                decoder.step(cells),
                uniforms(seed, scale, images[:, None], cells),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            if kept is not None:
                drawn = torch.where(kept[:, cells] < 0, drawn, kept[:, cells])
            decoder.codes[:, cells] = drawn
        h, w = model.grids[-1]
        return decoder.codes[:, : h * w].unflatten(1, (h, w)).contiguous()


def fronts(model: ScaleTransformer, wavefront: bool) -> Tensor:
    """Cells drawn in every step ``(steps, slots)``, ``h * w`` where a slot is idle.

    With windows of radius r, cell ``(y, x)`` reads keys up to ``(y - 1, x + r)`` and codes before
    them, so cells with the same ``x + r y`` can be drawn together: ``w + (h - 1) r`` steps. Slots
    come in tiles, which share matrix products, and row y has place ``y % tile`` in both orders; the
    sequential one has a single tile. So a token meets products of the same shape, in the same row
    of them: its bits do not depend on the order, nor its cost on the size of a large grid.
    """
    height, width = model.grids[-1]
    cells = height * width
    if model.kernels is None:
        return torch.arange(cells)[:, None]
    stride, tile = model.kernels[-1] // 2, tile_size(model)
    slots = -(-_together(model) // tile) * tile if wavefront else tile
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    step = x + stride * y if wavefront else x + width * y
    table = torch.full((int(step.max()) + 1, slots), cells)
    table[step, (y % slots).expand_as(step)] = x + width * y
    return table


def tile_size(model: ScaleTransformer) -> int:
    """Slots of a tile of `fronts`."""
    return min(_together(model), _TILE)


def _together(model: ScaleTransformer) -> int:
    """Most cells that can be drawn together."""
    height, width = model.grids[-1]
    return 1 if model.kernels is None else min(-(-width // (model.kernels[-1] // 2)), height)


class _Reach(NamedTuple):
    """Keys that a cell sees: places ``(cells + 1, P)`` in the memory and whether they exist."""

    places: Tensor
    exists: Tensor


class _Decoder:
    """Keys and values of all cells drawn so far, after those of the coarser scales.

    Attributes:
        codes: ``(B, N + 1)``, the codes drawn so far; the last column belongs to idle slots.
        memory: Per block keys and values ``(B, heads, S, d)``.
    """

    def __init__(
        self, model: ScaleTransformer, context: Memory, batch: int, labels: Tensor | None
    ) -> None:
        self.model = model
        self.tile = tile_size(model)
        self.labels = labels
        weight = model.head.weight
        tokens, heads = model.tokens, model.each_block()[0].heads
        # The projection of nothing has the dtype that autocast gives to keys.
        like = model.each_block()[0].to_key_value(weight.new_empty(0, weight.shape[1]))
        own = like.new_zeros(batch, heads, tokens + 1, weight.shape[1] // heads)
        self.memory = [
            (torch.cat([*keys, own], 2), torch.cat([*values, own], 2)) for keys, values in context
        ]
        self.before = self.memory[0][0].shape[2] - tokens - 1
        self.codes = torch.full((batch, tokens + 1), model.num_codes, device=weight.device)
        self.reach = None if model.kernels is None else _reach(model, weight.device)

    def step(self, cells: Tensor) -> Tensor:
        """Logits ``(B, F, K)`` of ``cells (F,)``; what they may see has been drawn."""
        tiles: Sequence[Tensor] = self._embed(cells).split(self.tile, 1)
        for block, (keys, values) in zip(self.model.each_block(), self.memory, strict=True):
            projected = zip(*(block.project(x) for x in tiles), strict=True)
            query, key, value = (torch.cat(parts, 2) for parts in projected)
            # All cells of the front are written before any of them is read.
            keys[:, :, self.before + cells] = key
            values[:, :, self.before + cells] = value
            attended = self._attend(query, keys, values, cells).split(self.tile, 2)
            tiles = [block.finish(x, a) for x, a in zip(tiles, attended, strict=True)]
        return torch.cat([self.model.head(self.model.norm(x)) for x in tiles], 1)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> Tensor:
        if self.reach is None:  # one cell, which sees all before it
            seen = torch.arange(keys.shape[2], device=keys.device) <= self.before + cells
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[None])
        places, exists = self.reach.places[cells], self.reach.exists[cells]  # (F, P)
        scores = (query[..., None, :] * keys[:, :, places]).sum(-1) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~exists, -torch.inf).softmax(-1)  # (B, heads, F, P)
        return (weights[..., None] * values[:, :, places]).sum(-2)

    def _embed(self, cells: Tensor) -> Tensor:
        model, width = self.model, self.model.grids[-1][1]
        assert model.above is not None
        idle = cells == model.tokens
        first = cells == 0 if model.kernels is None else cells % width == 0
        nothing = self.codes.new_full((), model.num_codes)
        before = torch.where(idle | first, nothing, self.codes[:, (cells - 1).clamp_min(0)])
        above = torch.where(
            idle | (cells < width), nothing, self.codes[:, (cells - width).clamp_min(0)]
        )
        x = model.codes[-1](before) + model.above(above)
        return model.place(x, cells.clamp_max(model.tokens - 1), self.labels)


def _reach(model: ScaleTransformer, device: torch.device) -> _Reach:
    """The windows of `local_attention` as places in a decoder's memory."""
    assert model.kernels is not None
    height, width = model.grids[-1]
    cell = torch.arange(height * width)
    y, x = cell // width, cell % width
    places, exists, before = [], [], 0
    for (h, w), kernel in zip(model.grids, model.kernels, strict=True):
        offset = torch.arange(kernel) - kernel // 2
        rows = ((2 * y + 1) * h // (2 * height))[:, None] + offset  # (N, k)
        columns = ((2 * x + 1) * w // (2 * width))[:, None] + offset
        inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None]
        index = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None]
        places.append(before + index.flatten(1))
        exists.append(inside.flatten(1))
        before += h * w
    own = model.kernels[-1] ** 2 // 2 + 1  # the rows above, the cells to the left, itself
    places[-1], exists[-1] = places[-1][:, :own], exists[-1][:, :own]
    idle = torch.full((1, sum(p.shape[1] for p in places)), before)
    return _Reach(
        torch.cat([torch.cat(places, 1), idle]).to(device),
        torch.cat([torch.cat(exists, 1), torch.ones_like(idle, dtype=torch.bool)]).to(device),
    )
