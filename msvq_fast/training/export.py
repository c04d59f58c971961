"""``msvq export``: encode and decode as ONNX or as saved graphs, compared before they are kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.torch_version import TorchVersion

import msvq_fast
from msvq_fast.data import list_images, read_centre, to_float
from msvq_fast.models import MSVQVAE, VQVAE2, from_pretrained, weights_digest
from msvq_fast.ops import InputError, nearest_code
from msvq_fast.ops.checks import WorkError
from msvq_fast.ops.vector_quantize import portable
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.inference import fitting_size, inference_mode
from msvq_fast.training.results import check_writable, writing
from msvq_fast.training.share_config import ExportConfig

EXPORT_FILE = "export.json"
_SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
# Convolutions of another runtime move a latent by this much of its length at most.
_LATENT_NOISE = 2.0**-13
_MOST_IMAGES = 4096  # of a batch; a bound that the exporter asks for

Run = Callable[[Sequence[Tensor]], list[Tensor]]


class ExportError(WorkError):
    """An exported graph does not do what the model does."""


class _Encode(nn.Module):
    def __init__(self, model: MSVQVAE | VQVAE2) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(images))


class _Decode(nn.Module):
    def __init__(self, model: MSVQVAE | VQVAE2) -> None:
        super().__init__()
        self.model = model

    def forward(self, *codes: Tensor) -> Tensor:
        return self.model.decode(codes)


def run_export(config: ExportConfig) -> None:
    """Write ``encode`` and ``decode`` of a model and ``export.json``, each whole or not at all.

    Graphs take any number of images. ``encode`` maps images ``(B, 3, size, size)`` float32 in
    [-1, 1] to M grids int64, coarse to fine; ``decode`` maps grids to images.

    Raises:
        InputError: For a bad checkpoint, size or folder, or if ONNX is not installed.
        ExportError: If a graph disagrees with the model; the folder is as it was.
        OSError: If a file cannot be written; the folder is as it was.
    """
    if config.format == "onnx":
        _need_onnx()
    folder = find_model(config.checkpoint)
    model = from_pretrained(folder, backend="reference").eval()
    size = fitting_size(config.size, model)
    out = Path(config.out)
    check_writable(out)
    temporary = Path(tempfile.mkdtemp(prefix=".export.", dir=out))
    try:
        with inference_mode(model):
            checks = _export(model, size, config.format, temporary)
        record = {
            "model": type(model).__name__,
            "config": dataclasses.asdict(model.config),
            "format": config.format,
            "size": size,
            "range": [-1, 1],
            "weights_sha256": weights_digest(folder),
            "versions": {"msvq_fast": msvq_fast.__version__, **_versions(config.format)},
            "compared": checks,
        }
        text = json.dumps(record, indent=1) + "\n"
        with writing(out / EXPORT_FILE):
            (temporary / EXPORT_FILE).write_text(text, encoding="utf-8")
        for path in sorted(temporary.iterdir()):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {_names(config.format)} and {EXPORT_FILE}")


def _export(
    model: MSVQVAE | VQVAE2, size: int, kind: str, folder: Path
) -> dict[str, dict[str, Any]]:
    """Write both graphs, run them on photographs in batches of one and of two, and compare."""
    images = _photographs(size)
    codes = model.encode(images)
    names = [f"codes_{m}" for m in range(model.num_scales)]
    batch = Dim("batch", min=1, max=_MOST_IMAGES)
    with _quiet():
        encode = torch.export.export(
            _Encode(model), (images,), dynamic_shapes=({0: batch},)
        ).run_decompositions(portable.decompositions())
        decode = torch.export.export(
            _Decode(model), tuple(codes), dynamic_shapes=(tuple({0: batch} for _ in codes),)
        )
        run_encode = _write(encode, folder / f"encode{_SUFFIX[kind]}", ["images"], names)
        run_decode = _write(decode, folder / f"decode{_SUFFIX[kind]}", names, ["images"])
    parts = [slice(0, 1), slice(1, len(images))]
    found = [run_encode([images[part]]) for part in parts]
    tokens = [torch.cat(grids) for grids in zip(*found, strict=True)]
    drawn = torch.cat([run_decode([grid[part] for grid in codes])[0] for part in parts])
    return {
        "encode": compare_codes(model, images, tokens),
        "decode": compare_images(model, codes, drawn),
    }


def compare_codes(
    model: MSVQVAE | VQVAE2, images: Tensor, found: Sequence[Tensor]
) -> dict[str, int]:
    """Hold the tokens of another runtime against the model's, print and return the counts.

    A token may differ where two codes are as near to the latent as the rounding of the convolutions
    can move it. Every scale is judged given the coarser tokens that were found.

    Args:
        model: In evaluation mode.
        images: ``(B, 3, H, W)``.
        found: M grids ``(B, h_m, w_m)`` int64.

    Raises:
        InputError: If they are no codes of the model.
        ExportError: If a token differs by more than rounding.
    """
    total = ties = 0
    for m, (z, grid) in enumerate(zip(model.latents(images, found), found, strict=True)):
        rows = z.movedim(1, -1).flatten(0, -2).double()  # (N, D)
        codebook = model.get_buffer(f"quantizers.{m}.codebook").double()
        ours, theirs = nearest_code(rows, codebook), grid.flatten()
        differ = ours != theirs
        rows, near, far = rows[differ], codebook[ours[differ]], codebook[theirs[differ]]
        gap = (rows - far).square().sum(1) - (rows - near).square().sum(1)
        room = 2 * _LATENT_NOISE * rows.norm(dim=1) * (far - near).norm(dim=1)
        if wrong := int((gap > room).sum()):
            raise ExportError(
                f"exported encode gives {wrong} of {grid.numel()} tokens of scale {m} that differ "
                "from PyTorch's; nothing was written"
            )
        total, ties = total + grid.numel(), ties + int(differ.sum())
    tail = f", {ties} within rounding of a tie" if ties else ""
    print(f"encode: {total - ties} of {total} tokens of {len(images)} images are PyTorch's{tail}")
    return {"images": len(images), "tokens": total, "within_rounding_of_a_tie": ties}


def compare_images(
    model: MSVQVAE | VQVAE2, codes: Sequence[Tensor], found: Tensor
) -> dict[str, float]:
    """Hold the images of another runtime against a float64 model; print and return the errors.

    Args:
        model: In evaluation mode, float32.
        codes: M grids ``(B, h_m, w_m)`` int64.
        found: ``(B, 3, H, W)``.

    Raises:
        ExportError: If their error is more than eight times that of PyTorch in float32.
    """
    exact = copy.deepcopy(model).double().decode(codes)
    if found.shape != exact.shape:
        raise ExportError(
            f"exported decode gives shape {tuple(found.shape)}; expected {tuple(exact.shape)}"
        )
    error = float((found - exact).abs().max())
    own = float((model.decode(codes) - exact).abs().max())
    rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
    if not error <= 8 * max(own, rounding):
        raise ExportError(
            f"exported decode is off by {error:.2g} where PyTorch in float32 is by {own:.2g}; "
            "nothing was written"
        )
    print(f"decode: off float64 by {error:.2g} at most, PyTorch in float32 by {own:.2g}")
    return {"largest_error": error, "largest_error_of_pytorch": own}


def _write(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str]) -> Run:
    """Save a graph and return what the file, read again, does to tensors."""
    final = path.parent.parent / path.name  # where it goes once it is compared
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names this machine's folders
    if path.suffix == ".pt2":
        content = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, content)
        with writing(final):
            path.write_bytes(content.getvalue())  # of its buffer an error would keep a view
        module = torch.export.load(path).module()

        def run_torch(arguments: Sequence[Tensor]) -> list[Tensor]:
            found = module(*arguments)
            return [found] if isinstance(found, Tensor) else list(found)

        return run_torch
    with writing(final):
        torch.onnx.export(
            program,
            f=path,
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run_onnx(arguments: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(inputs, arguments, strict=True)}
        return [torch.from_numpy(array) for array in session.run(outputs, feed)]

    return run_onnx


def _photographs(size: int) -> Tensor:
    """Built-in photographs ``(3, 3, size, size)`` in [-1, 1], cut from the centre."""
    paths = list_images("builtin:photos", split="val")
    return to_float(torch.stack([read_centre(path, size, size) for path in paths]))


def _need_onnx() -> None:
    if TorchVersion(torch.__version__) < "2.8":
        raise InputError(  # its exporter does not say that it exports, and cannot take our ops
            f"format=onnx needs PyTorch 2.8 or newer, it is {torch.__version__}; "
            "format=torch can do without"
        )
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(
                f"format=onnx needs {name}, which is not installed: pip install 'msvq-fast[export]'"
            ) from None


def _versions(kind: str) -> dict[str, str]:
    names = ("torch", "onnx", "onnxruntime") if kind == "onnx" else ("torch",)
    return {name: importlib.import_module(name).__version__ for name in names}


def _names(kind: str) -> str:
    return ", ".join(f"{name}{_SUFFIX[kind]}" for name in ("encode", "decode"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's remarks on its own deprecated parts and on torchvision from users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
