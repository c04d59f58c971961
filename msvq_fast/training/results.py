"""What an evaluation found: figures per scale, their files and their table."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from msvq_fast.data import ImagePath, write_whole
from msvq_fast.ops.checks import InputError

RESULTS_FILE, PER_IMAGE_FILE = "results.json", "per_image.csv"
_FILE_WIDTH = 160  # of a table in a file or a pipe
_WIDEST = 1000  # more columns than any table takes


@dataclass(frozen=True)
class Quality:
    """How close one reconstruction is to the images, which lie in [0, 1].

    Attributes:
        scale: Last scale that the reconstruction uses.
        mse: Mean squared error over all images.
        psnr: dB of that mean error, as torchmetrics reports a set.
        psnr_8bit: The same with the reconstruction truncated to 8 bits, as if saved to a file.
        ssim: Mean structural similarity.
        target_mse: Mean squared error against this scale's own blurred target (Eq. 7).
        lpips: Mean LPIPS, None without its weights.
    """

    scale: int
    mse: float
    psnr: float
    psnr_8bit: float
    ssim: float
    target_mse: float
    lpips: float | None = None


@dataclass(frozen=True)
class CodebookHealth:
    """How much of a scale's codebook all images together use.

    Attributes:
        scale: The scale.
        grid: Height and width of its code grid for one image.
        usage: Percent of codes drawn at least once.
        perplexity: exp of the entropy of all codes drawn.
    """

    scale: int
    grid: tuple[int, int]
    usage: float
    perplexity: float


@dataclass(frozen=True)
class ImageQuality:
    """What `Quality` says of a set, of one image; MSE and PSNR of the float reconstruction."""

    image: str
    scale: int
    mse: float
    psnr: float
    ssim: float
    target_mse: float
    lpips: float | None = None


@dataclass(frozen=True)
class SetQuality:
    """How close a set of 8-bit images is to the originals, in the features of a network.

    Attributes:
        suffix: Behind FD, KID and IS in their names; empty for the FID Inception alone.
        extractor: The network.
        sha256: Of its weights.
        dim: Width of its features.
        images: Images of the set, and as many or more originals.
        originals: Images that they are compared with.
        fd: Fréchet distance; None below ``2 dim`` images, where it is mostly bias.
        kid: Unbiased kernel distance; no image is compared with its own reconstruction.
        inception_score: Mean and spread over ten parts of the set (fewer below ten images), which
            a hash of the images' names chooses.
        inception_score_originals: The same of the originals.
    """

    suffix: str
    extractor: str
    sha256: str
    dim: int
    images: int
    originals: int
    fd: float | None
    kid: float
    inception_score: tuple[float, float]
    inception_score_originals: tuple[float, float]

    @property
    def fd_name(self) -> str:
        """``FID`` for the network that defines it, else ``FD-`` and the network."""
        return f"FD{self.suffix}" if self.suffix else "FID"

    def describe(self) -> str:
        """One line: every figure with its name, the number of images, network and weights."""
        need = 2 * self.dim
        fd = f"not given below {need} images (force_fd)" if self.fd is None else f"{self.fd:.3f}"
        mean, spread = self.inception_score
        return (
            f"{self.fd_name} {fd}, KID{self.suffix} {1e3 * self.kid:.3f}e-3, IS{self.suffix} "
            f"{mean:.3f} ± {spread:.3f} (originals {self.inception_score_originals[0]:.3f}); "
            f"{self.images} images, {self.originals} originals, {self.extractor}, "
            f"{self.dim} features, weights sha256 {self.sha256[:16]}"
        )


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that `evaluate` measured, and how.

    Attributes:
        model: ``MSVQVAE`` or ``VQVAE2``.
        model_config: The model's configuration.
        parameters: Trainable parameters; the codebooks are moving averages and not among them.
        images: Images (tiles) that were judged.
        reconstructions: One per partial sum x̂_m of MS-VQVAE, coarse to fine; one of VQ-VAE 2.
        codebooks: One per scale, coarse to fine.
        usage: Mean of the scales' usage in percent.
        perplexity: Mean of the scales' perplexity.
        seconds: Wall time.
        settings: What decides the figures beside the model, and where they were measured.
        per_image: One row per image and reconstruction, by file, tile and scale.
        reconstructed_set: The full reconstructions as a set, None without an extractor.
    """

    model: str
    model_config: dict[str, Any]
    parameters: int
    images: int
    reconstructions: tuple[Quality, ...]
    codebooks: tuple[CodebookHealth, ...]
    usage: float
    perplexity: float
    seconds: float
    settings: dict[str, Any]
    per_image: tuple[ImageQuality, ...] = field(repr=False)
    reconstructed_set: SetQuality | None = None

    @property
    def final(self) -> Quality:
        """Quality of the full reconstruction."""
        return self.reconstructions[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without ``per_image``; an infinite PSNR becomes None."""
        values = dataclasses.asdict(dataclasses.replace(self, per_image=()))
        del values["per_image"]
        return without_infinities(values)


def write_results(result: EvaluationResult, out_dir: str | os.PathLike[str]) -> None:
    """Write ``results.json`` and ``per_image.csv`` into a folder, each whole or not at all.

    Raises:
        InputError: If the folder cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(f.name for f in dataclasses.fields(ImageQuality))
    writer.writerows(dataclasses.astuple(row) for row in result.per_image)
    # A file name that is no UTF-8 keeps its odd bytes as \\udcXX, as JSON and messages show them.
    text = table.getvalue().encode(errors="backslashreplace").decode()
    folder = Path(out_dir)
    write_text(folder / PER_IMAGE_FILE, text)
    write_json(folder / RESULTS_FILE, result.to_dict(), indent=2)


def table_console(file: IO[str] | None = None) -> Console:
    """A console for tables: off a terminal COLUMNS says nothing."""
    console = Console(file=file, highlight=False)
    if not console.file.isatty():  # what rich calls a terminal is a pipe too under FORCE_COLOR
        console.width = _FILE_WIDTH
    return console


def print_whole(console: Console, table: Table) -> None:
    """Print a table with no figure cut.

    Rules are left out where they have no room; what is still too wide is for the terminal to wrap.
    """

    def width() -> int:
        return Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum

    if width() > console.width:
        table.box = None
    console.width = max(console.width, width())
    console.print(table)


def print_table(result: EvaluationResult, file: IO[str] | None = None) -> None:
    """Print the figures per scale: a table on a terminal, plain aligned text elsewhere."""
    console = table_console(file)
    table = Table(header_style="bold", box=HEAVY_HEAD if console.is_terminal else None)
    table.add_column("scale", justify="right")
    judged = result.final.lpips is not None
    quality_names = ["MSE e-3", "PSNR dB", "SSIM", *["LPIPS"] * judged, "MSE e-3\nto target"]
    for name in ("codes", *quality_names, "usage %"):
        table.add_column(name, justify="right")
    table.add_column("perplexity", justify="right")
    quality = {q.scale: q for q in result.reconstructions}
    for book in result.codebooks:
        cells = ["-"] * len(quality_names)
        if book.scale in quality:
            q = quality[book.scale]
            cells = [f"{1e3 * q.mse:.3f}", f"{q.psnr:.2f}", f"{q.ssim:.4f}"]
            cells += [f"{q.lpips:.4f}"] if q.lpips is not None else []
            cells += [f"{1e3 * q.target_mse:.3f}"]
        grid = f"{book.grid[0]}x{book.grid[1]}"
        health = [f"{book.usage:.1f}", f"{book.perplexity:.1f}"]
        table.add_row(str(book.scale), grid, *cells, *health)
    table.add_section()
    mean = [f"{result.usage:.1f}", f"{result.perplexity:.1f}"]
    table.add_row("mean", "", *[""] * len(quality_names), *mean)
    console.print(
        f"{result.model}, {result.parameters:,} parameters, {result.images} images in [0, 1], "
        f"{result.seconds:.1f} s",
        soft_wrap=True,
    )
    print_whole(console, table)
    if result.reconstructed_set is not None:
        console.print(f"r{result.reconstructed_set.describe()}", soft_wrap=True)


def check_writable(folder: Path) -> None:
    """Raise `InputError` now rather than after the work if the folder cannot take files."""
    probe = folder / f".{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError):  # what is there, or above it, is a file
        raise InputError(f"cannot write into {str(folder)!r}: not a folder") from None
    except OSError as error:
        raise InputError(f"cannot write into {str(folder)!r}: {error.strerror or error}") from None


def check_picture(out: str, sources: Iterable[ImagePath]) -> Path:
    """The path ``out`` if it can be that of a PNG file; nothing is made.

    Args:
        out: The option of that name.
        sources: Images that are read, or others beside them, which a picture must not replace.

    Raises:
        InputError: If it is a folder or one of ``sources``, or has another ending.
    """
    path = Path(out)
    if path.is_dir():
        raise InputError(f"out={out!r} is a folder; give the name of a PNG file")
    if path.suffix.lower() != ".png":  # a photograph's, or that of the settings beside it
        raise InputError(f"out={out!r}; expected a name that ends with .png, which is written")
    if path.exists():
        files = (source for source in sources if isinstance(source, Path) and source.exists())
        if any(path.samefile(file) for file in files):
            raise InputError(f"out={out!r} is an image that is read; choose another name")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file ``path`` in an `OSError` of what writes it, such as a full disk's."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` in UTF-8."""
    write_whole(path, text.encode())


def write_json(path: Path, values: Any, *, indent: int = 1) -> None:
    """`write_whole` as JSON."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


def without_infinities(value: Any) -> Any:
    """Plain values with None for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
