"""Gaussian blur and pyramid on images of the paper's sizes, beside what people use today."""

from __future__ import annotations

import peers
import pytest
import torch
from parity import assert_close

from msvq_fast.ops import default_sigma, gaussian_blur, gaussian_pyramid

# resolution, κ of the paper for it
SHAPES = [(256, 15), (1024, 31)]
PEERS = {
    "torch separable": peers.torch_separable_blur,
    "torch dense": peers.torch_dense_blur,
    "kornia": peers.kornia_blur,
    "OpenCV float32": peers.opencv_blur,
}
OURS = ["native", "reference"]


def image(resolution: int) -> torch.Tensor:
    return torch.rand(1, 3, resolution, resolution) * 2 - 1


def blur_multiply_adds(x: torch.Tensor, size: int) -> int:
    """The fewest: two passes, both pixels of a tap added before they are multiplied."""
    return x.numel() * 2 * (size // 2 + 1)


@pytest.mark.parametrize("name", [*OURS, "copy", *PEERS])
@pytest.mark.parametrize(("resolution", "size"), SHAPES)
def test_blur(
    measure: peers.Measure,
    multiply_adds_per_second: float,
    resolution: int,
    size: int,
    name: str,
) -> None:
    x, sigma = image(resolution), default_sigma(size)
    if name in OURS:
        function = lambda: gaussian_blur(x, size, sigma, backend=name)  # noqa: E731
    elif name == "copy":
        function = x.clone
    else:
        function = PEERS[name](x, size, sigma)
    if name != "copy":
        want = gaussian_blur(x.double(), size, sigma, backend="reference")
        # OpenCV and the convolutions sum in float32 in other orders
        assert_close(name, function(), want, ulps=64)
    floor = blur_multiply_adds(x, size) / multiply_adds_per_second
    extra = {} if name == "copy" else {"floor_s": floor}
    measure(f"blur 3x{resolution}x{resolution} k{size} float32", name, function, **extra)


@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_pyramid(measure: peers.Measure, multiply_adds_per_second: float, name: str) -> None:
    x, size = image(1024), 31
    sigma = default_sigma(size)
    first = PEERS[name](x, size, sigma) if name in PEERS else None

    def two_levels() -> torch.Tensor:
        if name in OURS:
            return gaussian_pyramid(x, 3, backend=name)[0]
        return PEERS[name](first(), size, sigma)()

    want = gaussian_pyramid(x.double(), 3, backend="reference")[0]
    assert_close(name, two_levels(), want, ulps=128)
    floor = 2 * blur_multiply_adds(x, size) / multiply_adds_per_second
    group = "pyramid 3x1024x1024 k31, two levels, float32"
    measure(group, name, two_levels, rounds=9, floor_s=floor)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((dtype, name) for dtype in (torch.bfloat16, torch.float16, torch.uint8) for name in OURS),
        (torch.uint8, "OpenCV"),
    ],
)
def test_blur_of_other_types(measure: peers.Measure, dtype: torch.dtype, name: str) -> None:
    x = image(1024)
    x = ((x + 1) * 127.5).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    label = str(dtype).removeprefix("torch.")
    blur = lambda: gaussian_blur(x, 31, backend=name)  # noqa: E731
    if name == "OpenCV":
        blur = peers.opencv_blur(x, 31, default_sigma(31))
    got = blur().double()
    want = gaussian_blur(x.double(), 31, backend="reference")
    if dtype == torch.uint8:
        # OpenCV's taps and sums are 16-bit integers: up to two units away
        assert bool(((got - want).abs() < (2 if name == "OpenCV" else 0.5) + 1e-3).all())
    else:
        assert_close(name, got.to(dtype), want)
    measure(f"blur 3x1024x1024 k31 {label}", name, blur)
