"""The multi-scale loss and its gradients on images of the paper's sizes, beside eager PyTorch."""

from __future__ import annotations

import peers
import pytest
import torch
from parity import assert_close
from torch import Tensor

from msvq_fast.ops import default_sigma, multiscale_loss

# resolution, κ of the paper for it
SHAPES = [(256, 15), (1024, 31)]
SCALES = 3


def inputs(resolution: int) -> tuple[list[Tensor], Tensor]:
    shape = (1, 3, resolution, resolution)
    return [torch.randn(shape).requires_grad_() for _ in range(SCALES)], torch.rand(shape) * 2 - 1


BLURS = {"kornia": peers.kornia_blur, "torch separable": peers.torch_separable_blur}


def plain_loss(contributions: list[Tensor], x: Tensor, size: int, name: str) -> Tensor:
    """The loss as one writes it over somebody's blur."""
    blur, sigma = BLURS[name], default_sigma(size)
    targets = [x]
    for _ in contributions[1:]:
        targets.insert(0, blur(targets[0], size, sigma)())
    partial, loss = torch.zeros_like(x), x.new_zeros(())
    for contribution, target in zip(contributions, targets, strict=True):
        partial = partial + contribution
        loss = loss + torch.nn.functional.mse_loss(partial, target)
    return loss


@pytest.mark.parametrize("name", ["native", "native recompute", "reference", *BLURS])
@pytest.mark.parametrize(("resolution", "size"), SHAPES)
def test_forward_and_backward(
    measure: peers.Measure,
    multiply_adds_per_second: float,
    resolution: int,
    size: int,
    name: str,
) -> None:
    contributions, x = inputs(resolution)
    backend, _, recompute = name.partition(" ")

    def step() -> tuple[Tensor, ...]:
        if name in BLURS:
            loss = plain_loss(contributions, x, size, name)
        else:
            loss, _ = multiscale_loss(
                contributions, x, kernel_size=size, recompute=bool(recompute), backend=backend
            )
        return torch.autograd.grad(loss, contributions)

    exact = [c.detach().double().requires_grad_() for c in contributions]
    loss, _ = multiscale_loss(exact, x.double(), kernel_size=size, backend="reference")
    for got, want in zip(step(), torch.autograd.grad(loss, exact), strict=True):
        assert_close(name, got, want, ulps=64)
    # Two levels of two passes each; both pixels of a tap are added before they are multiplied.
    floor = x.numel() * 4 * (size // 2 + 1) / multiply_adds_per_second
    group = f"loss and gradients 3x{resolution}x{resolution} k{size} M3 float32"
    measure(group, name, step, rounds=9, floor_s=floor)
