"""Images read as 8-bit RGB, from files or from where else their bytes are."""

from __future__ import annotations

import abc
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from msvq_fast.ops.checks import InputError, check_at_least

EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Only decoders of these formats run, whatever a file's content claims to be.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_PIXELS = 2**28

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageReadError(InputError):
    """A file that cannot be read as an image; the message names the file and the reason.

    Attributes:
        may_pass: whether that is not the content's fault but the disk's or memory's.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class StoredImage(abc.ABC):
    """An encoded image inside something larger, such as a tar file; taken wherever a path is.

    Attributes:
        container: what holds it.
        member: its name in there, with ``/``.
        size: in bytes; None where that is not known.
        label: its class, where the container says so.
    """

    container: Path
    member: str
    size: int | None
    label: str | None

    @abc.abstractmethod
    def read(self) -> bytes:
        """The image's bytes; any thread may call it. Raises OSError."""

    @property
    def path(self) -> Path:
        """Where the image would lie if its container were a folder."""
        return self.container / self.member

    @property
    def stem(self) -> str:
        """The member's last part without extension."""
        return self.path.stem

    def __str__(self) -> str:
        return str(self.path)


ImagePath: TypeAlias = Path | StoredImage


def read_image(
    path: str | os.PathLike[str] | StoredImage, *, min_side: int | None = None
) -> Tensor:
    """Decode an image file to 8-bit RGB.

    EXIF orientation is applied, greyscale and palettes become RGB, transparency is composited on
    white, 16-bit greyscale is scaled to 8 bits, CMYK is converted. Colour profiles are ignored;
    of an animation the first frame is taken.

    Args:
        path: the file or stored image.
        min_side: a JPEG may be decoded at a half, a quarter or an eighth of its size (much
            quicker) as long as no side falls below this. None decodes at full size.

    Returns:
        uint8 ``(3, H, W)``, values 0..255.

    Raises:
        ImageReadError: the file is missing, truncated, corrupt, no image, too large (Pillow's
            limit), or has pixels of unknown range (floating point, 32-bit integers).
    """
    if min_side is not None:
        check_at_least(1, min_side=min_side)
    return torch.from_numpy(decode(path, min_side=min_side).transpose(2, 0, 1).copy())


def read_centre(path: str | os.PathLike[str] | StoredImage, height: int, width: int) -> Tensor:
    """The centre of an image resized to the longer of the two: uint8 ``(3, height, width)``."""
    image = read_image(path)
    try:
        image = resize_short_side(image, max(height, width))
    except ImageReadError as error:
        raise ImageReadError(f"cannot use image {str(path)!r}: {error}") from None
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize uint8 ``(3, H, W)`` with an antialiased Lanczos filter; its short side is ``size``.

    The aspect ratio is kept to the pixel. Deterministic. Returns ``image`` itself if it fits.
    """
    pixels: NDArray[np.uint8] = image.cpu().permute(1, 2, 0).numpy()
    resized = lanczos(pixels, size)
    if resized is pixels:
        return image
    return torch.from_numpy(resized.transpose(2, 0, 1).copy())


def to_float(image: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 in [-1, 1]: ``image / 127.5 - 1``, on the image's device."""
    if image.dtype != torch.uint8:
        raise InputError(f"image has dtype {image.dtype}; expected uint8")
    return image.to(torch.float32).div_(127.5).sub_(1)


def relative_names(paths: Sequence[str | os.PathLike[str] | StoredImage]) -> list[str]:
    """The paths below their common folder, with ``/``; stored images keep their container."""
    places, folders = [], set()
    for path in paths:
        if isinstance(path, StoredImage):
            places.append(path.path.absolute())
            folders.add(path.container.absolute().parent)
        else:
            places.append(Path(path).absolute())
            folders.add(places[-1].parent)
    common = os.path.commonpath(folders)
    return [place.relative_to(common).as_posix() for place in places]


def decode(
    path: str | os.PathLike[str] | StoredImage, *, min_side: int | None = None
) -> NDArray[np.uint8]:
    """``read_image`` as an array ``(H, W, 3)``, as Pillow holds it.

    Loader threads use numpy only: with torch each of them would start an OpenMP pool of its own.
    """
    may_pass = False
    try:
        if isinstance(path, StoredImage):
            source: io.BytesIO | str | os.PathLike[str] = io.BytesIO(path.read())
        else:
            source = path
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe waits for a writer
                raise OSError("not a regular file")
        with Image.open(source, formats=_FORMATS) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            return np.asarray(_upright(image, _to_rgb(image)))
    except UnidentifiedImageError:
        empty = (path.size if isinstance(path, StoredImage) else Path(path).stat().st_size) == 0
        reason = "the file is empty" if empty else "not an image of a known format"
    except OSError as error:
        reason = error.strerror or str(error)
        may_pass = error.errno is not None  # of the system: Pillow's own have no number
    except MemoryError:
        reason, may_pass = "out of memory", True
    except Exception as error:  # decoders meet corrupt bytes with exceptions of any kind
        reason = str(error) or type(error).__name__
    reason = " ".join(reason.split())
    place = str(path) if isinstance(path, StoredImage) else os.fspath(path)
    raise ImageReadError(f"cannot read image {place!r}: {reason}", may_pass=may_pass)


def lanczos(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """``resize_short_side`` on an ``(H, W, 3)`` array; returns ``pixels`` itself if it fits."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == size:
        return pixels
    new_height, new_width = (max(size, int(side * size / short + 0.5)) for side in (height, width))
    if new_height * new_width > _MAX_PIXELS:
        raise ImageReadError(
            f"an image of {width}x{height} pixels resized to short side {size} would have "
            f"{new_width}x{new_height} pixels; it is too narrow"
        )
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((new_width, new_height), Image.Resampling.LANCZOS))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _sixteen_to_eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integer pixels have no known range; save it with 8 or 16 bits")
    grey = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:  # the one value of a PNG that is transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken metadata does not make the pixels unreadable
        return rgb
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
