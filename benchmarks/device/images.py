"""The blur's pyramid, the multi-scale loss and the last layer on eight images of 1024 x 1024."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from device.rows import OURS, Bench, Case, Cost, Row, bound, relative_error
from torch import Tensor

from msvq_fast.ops import default_sigma, gaussian_pyramid, multiscale_loss, upsample_image
from msvq_fast.ops.gaussian_blur.op import OP
from msvq_fast.ops.multiscale_loss.op import OP as LOSS_OP

TAPS = 31
SCALES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLAIN = f"{OURS} without tensor cores"  # which only Hopper's kernels use
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PEER_BLUR: dict[str, Callable[[Tensor, int, float], peers.Blur]] = {
    "kornia": peers.kornia_blur,
    "torch separable": peers.torch_separable_blur,
    "torch dense (torchvision's form)": peers.torch_dense_blur,
}


def images(bench: Bench, dtype: str, layout: str, count: int) -> list[Tensor]:
    side = bench.size(1024, 48)
    shape = (bench.size(8, 1), 3, side, side)
    return [
        (torch.rand(shape, device=bench.device) * 2 - 1)
        .to(DTYPES[dtype])
        .to(memory_format=LAYOUTS[layout])
        for _ in range(count)
    ]


def blur_operations(x: Tensor) -> float:
    """Additions and multiplications of the M - 1 blurs."""
    return (SCALES - 1) * x.numel() * 2 * TAPS * 2


def off_tensor_cores(op: Any, x: Tensor, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` without an op's kernel for Hopper."""
    native = op.kernels.get("native")
    if x.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    if not hasattr(getattr(native, "_C", None), "gaussian_pyramid_hopper"):
        pytest.skip("no extension with kernels for Hopper")

    def off() -> Any:
        native.TENSOR_CORES = False
        try:
            return run()
        finally:
            native.TENSOR_CORES = True

    return off


def peer_pyramid(x: Tensor, name: str) -> Callable[[], list[Tensor]]:
    """Coarsest first, each level the blur of the one after it."""
    sigma = default_sigma(TAPS)

    def pyramid() -> list[Tensor]:
        levels = [x]
        for _ in range(SCALES - 1):
            levels.append(PEER_BLUR[name](levels[-1], TAPS, sigma)())
        return levels[::-1]

    return pyramid


def pyramid(bench: Bench, dtype: str, layout: str, name: str) -> Case:
    (x,) = images(bench, dtype, layout, 1)
    ours = name in (OURS, PLAIN)
    if ours:
        run = lambda: gaussian_pyramid(x, SCALES, kernel_size=TAPS)  # noqa: E731
        if name == PLAIN:
            run = off_tensor_cores(OP, x, run)
    elif name in PEER_BLUR:
        run = peer_pyramid(x, name)
    else:
        plain = lambda x: gaussian_pyramid(  # noqa: E731
            x, SCALES, kernel_size=TAPS, backend="reference"
        )
        plain = torch.compile(plain) if name == "torch.compile" else plain
        run = lambda: plain(x)  # noqa: E731

    def check() -> dict[str, Any]:
        want = gaussian_pyramid(x[:1].double(), SCALES, kernel_size=TAPS, backend="reference")
        errors = [relative_error(a[:1], b) for a, b in zip(run(), want, strict=True)]
        limit = 1e-5 if dtype == "float32" else 2e-2
        assert max(errors) < limit or not ours, f"errors {errors}"
        return {"error": max(errors)}

    moved = SCALES * x.numel() * x.element_size()
    return Case(run, check, Cost(moved, 0, blur_operations(x)))


def loss(bench: Bench, dtype: str, layout: str, name: str) -> Case:
    """The loss and the gradient of every contribution."""
    x, *contributions = images(bench, dtype, layout, 1 + SCALES)
    for contribution in contributions:
        contribution.requires_grad_()
    ours = name in (OURS, PLAIN)
    if ours:
        forward = multiscale_loss
    elif name in PEER_BLUR:
        forward = peer_loss(peer_pyramid(x, name))
    else:
        forward = plain_loss
        if name == "torch.compile":
            forward = torch.compile(plain_loss)

    def run() -> list[Tensor]:
        value = forward(contributions, x, kernel_size=TAPS)[0]
        return [value, *torch.autograd.grad(value, contributions)]

    if name == PLAIN:
        run = off_tensor_cores(LOSS_OP, x, run)

    def check() -> dict[str, Any]:
        truth = [c.detach().double().requires_grad_() for c in contributions]
        value = plain_loss(truth, x.double(), kernel_size=TAPS)[0]
        want = [value.detach(), *torch.autograd.grad(value, truth)]
        errors = [relative_error(a.detach(), b) for a, b in zip(run(), want, strict=True)]
        limit = 1e-5 if dtype == "float32" else 2e-2
        assert max(errors) < limit or not ours, f"errors {errors}"
        return {"loss_error": errors[0], "grad_error": max(errors[1:])}

    moved = (1 + 2 * SCALES) * x.numel() * x.element_size()
    return Case(run, check, Cost(moved, 0, blur_operations(x)))


