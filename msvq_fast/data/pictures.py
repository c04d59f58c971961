"""Pictures to look at: labelled grids written as PNG, token maps, and 8-bit conversions."""

from __future__ import annotations

import functools
import io
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msvq_fast.ops.checks import InputError

_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_LINE_SPACING = 1.25


def to_uint8(x: Tensor) -> Tensor:
    """Map float values in [-1, 1] to uint8 0..255, rounded to nearest; outside is clipped.

    The inverse of ``to_float``. NaN becomes 0. Any shape, on any device.
    """
    return _quantized((x.detach().float() + 1) * 127.5)


def signed_to_uint8(contribution: Tensor, gain: float = 1.0) -> Tensor:
    """Map signed values, 0 to mid-grey 128, to uint8: ``127.5 + 127.5 * gain * contribution``.

    For the contributions of the finer scales, which add detail of either sign. ``gain`` above 1
    shows faint detail; what leaves 0..255 is clipped. NaN becomes 0.
    """
    return _quantized(contribution.detach().float() * (127.5 * gain) + 127.5)


def code_map(codes: Tensor, num_codes: int) -> Tensor:
    """Colour every code: int64 ``(h, w)`` in 0..num_codes - 1 to uint8 ``(3, h, w)``.

    A code has the same colour in every picture with the same ``num_codes``. Neighbouring indices
    get clearly different colours (the order of a codebook means nothing), all of similar
    strength, so that no code dominates the picture.
    """
    if codes.dim() != 2 or codes.dtype != torch.int64:
        raise InputError(
            f"codes has shape {tuple(codes.shape)} and dtype {codes.dtype}; expected int64 (h, w)"
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
        raise InputError(
            f"codes lie in {int(codes.min())}..{int(codes.max())}; expected 0..{num_codes - 1}"
        )
    return _palette(num_codes)[codes.cpu()].permute(2, 0, 1).contiguous()


def save_png(
    path: str | os.PathLike[str],
    rows: Sequence[Sequence[Tensor | None]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Write a labelled grid of pictures.

    All cells have the size of the largest picture; a smaller one (a token map) is enlarged with
    sharp pixel edges to fill its cell. Labels may hold line breaks and are wrapped to their
    space; columns are as wide as the longest word above them. The file appears complete or not
    at all.

    Args:
        path: the PNG file; folders above it are made.
        rows: pictures, uint8 ``(3, h, w)``, on any device; None leaves a cell empty, and rows
            may differ in length.
        row_labels: one per row, to its left.
        column_labels: one per column, above it.
        title: above everything.

    Raises:
        InputError: no picture, a picture of another shape or dtype, another number of
            labels than of rows or columns, or a path that cannot be written.
    """
    _check_grid(rows, row_labels, column_labels)
    canvas = _draw_grid(rows, row_labels or [], column_labels or [], title or "")
    encoded = io.BytesIO()
    canvas.save(encoded, format="PNG")
    write_whole(Path(path), encoded.getvalue())


class _Text(NamedTuple):
    """A label broken into lines, in one font."""

    lines: list[str]
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    line_height: int

    @property
    def width(self) -> int:
        return max((round(self.font.getlength(line)) for line in self.lines), default=0)

    @property
    def height(self) -> int:
        return self.line_height * len(self.lines)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, anchor: str) -> None:
        """Draw with the lines' middles from ``y`` down; ``anchor`` is l, m or r of ``x``."""
        for number, line in enumerate(self.lines):
            middle = y + (number + 0.5) * self.line_height
            draw.text((x, middle), line, fill=_INK, font=self.font, anchor=f"{anchor}m")


def _draw_grid(
    rows: Sequence[Sequence[Tensor | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
) -> Image.Image:
    pictures = [picture for row in rows for picture in row if picture is not None]
    cell_h = max(picture.shape[1] for picture in pictures)
    cell_w = max(picture.shape[2] for picture in pictures)
    columns = max(len(row) for row in rows)
    font_size = min(max(13, cell_w // 14), 40)
    gap = max(4, cell_w // 48)
    margin = 2 * gap + 8

    at_left = [_text(label, font_size, max(cell_w // 2, 8 * font_size)) for label in row_labels]
    column_w = max(cell_w, _longest_word(column_labels, font_size) + gap if column_labels else 0)
    above = [_text(label, font_size, column_w) for label in column_labels]
    left = margin + max((text.width + 2 * gap for text in at_left), default=0)
    title_size = font_size + font_size // 3
    inside = left - margin + columns * (column_w + gap) - gap
    inside = max(inside, _longest_word([title], title_size))
    width = inside + 2 * margin
    heading = _text(title, title_size, inside)
    label_bottom = margin + (heading.height + 2 * gap if title else 0)
    label_bottom += max((text.height for text in above), default=0)
    top = label_bottom + (gap if above else 0)
    row_heights = [max(cell_h, text.height) for text in at_left] or [cell_h] * len(rows)
    height = top + sum(row_heights) + gap * (len(rows) - 1) + margin

    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    heading.draw(draw, margin, margin, "l")
    for column, text in enumerate(above):
        center = left + column * (column_w + gap) + column_w / 2
        text.draw(draw, center, label_bottom - text.height, "m")
    y = top
    for index, row in enumerate(rows):
        row_height = row_heights[index]
        if at_left:
            text = at_left[index]
            text.draw(draw, left - 2 * gap, y + (row_height - text.height) / 2, "r")
        for column, picture in enumerate(row):
            if picture is not None:
                image = _enlarged(picture, cell_h, cell_w)
                x = left + column * (column_w + gap) + (column_w - image.width) // 2
                canvas.paste(image, (x, y + (row_height - image.height) // 2))
        y += row_height + gap
    return canvas


def _enlarged(picture: Tensor, cell_h: int, cell_w: int) -> Image.Image:
    image = Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
    scale = min(cell_h / image.height, cell_w / image.width)
    if scale <= 1:
        return image
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST)


def _text(label: str, font_size: int, width: int) -> _Text:
    """Break ``label`` at its line breaks, and where a line is wider than ``width``.

    There at spaces, and within words that are wider themselves, such as long file names.
    """
    font = ImageFont.load_default(size=font_size)
    lines: list[str] = []
    for paragraph in label.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".lstrip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            while font.getlength(longer) > width and len(longer) > 1:
                # From the front: from the back a long word takes the cube of its length.
                lengths = range(2, len(longer) + 1)
                cut = next(n for n in lengths if font.getlength(longer[:n]) > width) - 1
                lines.append(longer[:cut])
                longer = longer[cut:]
            line = longer
        lines.append(line)
    return _Text(lines, font, round(font_size * _LINE_SPACING))


def _longest_word(labels: Sequence[str], font_size: int) -> int:
    """Width in pixels."""
    font = ImageFont.load_default(size=font_size)
    words = (font.getlength(word) for label in labels for word in label.split())
    return math.ceil(max(words, default=0))


@functools.lru_cache(maxsize=16)
def _palette(num_codes: int) -> Tensor:
    """uint8 ``(K, 3)``: OKLCH colours, hues a golden angle apart on seven lightness steps."""
    index = np.arange(num_codes)
    hue = index * (np.pi * (3 - np.sqrt(5)))
    lightness = 0.42 + 0.08 * (index * 3 % 7)
    chroma = 0.11
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # OKLab to linear sRGB (B. Ottosson, 2020), then the sRGB transfer curve.
    lms: NDArray[np.float64] = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (to_rgb @ lms**3).clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return torch.from_numpy((255 * curved.T + 0.5).astype(np.uint8))


def _quantized(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)


def _check_grid(
    rows: Sequence[Sequence[Tensor | None]],
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
) -> None:
    pictures = [picture for row in rows for picture in row if picture is not None]
    if not pictures:
        raise InputError("rows holds no picture; expected at least one")
    for picture in pictures:
        if picture.dim() != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8:
            raise InputError(
                f"a picture in rows has shape {tuple(picture.shape)} and dtype {picture.dtype}; "
                "expected uint8 (3, h, w)"
            )
    columns = max(len(row) for row in rows)
    if row_labels is not None and len(row_labels) != len(rows):
        raise InputError(f"row_labels has {len(row_labels)} labels for {len(rows)} rows")
    if column_labels is not None and len(column_labels) != columns:
        raise InputError(f"column_labels has {len(column_labels)} labels for {columns} columns")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; folders above it are made.

    Raises:
        InputError: If it cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
