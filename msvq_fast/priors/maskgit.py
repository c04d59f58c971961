"""The MaskGIT prior: masked codes drawn many at a time, most confident first (Fig. 3, right)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msvq_fast.ops.checks import InputError, accumulation_dtype, check_at_least, check_choice
from msvq_fast.priors.prior import Prior, PriorOutput
from msvq_fast.priors.sampling import check_sampling, draw_codes, gumbels, uniforms

SCHEDULES = ("cosine", "arccos")
_DRAW, _CHOOSE = 0, 1  # what a random number is for


class MaskGITPrior(Prior):
    """One bidirectional transformer per scale that fills in masked codes.

    Example:
        >>> config = PriorConfig(grids=((4, 4), (8, 8)), num_codes=512, kernels=(3, 5))
        >>> codes = MaskGITPrior(config).draw_scale(0, [], batch=2, seed=0)
    """

    order = "bidirectional"

    def forward(
        self,
        codes: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        schedule: str = "arccos",
        label_smoothing: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> PriorOutput:
        """Cross-entropy of randomly masked codes.

        Args:
            codes: Grids ``(B, h_m, w_m)`` int64, coarse to fine.
            labels: ``(B,)`` int64; ``num_classes`` is "no label", to be mixed in for guidance.
            schedule: Share that is masked, for u uniform in [0, 1): ``"cosine"`` is cos(πu/2),
                ``"arccos"`` is 2 arccos(u)/π. Always a whole number of cells, at least one.
            label_smoothing: Of the loss; ``nll`` is without.
            generator: Of the masks, on the codes' device.
        """
        self.check_codes(codes, labels)
        check_choice("schedule", schedule, SCHEDULES)
        losses, nll = [], []
        for m, grid in enumerate(codes):
            own = grid.flatten(1)
            masked = _random_mask(own, schedule, generator)
            logits = self._logits(
                m, codes[:m], own.masked_fill(masked, self.config.num_codes), labels
            )
            flat, target = logits.flatten(0, 1), own.flatten()
            flat = flat.to(accumulation_dtype(flat.dtype))
            # Means by weights and not by selection, whose size the host would have to wait for.
            weight = masked.to(flat.dtype) / masked.sum()
            each = F.cross_entropy(flat, target, reduction="none", label_smoothing=label_smoothing)
            losses.append((each * weight.flatten()).sum())
            with torch.no_grad():
                exact = F.cross_entropy(flat, target, reduction="none")
                nll.append((exact * weight.flatten()).sum())
        return PriorOutput(loss=torch.stack(losses).sum(), nll=torch.stack(nll))

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
        steps: int = 8,
        choice_temperature: float = 4.5,
        guidance: float = 0.0,
        order: str = "confidence",
    ) -> Tensor:
        """Draw the codes of one scale in ``steps`` passes.

        After pass t of T, ``⌊n cos(π t / 2T)⌋`` of the n unknown cells are still masked, at least
        one fewer than before; the least confident are, with Gumbel noise on the log-probabilities
        that falls linearly to nothing. Nothing waits for the device.

        Args:
            scale: Which.
            coarser: Codes ``(B, h_n, w_n)`` of every coarser scale.
            batch: B.
            seed: With the image's number, the scale, the cell and the pass it decides every draw.
            first: Number of the first image of the batch, or the numbers of all ``(B,)``.
            labels: ``(B,)`` int64.
            fixed: ``(B, h, w)`` int64, codes to keep where not negative (inpainting).
            temperature: As in `draw_codes`.
            top_k: As in `draw_codes`.
            top_p: As in `draw_codes`.
            steps: T.
            choice_temperature: Scale of the Gumbel noise in the first pass.
            guidance: w; logits are ``(1 + w t/T)`` times those with the label minus ``w t/T`` times
                those without.
            order: ``"confidence"``, or ``"halton"``: cells in a fixed low-discrepancy order.

        Returns:
            ``(B, h, w)`` int64.
        """
        check_sampling(temperature, top_k, top_p)
        check_choice("order", order, ("confidence", "halton"))
        check_at_least(1, steps=steps)
        for name, value in (("guidance", guidance), ("choice_temperature", choice_temperature)):
            if not math.isfinite(value):
                raise InputError(f"{name}={value}; expected a finite number")
        if guidance and labels is None:
            raise InputError(f"guidance={guidance} without labels; expected labels, or 0")
        self.check_draw(scale, coarser, batch, labels, fixed)
        model = self.scale_model(scale)
        device, cells, mask_code = model.head.weight.device, model.tokens, model.num_codes
        memory = model.context(coarser, labels)
        unguided = model.context(coarser) if guidance else memory
        images = self.image_numbers(first, batch)[:, None]
        place = torch.arange(cells, device=device)
        codes = torch.full((batch, cells), mask_code, device=device)
        if fixed is not None:
            codes = torch.where(fixed.flatten(1) < 0, codes, fixed.flatten(1))
        unknown = (codes == mask_code).sum(1)  # (B,)
        masked_count = unknown
        # Walked on the host, cell by cell.
        halton = halton_rank(model.grids[-1]).to(device) if order == "halton" else None
        for t in range(1, steps + 1):
            logits = model(model.embed(codes, labels), memory)
            if guidance:
                w = guidance * t / steps
                logits = (1 + w) * logits - w * model(model.embed(codes), unguided)
            uniform = uniforms(seed, scale, images, place, t, _DRAW)
            drawn = draw_codes(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
            known = codes != mask_code
            drawn = torch.where(known, codes, drawn)
            if halton is not None:
                score = -halton.double().expand(batch, cells)
            else:
                log_p = logits.double().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
                noise = gumbels(seed, scale, images, place, t, _CHOOSE)
                score = log_p + choice_temperature * (1 - t / steps) * noise
            score = score.masked_fill(known, torch.inf)
            share = math.cos(math.pi / 2 * t / steps) if t < steps else 0.0
            left = torch.minimum((unknown * share).long(), masked_count - 1).clamp_min(0)
            rank = score.argsort(dim=1, stable=True).argsort(dim=1)  # 0 is the least confident
            codes = drawn.masked_fill(rank < left[:, None], mask_code)
            masked_count = left
        return codes.unflatten(1, model.grids[-1])

    def _logits(
        self, scale: int, coarser: Sequence[Tensor], own: Tensor, labels: Tensor | None
    ) -> Tensor:
        model = self.scale_model(scale)
        return model(model.embed(own, labels), model.context(coarser, labels))


def halton_rank(grid: tuple[int, int]) -> Tensor:
    """When each cell ``(h * w,)`` comes in the order of the Halton sequence in bases 2 and 3.

    The sequence is walked until every cell has been met.
    """
    height, width = grid
    rank = torch.full((height * width,), -1)
    index = met = 0
    while met < height * width:
        index += 1
        cell = int(_radical_inverse(index, 2) * height) * width
        cell += int(_radical_inverse(index, 3) * width)
        if rank[cell] < 0:
            rank[cell] = met
            met += 1
    return rank


def _radical_inverse(index: int, base: int) -> float:
    value, digit = 0.0, 1.0 / base
    while index:
        index, remainder = divmod(index, base)
        value += remainder * digit
        digit /= base
    return value


def _random_mask(codes: Tensor, schedule: str, generator: torch.Generator | None) -> Tensor:
    """Bool ``(B, N)`` with an exact number of cells per row drawn from the schedule."""
    batch, cells = codes.shape
    # As torch.rand, which torch.compile does not trace with a generator for any batch.
    u = torch.zeros(batch, 1, device=codes.device).uniform_(generator=generator)
    share = torch.cos(math.pi / 2 * u) if schedule == "cosine" else torch.acos(u) * 2 / math.pi
    count = (share * cells).round().clamp_min(1)
    places = torch.zeros(batch, cells, device=codes.device).uniform_(generator=generator)
    return places.argsort(1).argsort(1) < count
