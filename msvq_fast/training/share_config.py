"""What shows a trained model or hands it to others is told. Free of torch, as config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ReconstructConfig:
    """What ``msvq reconstruct`` draws.

    Attributes:
        checkpoint: A run (its best checkpoint), a checkpoint, or a folder of a saved model.
        data: An image file, a folder of images, ``builtin:photos``, ``wds:SHARDS`` or
            ``hf:NAME[:SPLIT]``.
        split: Part of the data; a single file has no parts.
        out: The PNG file.
        size: Shorter side of the images in pixels, which are never enlarged; None is the model's
            resolution, but at least 256.
        limit: Most images, evenly spread over the split.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
    """

    checkpoint: str
    data: str = "builtin:photos"
    split: Literal["train", "val", "all"] = "val"
    out: str = "runs/reconstruct.png"
    size: int | None = None
    limit: int = 3
    device: str = "auto"


@dataclass
class ExportConfig:
    """What ``msvq export`` writes; every file is compared with PyTorch before it is put there.

    Attributes:
        checkpoint: A run (its best checkpoint), a checkpoint, or a folder of a saved model.
        out: Folder for encode, decode and export.json.
        format: onnx for ONNX Runtime and others; torch for ``torch.export.load``, which needs
            torch alone.
        size: Side of the square images in pixels; None is the model's resolution.
    """

    checkpoint: str
    out: str
    format: Literal["onnx", "torch"] = "onnx"
    size: int | None = None


@dataclass
class PushConfig:
    """What ``msvq push`` uploads: weights, configuration and a model card.

    Attributes:
        checkpoint: A run (its best checkpoint), a checkpoint, or a folder of a saved model.
        repo: Repository ``owner/name`` of the hub, made if missing.
        private: Of a repository that is made.
        results: results.json of an evaluation for the card's table; None takes
            evaluation/results.json inside ``checkpoint`` if it is of the same weights.
    """

    checkpoint: str
    repo: str
    private: bool = False
    results: str | None = None


@dataclass
class UiConfig:
    """What ``msvq ui`` serves, until Ctrl-C: a page for looking at images through a model.

    Attributes:
        checkpoint: A run (its best checkpoint), a checkpoint, or a folder of a saved model.
        prior: A prior over its codes, which draws details anew; null leaves that out.
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on.
        device: auto, cpu, cuda or cuda:N; auto is CUDA where there is a device.
    """

    checkpoint: str
    prior: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    device: str = "auto"
