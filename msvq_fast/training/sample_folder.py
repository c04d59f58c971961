"""Drawn images in files of their own, which ``msvq evaluate --samples`` compares as a set."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from msvq_fast.data import write_whole
from msvq_fast.ops import InputError
from msvq_fast.training.progress import only_writer
from msvq_fast.training.results import check_writable, write_json

SETTINGS_FILE = "samples.json"


@contextlib.contextmanager
def open_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[SampleFolder]:
    """`SampleFolder`, made if missing, for this process alone.

    Raises:
        InputError: If it cannot be written, another process draws into it, or it holds anything
            but images of these settings.
    """
    check_writable(folder)
    with only_writer(folder, "folder"):
        yield SampleFolder(folder, settings)


class SampleFolder:
    """A folder of drawn images; a drawing that was stopped goes on with what is missing.

    Args:
        folder: It exists and can be written.
        settings: What decides every image; written beside them.

    Raises:
        InputError: If it holds anything but images of these settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))  # as they are read back
        path = folder / SETTINGS_FILE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if before.get(name) != settings[name]]
        except FileNotFoundError:
            if any(not file.name.startswith(".") for file in folder.iterdir()):
                raise InputError(
                    f"folder={str(folder)!r} holds files of something else; expected an empty one"
                ) from None
            write_json(path, settings)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is not what msvq sample writes: {error}") from None
        else:
            if changed and any(folder.glob("*.png")):
                raise InputError(
                    f"folder={str(folder)!r} holds images of another {', '.join(changed)}; "
                    "expected an empty one"
                )
            write_json(path, settings)

    def has(self, name: str) -> bool:
        """Whether the image of this name is written."""
        return self._file(name).is_file()

    def write(self, name: str, image: Tensor) -> None:
        """Write a uint8 image ``(3, H, W)`` as a PNG file, whole or not at all."""
        encoded = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(encoded, format="PNG")
        write_whole(self._file(name), encoded.getvalue())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.png"
