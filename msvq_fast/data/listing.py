"""Which images a data URI names, in a fixed order and in fixed splits."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from msvq_fast.data.hub import list_rows
from msvq_fast.data.images import EXTENSIONS, ImagePath, StoredImage
from msvq_fast.data.shards import PART_NAMES, list_members
from msvq_fast.ops.checks import InputError, check_choice

_BUILTIN = {"photos": Path(__file__).parent / "photos"}
_SPLITS = ("train", "val", "all")
_VAL_SHARE = 0.1


def list_images(uri: str | os.PathLike[str], *, split: str) -> list[ImagePath]:
    """The images of one split, in a fixed order.

    Args:
        uri: a folder, searched recursively (hidden files are left out), ``"builtin:photos"``,
            ``"wds:SHARDS"`` or ``"hf:NAME[@CONFIG][:SPLIT]"``. SHARDS are local, uncompressed tar
            files of the WebDataset layout, with wildcards and braces (``shard-{000..009}.tar``).
            NAME is a dataset on the Hugging Face hub or a folder of one (extra ``hf``), CONFIG one
            of its configurations, where it has several.
        split: ``"train"``, ``"val"`` or ``"all"``. A folder with ``train/`` and ``val/`` (or
            ``validation/``, or ``test/``) inside is split by them, shards by such words of their
            paths, a dataset into its ``train`` and ``validation`` (or ``val``, or ``test``). Of a
            folder with images in such folders but ``train/`` alone, the first is ``val``. All else
            is split image by image: about a tenth, at least one, is ``val``, chosen by a hash of
            the name: the path relative to the folder, shards being folders of their members, or
            SPLIT and number of the row. An image keeps its split when the folder moves and, but for
            very few images, when others are added.

    Returns:
        Paths, or stored images, which every function here takes as well; sorted by name, rows of
        a dataset in its order; never empty.

    Raises:
        InputError: unknown URI, missing or empty folder, a shard or dataset that cannot be read,
            a single image to be split, or a folder to train on with images in ``val/`` alone.
    """
    return list(list_named_images(uri, split=split).values())


def list_labelled_images(uri: str | os.PathLike[str], *, split: str) -> list[tuple[ImagePath, str]]:
    """The images of `list_images`, each with its class.

    The class of a file is the first folder on its way from ``uri``, the second where the first are
    ``train/`` and ``val/``, or one of such names is all there is; of a member of a shard the text
    of the member ``.cls`` beside it, else the first folder of its name; of a row of a dataset the
    name in its one column of type ClassLabel.

    Raises:
        InputError: as `list_images`, and for an image without a class.
    """
    images = list_named_images(uri, split=split)
    files = not any(isinstance(image, StoredImage) for image in images.values())
    depth = _part_depth(os.fspath(uri), split, list(images)) if files else 0
    found = []
    for name, image in images.items():
        folders = name.split("/")[depth:-1]
        label = image.label if isinstance(image, StoredImage) else folders[0] if folders else None
        if not label:
            raise InputError(
                f"data {os.fspath(uri)!r} has no class for {name!r}; expected a folder for each "
                "class, .cls files in shards, or one ClassLabel column in a dataset"
            )
        found.append((image, label))
    return found


def list_named_images(uri: str | os.PathLike[str], *, split: str) -> dict[str, ImagePath]:
    """The images of `list_images` by their names there, which do not depend on where they lie."""
    check_choice("split", split, _SPLITS)
    uri = os.fspath(uri)
    scheme, _, place = uri.partition(":")
    images: Mapping[str, ImagePath]
    if scheme == "wds":
        images, settled = list_members(place, split)
    elif scheme == "hf":
        images, settled = list_rows(place, split)
    else:
        return _list_files(uri, split)
    if split == "all" or settled:
        return dict(images)
    return {name: images[name] for name in _hash_split(uri, list(images), split)}


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
        raise InputError(
            f"data {uri!r} is not supported; expected a folder, 'builtin:photos', 'wds:SHARDS' or "
            "'hf:NAME'"
        )
    if folder.exists():
        raise InputError(f"data {uri!r} is not a folder; give the folder that holds the images")
    raise InputError(f"data folder {uri!r} does not exist")


def _list_files(uri: str, split: str) -> dict[str, ImagePath]:
    """The image files of one split by their names."""
    root = _resolve_folder(uri)
    parts = _part_folders(root) if split != "all" else {}
    root = parts.get(split, root)
    names = _walk(root)
    if split != "all" and not parts:
        folders = _first_folders(names)
        held_out = [name for name, part in PART_NAMES.items() if part == "val" and name in folders]
        if len(held_out) < len(folders):
            names = _hash_split(uri, names, split)
        elif split == "val":
            root = root / held_out[0]
            names = _walk(root)
        else:  # train/ was moved or is not mounted
            raise InputError(
                f"data {uri!r} has images in {'/ and '.join(held_out)}/ alone, held out; expected "
                f"train/ beside, or {str(root / held_out[0])!r} as data, a tenth of which is val "
                "then"
            )
    return {name: root / name for name in names}


def _part_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits ``train`` and ``val``, where ``root`` has both."""
    found: dict[str, Path] = {}
    for name, part in PART_NAMES.items():
        folder = root / name
        if part in found or not folder.is_dir():
            continue
        # Many a set has no images in its test/, or only their list.
        if name != "test" or _walk(folder, needed=False):
            found[part] = folder
    return found if len(found) == 2 else {}


def _first_folders(names: list[str]) -> set[str]:
    """The first folders of all ``names``, empty for a name without one."""
    return {name.rpartition("/")[0].partition("/")[0] for name in names}


def _part_depth(uri: str, split: str, names: list[str]) -> int:
    """How many of the first folders in ``names``, those of ``split``, are not of a class."""
    root = _resolve_folder(uri)
    if _part_folders(root):  # names of one split are those below its folder
        return int(split == "all")
    parts = {PART_NAMES.get(f) for f in _first_folders(names if split == "all" else _walk(root))}
    return int(None not in parts and not (split == "val" and parts == {"val"}))


def _walk(root: Path, *, needed: bool = True) -> list[str]:
    """Names of the image files below ``root``, relative to it, with ``/``, sorted.

    Raises:
        InputError: If the folder cannot be read, or has no image although one is ``needed``.
    """

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
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        names += [
            prefix + name
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if needed and not names:
        raise InputError(f"folder {str(root)!r} has no image; looked for {' '.join(EXTENSIONS)}")
    return sorted(names)


def _hash_split(uri: str, names: list[str], split: str) -> list[str]:
    if len(names) == 1:
        raise InputError(
            f"data {uri!r} has a single image and cannot be split into train and val; add images, "
            "or make parts 'train' and 'val'"
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
