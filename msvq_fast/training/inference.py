"""How a trained model is run when its figures and pictures must be exact, and on which sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

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
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        model.train(was_training)


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
