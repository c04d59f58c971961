"""How a trained model is run when its figures and pictures must be exact, and on which sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msvq_fast.models import MSVQVAE, VQVAE2, from_pretrained
from msvq_fast.ops import InputError


def load_model(folder: str | Path, device: torch.device) -> MSVQVAE | VQVAE2:
    """A saved model on ``device``, laid out for running without gradients.

    Raises:
        InputError: As from_pretrained.
    """
    model = from_pretrained(folder).to(device)
    if device.type == "cpu":  # oneDNN takes channels_last as it is and copies NCHW to its own order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@contextlib.contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without TF32; all is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _without_tf32():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Not by `cudnn.flags`: it raises where `fp32_precision` chose TF32, and resets the rest."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    kinds = [cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []  # from torch 2.9 on
    # What a kind has of its own and what it takes from all of PyTorch look alike: it is its own
    # afterwards.
    before = [kind.fp32_precision for kind in kinds]
    allowed = before == ["tf32", "tf32"] if kinds else cudnn.allow_tf32

    def choose(allow: bool, precisions: list[str]) -> None:
        with backends.__allow_nonbracketed_mutation():  # as in `cudnn.flags`
            cudnn.allow_tf32 = allow
            for kind, precision in zip(kinds, precisions, strict=True):
                kind.fp32_precision = precision

    try:
        choose(False, ["ieee"] * len(kinds))  # of their own: that of all of PyTorch may be TF32
        yield
    finally:
        choose(allowed, before)


def fitting_size(size: int | None, model: MSVQVAE | VQVAE2) -> int:
    """Side of square images in pixels, by default the model's resolution.

    Raises:
        InputError: Unless the model takes it.
    """
    size = size or model.config.resolution
    if size < 1 or size % model.stride:
        raise InputError(f"size={size}; this model takes multiples of {model.stride} pixels")
    return size


def tile_batches(
    tiles: Iterable[tuple[str, Tensor]], batch_size: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and images ``(B, 3, H, W)`` of at most ``batch_size`` neighbours of one size."""
    names: list[str] = []
    images: list[Tensor] = []
    for name, image in tiles:
        if images and (len(images) == batch_size or image.shape != images[0].shape):
            yield names, torch.stack(images)
            names, images = [], []
        names.append(name)
        images.append(image)
    if images:
        yield names, torch.stack(images)
