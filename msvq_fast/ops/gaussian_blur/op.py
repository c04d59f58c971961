"""Gaussian blur and the blur pyramid (Eq. 7-8): contracts, checks, choice of kernel, gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from msvq_fast.ops.backend import Op
from msvq_fast.ops.checks import InputError, check_choice, check_count, check_image
from msvq_fast.ops.gaussian_blur import reference

BORDERS = ("reflect", "symmetric", "replicate", "circular", "constant")
SIGMA_RULES = ("paper", "opencv")
OP = Op(__package__)


def gaussian_blur(
    x: Tensor,
    kernel_size: int | Sequence[int],
    sigma: float | Sequence[float] | None = None,
    *,
    border: str = "reflect",
    backend: str | None = None,
) -> Tensor:
    """Blur images with a separable, truncated and normalised Gaussian (Eq. 7).

    Args:
        x: ``(B, C, H, W)`` images, float32, float64, bfloat16, float16 or uint8, any H, W >= 1,
            also smaller than the kernel; contiguous or channels_last.
        kernel_size: Odd number of taps in pixels, or a tuple or list ``(vertical, horizontal)``.
        sigma: Standard deviation in pixels, > 0, or ``(vertical, horizontal)``; None takes Eq. 8,
            ``σ = ((κ - 1)/2 - 1)/3 + 4/5``.
        border: How pixels outside are read: ``reflect`` (edge not repeated), ``symmetric`` (edge
            repeated), ``replicate``, ``circular`` or ``constant`` (zero).
        backend: ``None`` picks; ``"reference"`` or ``"native"`` runs or raises.

    Returns:
        ``(B, C, H, W)``, the dtype and memory format of ``x``.

    Drop-in:
        ``gaussian_blur2d(x, (ky, kx), (sy, sx), border_type)`` of kornia: pairs in the same order,
        borders of the same names. torchvision's ``gaussian_blur(x, [kx, ky], [sx, sy])``: its pairs
        are reversed, its border is ``reflect``, its default sigma
        ``default_sigma(kernel_size, "opencv")``; lists of one number mean what they mean there.

    Gradient:
        To ``x``, twice differentiable, by a gather with no atomics: the adjoint of the reflect
        border is the blur itself between two scalings of the edge rows and columns.

    Raises:
        InputError: For a wrong shape, dtype, kernel size, sigma or border.

    Numerics:
        Taps are built in float64 and kept in float32 for every image dtype (float64 images keep
        float64); sums run in float32 and round once. Deterministic for any number of threads.
        Kernels add the two pixels of a tap before they multiply: such a sum may not exceed the
        largest float32.
    """
    check_image("x", x, allow_uint8=True)
    check_choice("border", border, BORDERS)
    return _blur(x, *blur_taps(kernel_size, sigma), border, backend)


def _blur(
    x: Tensor,
    taps_y: tuple[float, ...],
    taps_x: tuple[float, ...],
    border: str,
    backend: str | None,
) -> Tensor:
    chosen = OP.pick(x, taps_y, taps_x, border, backend=backend)
    if chosen == "reference":
        return reference.gaussian_blur(x, taps_y, taps_x, border)
    return _GaussianBlur.apply(x, taps_y, taps_x, border, False, chosen)


def gaussian_pyramid(
    x: Tensor,
    num_scales: int,
    *,
    kernel_size: int | None = None,
    sigma: float | None = None,
    sigma_rule: str = "paper",
    border: str = "reflect",
    backend: str | None = None,
) -> list[Tensor]:
    """Blur ``x`` again and again at full resolution: the targets of every scale (Eq. 7).

    Args:
        x: ``(B, C, H, W)`` images as in `gaussian_blur`.
        num_scales: M >= 1, how many targets.
        kernel_size: Odd number of taps; None takes `default_kernel_size` of ``min(H, W)``.
        sigma: Standard deviation in pixels; None takes ``sigma_rule``.
        sigma_rule: ``"paper"`` is Eq. 8 as printed, ``"opencv"`` has 0.3 in place of 1/3.
        border: As in `gaussian_blur`.
        backend: As in `gaussian_blur`.

    Returns:
        M images ``(B, C, H, W)``, coarsest first; the last is ``x`` itself.

    Raises:
        InputError: As `gaussian_blur`, for ``num_scales < 1``, an unknown rule, or a pair of kernel
            sizes or sigmas.

    Numerics:
        As `gaussian_blur`. Where no gradient is asked for, a GPU may blur twice in one pass: the
        last bits then differ from those of single blurs.
    """
    check_image("x", x, allow_uint8=True)
    check_count(num_scales=num_scales)
    kernel_size, sigma = pyramid_kernel(x, kernel_size, sigma, sigma_rule)
    taps, _ = blur_taps(kernel_size, sigma)
    check_choice("border", border, BORDERS)
    levels = [x]
    at_once = num_scales > 2 and x.device.type == "cuda"
    at_once = at_once and not (x.requires_grad and torch.is_grad_enabled())
    if at_once and OP.pick(x, taps, taps, border, backend=backend) == "native":
        levels += _BlurTwice.apply(x, taps, border)
    while len(levels) < num_scales:
        levels.append(_blur(levels[-1], taps, taps, border, backend))
    return levels[::-1]


def pyramid_kernel(
    x: Tensor, kernel_size: int | None, sigma: float | None, sigma_rule: str
) -> tuple[int, float]:
    """Kernel size and sigma of every blur of `gaussian_pyramid`."""
    check_choice("sigma_rule", sigma_rule, SIGMA_RULES)
    if kernel_size is None:
        kernel_size = default_kernel_size(min(x.shape[-2:]))
    elif not isinstance(kernel_size, Integral):
        raise InputError(f"kernel_size={kernel_size!r}; expected an odd positive int")
    if sigma is not None and not isinstance(sigma, Real):  # one for both axes, as the kernel size
        raise InputError(f"sigma={sigma!r}; expected a positive finite number")
    size = int(kernel_size)
    return size, default_sigma(size, sigma_rule) if sigma is None else sigma


def default_kernel_size(resolution: int) -> int:
    """Kernel size κ in taps for images of ``resolution`` pixels: √r - 1 (§3.2), made odd.

    1024 → 31, 512 → 21, 256 → 15, 128 → 11, 64 → 7.
    """
    # The integer root by comparison: math.isqrt would fix the image size of a compiled graph.
    root = 1
    while (root + 1) ** 2 <= resolution:
        root += 1
    return (root - 1) | 1


def default_sigma(kernel_size: int, rule: str = "paper") -> float:
    """Sigma in pixels for a kernel size, Eq. 8 (``"paper"``) or OpenCV's and torchvision's rule."""
    check_choice("sigma_rule", rule, SIGMA_RULES)
    steps = (kernel_size - 1) / 2 - 1
    return steps * (1 / 3) + 4 / 5 if rule == "paper" else 0.3 * steps + 0.8


def _pair(value: Any) -> tuple[Any, ...]:
    """A number, or a sequence of one, as two; other sequences as they are."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return pair * 2 if len(pair) == 1 else pair