def plain_loss(contributions: Sequence[Tensor], x: Tensor, *, kernel_size: int) -> Any:
    return multiscale_loss(contributions, x, kernel_size=kernel_size, backend="reference")


def peer_loss(targets: Callable[[], list[Tensor]]) -> Callable[..., tuple[Tensor]]:
    def forward(contributions: list[Tensor], x: Tensor, *, kernel_size: int) -> tuple[Tensor]:
        partial, total = torch.zeros_like(x), torch.zeros((), device=x.device)
        for contribution, target in zip(contributions, targets(), strict=True):
            partial = partial + contribution
            total = total + (partial - target).float().square().mean()
        return (total,)

    return forward


def last_layer(bench: Bench, training: bool, name: str) -> Case:
    """The image of 64 features a pixel of half its size, with the gradients or without."""
    side = bench.size(512, 24)
    shape = (bench.size(8, 1), 64, side, side)
    x = torch.randn(shape, device=bench.device).to(bench.half, memory_format=torch.channels_last)
    weight = (torch.randn(64, 3, 4, 4, device=bench.device) / 32).to(bench.half)
    bias = torch.randn(3, device=bench.device).to(bench.half)
    inputs = [t.requires_grad_(training) for t in (x, weight, bias)]
    forward = lambda *t: F.conv_transpose2d(*t, stride=2, padding=1)  # noqa: E731
    call = bound_backend(bench) if name == OURS else forward
    upstream = torch.randn_like(call(*inputs).detach())

    def run() -> list[Tensor]:
        out = call(*inputs)
        return [out, *(torch.autograd.grad(out, inputs, upstream) if training else ())]

    def check() -> dict[str, Any]:
        truth = [t.detach().double().requires_grad_(training) for t in inputs]
        out = forward(*truth)
        want = [out, *(torch.autograd.grad(out, truth, upstream.double()) if training else ())]
        errors = [relative_error(a.detach(), b.detach()) for a, b in zip(run(), want, strict=True)]
        assert max(errors) < 2e-2 or name != OURS, f"errors {errors}"
        return {"error": max(errors)}

    # x and the image; for the gradients x and that of the image again, and that of x.
    image = upstream.numel() * upstream.element_size()
    features = x.numel() * x.element_size()
    moved = features + image + training * (2 * features + image)
    return Case(run, check, Cost(moved, (1 + 2 * training) * 2.0 * x.numel() * 48))


def bound_backend(bench: Bench) -> Callable[..., Tensor]:
    return lambda *inputs: upsample_image(*inputs, backend=bench.backend)


def rows() -> list[Row]:
    found = []
    for training, title in ((False, "forward"), (True, "forward and gradients")):
        group = f"last layer {title}, 8x64x512x512 to images, bfloat16, channels_last"
        for name, rank in ((OURS, 0), ("torch eager", 1)):
            found.append(
                Row("upsample_image", group, name, bound(last_layer, training, name), rank)
            )
    kinds = (
        ("gaussian_blur", "pyramid of two blurs", pyramid),
        ("multiscale_loss", "loss and gradients, M 3", loss),
    )
    for suite, title, build in kinds:
        for dtype, layout, rank in (
            ("float32", "NCHW", 0),
            ("bfloat16", "channels_last", 0),
            ("float32", "channels_last", 1),
            ("bfloat16", "NCHW", 1),
        ):
            group = f"{title}, 8x3x1024x1024 k {TAPS}, {dtype}, {layout}"
            names = {OURS: rank}
            if rank == 0:
                names |= {"torch.compile": 1, "torch eager": 2}
            if dtype == "float32" and layout == "NCHW":
                names |= dict.fromkeys(PEER_BLUR, 1)
            # The loss on tensor cores is of float32 alone.
            if layout == "NCHW" and (suite == "gaussian_blur" or dtype == "float32"):
                names[PLAIN] = rank
            for name, row_rank in names.items():
                found.append(Row(suite, group, name, bound(build, dtype, layout, name), row_rank))
    return found
