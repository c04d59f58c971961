"""Charts as pictures, for grids of `save_png`: curves on logarithmic axes, and histograms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msvq_fast.ops.checks import InputError

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = (
    *((0, 0, 0), (0, 114, 178), (213, 94, 0), (0, 158, 115)),
    *((204, 121, 167), (230, 159, 0), (86, 180, 233)),
)
_INK, _GRID = (32, 33, 36), (222, 224, 227)
_OVERSAMPLING = 2  # drawn larger and shrunk: Pillow's lines have no antialiasing
_TICKS = 5
_DECADES = 12  # labels of a logarithmic axis that do not touch


def curve_chart(
    curves: Mapping[str, Tensor],
    *,
    x: Tensor,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (420, 640),
) -> Tensor:
    """Curves over a common axis, both axes logarithmic.

    Args:
        curves: Label of each curve and its values ``(n,)``; those not positive and finite are left
            out.
        x: ``(n,)`` positive places, ascending.
        x_label: Below the axis.
        y_label: Above the axis.
        size: Height and width in pixels.

    Returns:
        uint8 ``(3, height, width)``.

    Raises:
        InputError: If there is nothing positive to draw, or lengths differ.
    """
    points = {name: _positive(name, x, values) for name, values in curves.items()}
    places = [p for pairs in points.values() for p in pairs]
    if not places:
        raise InputError("curves holds no positive value; expected at least one")
    ranges = [_with_margin([place[axis] for place in places]) for axis in (0, 1)]
    frame = _Frame(size, *ranges)
    frame.axis_lines(x_label, y_label)
    for (name, pairs), colour in zip(points.items(), itertools.cycle(COLOURS), strict=False):
        frame.curve(pairs, colour)
        frame.legend(name, colour)
    return frame.picture()


def histogram(counts: Tensor, *, label: str, size: tuple[int, int] = (300, 420)) -> Tensor:
    """How often each code is drawn, most frequent first, beside an even use of all codes.

    Args:
        counts: ``(K,)`` integers.
        label: Written into the chart, lines separated by line breaks.
        size: Height and width in pixels.

    Returns:
        uint8 ``(3, height, width)``.

    Raises:
        InputError: If nothing was counted.
    """
    if counts.dim() != 1 or not int(counts.sum()):
        raise InputError("counts holds nothing; expected (K,) with at least one code drawn")
    shares = (counts.double() / counts.sum()).sort(descending=True).values.tolist()
    top = max(shares)
    frame = _Frame(size, (0, len(shares)), (0, 1.3 * top), linear=True)  # the legend is above
    frame.axis_lines("codes, most frequent first", "share of all draws")
    for place, share in enumerate(shares):
        frame.bar(place, share, COLOURS[1])
    frame.curve([(0, 1 / len(shares)), (len(shares), 1 / len(shares))], COLOURS[2])
    frame.legend(f"even use, 1/{len(shares)}", COLOURS[2])
    for line in label.splitlines():
        frame.legend(line, None)
    return frame.picture()


class _Range(NamedTuple):
    low: float
    high: float


class _Frame:
    """A chart in the making; places are in the units of its axes (logarithms where those are)."""

    def __init__(
        self,
        size: tuple[int, int],
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        linear: bool = False,
    ) -> None:
        self.height, self.width = (side * _OVERSAMPLING for side in size)
        self.x, self.y, self.linear = _Range(*x), _Range(*y), linear
        self.font_size = 13 * _OVERSAMPLING
        self.font = ImageFont.load_default(size=self.font_size)
        self.image = Image.new("RGB", (self.width, self.height), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)
        self.left, self.bottom = round(4.6 * self.font_size), self.height - 3 * self.font_size
        self.top, self.right = 2 * self.font_size, self.width - self.font_size
        self.entries = 0

    def axis_lines(self, x_label: str, y_label: str) -> None:
        for value, text in self._ticks(self.x):
            place = self._place(value, self.y.low)[0]
            self.draw.line([(place, self.top), (place, self.bottom)], _GRID, _OVERSAMPLING)
            self._text(place, self.bottom + 0.8 * self.font_size, text, "mm")
        for value, text in self._ticks(self.y):
            place = self._place(self.x.low, value)[1]
            self.draw.line([(self.left, place), (self.right, place)], _GRID, _OVERSAMPLING)
            self._text(self.left - 0.5 * self.font_size, place, text, "rm")
        box = [(self.left, self.top), (self.right, self.bottom)]
        self.draw.rectangle(box, outline=_INK, width=_OVERSAMPLING)
        middle = (self.left + self.right) / 2
        self._text(middle, self.height - 0.9 * self.font_size, x_label, "mm")
        self._text(0.5 * self.font_size, self.font_size, y_label, "lm")

    def curve(self, pairs: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        places = [self._place(*pair) for pair in pairs]
        if len(places) == 1:
            ((x, y),) = places
            r = 2 * _OVERSAMPLING
            self.draw.ellipse([(x - r, y - r), (x + r, y + r)], fill=colour)
        self.draw.line(places, colour, 2 * _OVERSAMPLING, joint="curve")

    def bar(self, place: int, height: float, colour: tuple[int, int, int]) -> None:
        left, top = self._place(place, height)
        right, bottom = self._place(place + 1, self.y.low)
        if bottom > top:
            self.draw.rectangle([(left, top), (max(right - 1, left), bottom)], fill=colour)

    def legend(self, text: str, colour: tuple[int, int, int] | None) -> None:
        y = self.top + (1.2 + 1.4 * self.entries) * self.font_size
        x = self.right - 0.8 * self.font_size
        length = self.font.getlength(text)
        self._text(x, y, text, "rm")
        if colour is not None:
            end = x - length - 0.6 * self.font_size
            start = end - 1.6 * self.font_size
            self.draw.line([(start, y), (end, y)], colour, 2 * _OVERSAMPLING)
        self.entries += 1

    def picture(self) -> Tensor:
        size = (self.width // _OVERSAMPLING, self.height // _OVERSAMPLING)
        small = self.image.resize(size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def _ticks(self, axis: _Range) -> list[tuple[float, str]]:
        if self.linear:
            return [(value, f"{value:.4g}") for value in _round_values(*axis)]
        decades = range(math.ceil(axis.low - 1e-9), math.floor(axis.high + 1e-9) + 1)
        if len(decades) > 1:
            every = math.ceil(len(decades) / _DECADES)
            return [(float(d), f"{10.0**d:g}") for d in decades if d % every == 0]
        values = _round_values(10.0**axis.low, 10.0**axis.high)
        return [(math.log10(value), f"{value:.4g}") for value in values]

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.draw.text((x, y), text, fill=_INK, font=self.font, anchor=anchor)


def _positive(name: str, x: Tensor, values: Tensor) -> list[tuple[float, float]]:
    if values.shape != x.shape:
        raise InputError(f"curve {name!r} has {len(values)} values for {len(x)} places")
    pairs = zip(x.tolist(), values.tolist(), strict=True)
    return [(math.log10(a), math.log10(b)) for a, b in pairs if a > 0 and 0 < b < math.inf]


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.04 * max(high - low, 0.1)
    return low - margin, high + margin


def _round_values(low: float, high: float) -> list[float]:
    """Up to about `_TICKS` multiples of 1, 2 or 5 times a power of ten, ascending."""
    step = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]