def _check_sizes(kernel_size: int | Sequence[int]) -> tuple[int, int]:
    pair = _pair(kernel_size)
    if len(pair) != 2 or any(not isinstance(k, Integral) or k < 1 or k % 2 == 0 for k in pair):
        raise InputError(
            f"kernel_size={kernel_size!r}; expected an odd positive int or a pair of them (y, x)"
        )
    return int(pair[0]), int(pair[1])


def _check_sigmas(sigma: float | Sequence[float]) -> tuple[float, float]:
    pair = _pair(sigma)
    if len(pair) != 2 or any(
        not isinstance(s, Real) or not (float(s) > 0 and math.isfinite(s)) for s in pair
    ):
        raise InputError(f"sigma={sigma!r}; expected a positive finite number or a pair (y, x)")
    return float(pair[0]), float(pair[1])


def _gaussian_taps(kernel_size: int, sigma: float) -> tuple[float, ...]:
    """Sample exp(-j²/2σ²) at the integers and divide by the sum, in float64."""
    radius = kernel_size // 2
    steps = [j / sigma for j in range(-radius, radius + 1)]
    weights = [math.exp(-0.5 * (step * step)) for step in steps]  # ** would raise where * is inf
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def blur_taps(
    kernel_size: int | Sequence[int], sigma: float | Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Vertical and horizontal taps of `gaussian_blur`, after checking its arguments."""
    size_y, size_x = _check_sizes(kernel_size)
    if sigma is None:
        sigma = default_sigma(size_y), default_sigma(size_x)
    sigma_y, sigma_x = _check_sigmas(sigma)
    taps_y = _gaussian_taps(size_y, sigma_y)
    same = (size_y, sigma_y) == (size_x, sigma_x)
    return taps_y, taps_y if same else _gaussian_taps(size_x, sigma_x)


class _GaussianBlur(torch.autograd.Function):
    """The blur G or its adjoint Gᵀ; each is the other's derivative, so double backward works."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        taps_y: tuple[float, ...],
        taps_x: tuple[float, ...],
        border: str,
        adjoint: bool,
        backend: str,
    ) -> Tensor:
        ctx.settings = (taps_y, taps_x, border)
        ctx.adjoint, ctx.backend = adjoint, backend
        return OP.kernels[backend].gaussian_blur(x, taps_y, taps_x, border, adjoint)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _GaussianBlur.apply(grad_out, *ctx.settings, not ctx.adjoint, ctx.backend)
        return grad_x, None, None, None, None, None


class _BlurTwice(torch.autograd.Function):
    """Two blurs in one pass, without a derivative: forward mode raises, as of `_GaussianBlur`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: tuple[float, ...], border: str) -> tuple[Tensor, Tensor]:
        return OP.kernels["native"].blur_twice(x, taps, border)
