"""Where images come from: a folder or the built-in photographs, read as 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from msvq_fast.ops.checks import InputError, check_choice

EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Only decoders of these formats run, whatever a file's content claims to be.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_BUILTIN = {"photos": Path(__file__).parent / "photos"}
_SPLITS = ("train", "val", "all")
_VAL_SHARE = 0.1
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
    """A file that cannot be read as an image; the message names the file and the reason."""


def list_images(uri: str | os.PathLike[str], *, split: str) -> list[Path]:
    """The image files of one split, in a fixed order.

    Args:
        uri: a folder, searched recursively (hidden files are left out), or ``"builtin:photos"``.
        split: ``"train"``, ``"val"`` or ``"all"``. A folder with ``train/`` and ``val/`` inside
            is split by them. Any other folder is split file by file: about a tenth, at least one,
            is ``val``, chosen by a hash of the path relative to the folder. A file keeps its
            split when the folder moves and, but for very small folders, when others are added.

    Returns:
        Paths sorted by their path relative to the folder; never empty.

    Raises:
        InputError: unknown URI, missing or empty folder, or a single image to be split.
    """
    check_choice("split", split, _SPLITS)
    root = _resolve_folder(os.fspath(uri))
    if split != "all" and (root / "train").is_dir() and (root / "val").is_dir():
        return [root / split / name for name in _walk(root / split)]
    names = _walk(root)
    if split != "all":
        names = _hash_split(root, names, split)
    return [root / name for name in names]


def read_image(path: str | os.PathLike[str], *, min_side: int | None = None) -> Tensor:
    """Decode an image file to 8-bit RGB.

    EXIF orientation is applied, greyscale and palettes become RGB, transparency is composited on
    white, 16-bit greyscale is scaled to 8 bits, CMYK is converted. Colour profiles are ignored;
    of an animation the first frame is taken.

    Args:
        path: the file.
        min_side: a JPEG may be decoded at a half, a quarter or an eighth of its size (much
            quicker) as long as no side falls below this. None decodes at full size.

    Returns:
        uint8 ``(3, H, W)``, values 0..255.

    Raises:
        ImageReadError: the file is missing, truncated, corrupt, no image, too large (Pillow's
            limit), or has pixels of unknown range (floating point, 32-bit integers).
    """
    if min_side is not None and min_side < 1:
        raise InputError(f"min_side={min_side}; expected at least 1")
    return torch.from_numpy(decode(path, min_side=min_side).transpose(2, 0, 1).copy())


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


def decode(path: str | os.PathLike[str], *, min_side: int | None = None) -> NDArray[np.uint8]:
    """``read_image`` as an array ``(H, W, 3)``, as Pillow holds it.

    Loader threads use numpy only: with torch each of them would start an OpenMP pool of its own.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            rgb = _upright(image, _to_rgb(image))
        return np.asarray(rgb)
    except UnidentifiedImageError:
        empty = Path(path).stat().st_size == 0
        reason = "the file is empty" if empty else "not an image of a known format"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # decoders meet corrupt bytes with exceptions of any kind
        reason = str(error) or type(error).__name__
    reason = " ".join(reason.split())
    raise ImageReadError(f"cannot read image {os.fspath(path)!r}: {reason}")


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


def _resolve_folder(uri: str) -> Path:
    scheme, _, name = uri.partition(":")
    if scheme == "builtin":
        if name not in _BUILTIN:
            known = ", ".join(f"'builtin:{known}'" for known in _BUILTIN)
            raise InputError(f"data {uri!r} is not built in; expected {known}")
        return _BUILTIN[name]
    folder = Path(uri).expanduser()
    if folder.is_dir():
        return folder
    # One letter before the colon is a Windows drive.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", uri) and not folder.exists():
        raise InputError(f"data {uri!r} is not supported; expected a folder or 'builtin:photos'")
    if folder.exists():
        raise InputError(f"data {uri!r} is not a folder; give the folder that holds the images")
    raise InputError(f"data folder {uri!r} does not exist")


def _walk(root: Path) -> list[str]:
    """Names of the image files below ``root``, relative to it, with ``/``, sorted."""

    def fail(error: OSError) -> None:
        raise InputError(f"cannot list folder {str(error.filename)!r}: {error.strerror}") from error

    names = []
    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, or a second link to the same folder
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        names += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not names:
        raise InputError(f"folder {str(root)!r} has no image; looked for {' '.join(EXTENSIONS)}")
    return sorted(names)


def _hash_split(root: Path, names: list[str], split: str) -> list[str]:
    if len(names) == 1:
        raise InputError(
            f"folder {str(root)!r} has a single image and cannot be split into train and val; "
            "add images, or make subfolders 'train' and 'val'"
        )
    place = {name: _hash_fraction(name) for name in names}
    ranked = sorted(names, key=place.__getitem__)
    in_val = sum(fraction < _VAL_SHARE for fraction in place.values())
    in_val = min(max(in_val, 1), len(names) - 1)
    chosen = set(ranked[:in_val] if split == "val" else ranked[in_val:])
    return [name for name in names if name in chosen]


def _hash_fraction(name: str) -> float:
    """Uniform in [0, 1); the same for composed and decomposed accents (macOS renames them)."""
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _sixteen_to_eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integer pixels have no known range; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken metadata does not make the pixels unreadable
        return rgb
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
