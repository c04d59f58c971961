"""Images of Hugging Face datasets: the encoded bytes of their rows."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msvq_fast.data.images import StoredImage
from msvq_fast.ops.checks import InputError

_VAL_SPLITS = ("validation", "val", "test")


@dataclass(frozen=True, slots=True)
class RowImage(StoredImage):
    """A row of a split of a dataset, ``hf:NAME/SPLIT``; the member is the row's number.

    Its class is the name in the dataset's one column of type ClassLabel.

    Attributes:
        dataset: the split, with the image column alone, which is not decoded.
        column: its name.
    """

    dataset: Any
    column: str

    def read(self) -> bytes:
        """From the memory-mapped table, or the file that the row names."""
        cell = self.dataset[int(self.member)][self.column] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if cell.get("path") is None:
            raise OSError("the row has no image")
        path = Path(cell["path"])
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise OSError("not a regular file")
        return path.read_bytes()


def list_rows(place: str, split: str) -> tuple[dict[str, RowImage], bool]:
    """The images of ``hf:place``, place being ``NAME[@CONFIG][:SPLIT]``, in the dataset's order.

    Without ``SPLIT`` the dataset's own ``train`` and the first it has of ``validation``, ``val``
    and ``test`` are the splits.

    Returns:
        ``{name: image}`` with names ``SPLIT/ROW``, and whether they are those of ``split`` alone.

    Raises:
        InputError: no library, dataset or split of that name, or not exactly one image column.
    """
    name, _, only = place.rpartition(":")
    if not name or re.fullmatch(r"\w[\w.-]*", only) is None:
        name, only = place, ""
    parts = _load(name)
    if only:
        if only not in parts:
            known = ", ".join(repr(f"hf:{name}:{part}") for part in parts)
            raise InputError(f"data 'hf:{place}': the dataset has no such split; expected {known}")
        parts = {only: parts[only]}
    val = next((part for part in _VAL_SPLITS if part in parts), None)
    settled = split != "all" and "train" in parts and val is not None
    if settled:
        own = val if split == "val" else "train"
        parts = {part: rows for part, rows in parts.items() if part == own}
    images = {}
    for part, rows in parts.items():
        dataset, column = _images_of(rows, name)
        container = Path(f"hf:{name}/{part}")
        described = zip(_sizes(dataset, column), _labels(rows), strict=True)
        for row, (size, label) in enumerate(described):
            member = f"{row:08d}"
            images[f"{part}/{member}"] = RowImage(container, member, size, label, dataset, column)
    if not images:
        raise InputError(f"data 'hf:{place}' has no image: it has no rows")
    return images, settled


def _load(name: str) -> dict[str, Any]:
    """The splits of a dataset by name, of the hub or in a folder."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"data 'hf:{name}' needs datasets, which is not installed: pip install 'msvq-fast[hf]'"
        ) from None
    base, at, config = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():
        base, config = name, ""
    folder = Path(base).expanduser()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        source = str(folder if folder.is_dir() else base)
        if saved and not config:
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, config or None)
    except Exception as error:  # of any kind: network, names, formats
        told: list[BaseException] = [error]
        if type(error) is datasets.exceptions.DatasetGenerationError and error.__cause__:
            told.append(error.__cause__)  # it says no more itself than that there is one
        reason = " ".join(": ".join(map(str, told)).split())
        hint = f"; choose one by hf:{name}@CONFIG" if "Config name is missing" in reason else ""
        raise InputError(f"data 'hf:{name}' cannot be loaded: {reason}{hint}") from error
    if isinstance(loaded, datasets.Dataset):
        return {str(loaded.split or "all"): loaded}
    return dict(loaded)


def _images_of(dataset: Any, name: str) -> tuple[Any, str]:
    """The dataset with nothing but its image column, undecoded, and the column's name."""
    feature = importlib.import_module("datasets").Image
    found = [column for column, kind in dataset.features.items() if isinstance(kind, feature)]
    if len(found) != 1:
        columns = ", ".join(dataset.features)
        raise InputError(
            f"data 'hf:{name}' has {len(found)} image columns; expected one among {columns}"
        )
    column = found[0]
    return dataset.select_columns([column]).cast_column(column, feature(decode=False)), column


def _sizes(dataset: Any, column: str) -> list[int | None]:
    """Sizes of the images, from the table's offsets: no image is read."""
    length = importlib.import_module("pyarrow.compute").binary_length
    chunks = dataset.data.column(column).chunks
    return [size for chunk in chunks for size in length(chunk.field("bytes")).to_pylist()]


def _labels(dataset: Any) -> list[str | None]:
    """Names of the rows' classes; None everywhere unless one column has them."""
    feature = importlib.import_module("datasets").ClassLabel
    found = [column for column, kind in dataset.features.items() if isinstance(kind, feature)]
    if len(found) != 1:
        return [None] * len(dataset)
    names = dataset.features[found[0]].names
    numbers = dataset.data.column(found[0]).to_pylist()  # at once: the dataset goes row by row
    # A negative number is how datasets say that a row has no class.
    return [None if n is None or n < 0 else names[n] for n in numbers]
