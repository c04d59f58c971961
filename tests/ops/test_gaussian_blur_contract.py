"""The blur under torch.compile, its rules for kernel size and sigma, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msvq_fast.ops import (
    InputError,
    default_kernel_size,
    default_sigma,
    gaussian_blur,
    gaussian_pyramid,
)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()

    def coarsest(x: Tensor) -> Tensor:
        return gaussian_pyramid(x, 2)[0].square().sum()

    x = torch.randn(1, 3, 24, 20, requires_grad=True)
    compiled = torch.compile(coarsest, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x), x)
    (want,) = torch.autograd.grad(coarsest(x), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.zeros(3, 8, 8)}, "4 dimensions"),
        ({"x": torch.zeros(1, 3, 0, 8)}, "at least 1"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, "dtype torch.int32"),
        ({"kernel_size": 4}, "kernel_size=4; expected an odd positive int"),
        ({"kernel_size": (3, 5, 7)}, "kernel_size"),
        ({"kernel_size": 3.0}, "kernel_size"),
        ({"kernel_size": -1}, "kernel_size=-1"),
        ({"sigma": 0.0}, "sigma=0.0; expected a positive finite"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": (1.0, math.inf)}, "sigma"),
        ({"sigma": "auto"}, "sigma=auto"),
        ({"border": "mirror"}, "border='mirror'; expected one of"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"backend": "triton"}, "cannot run gaussian_blur: .*triton"),
    ],
)
def test_bad_input_says_what_is_expected(arguments: dict[str, object], message: str) -> None:
    call = {"x": torch.zeros(1, 3, 8, 8), "kernel_size": 3} | arguments
    with pytest.raises(InputError, match=message):
        gaussian_blur(**call)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_size": 4}, "kernel_size=4; expected an odd positive int"),
        ({"kernel_size": (3, 5)}, r"kernel_size=\(3, 5\); expected an odd positive int"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": 1.0, "sigma_rule": "mine"}, "sigma_rule='mine'"),
        ({"border": "mirror"}, "border='mirror'; expected one of"),
    ],
)
@pytest.mark.parametrize("num_scales", [1, 2])
def test_pyramids_of_any_height_check_their_blur(
    num_scales: int, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        gaussian_pyramid(torch.zeros(1, 3, 8, 8), num_scales, **arguments)


@pytest.mark.parametrize("sigma", [1e-200, 5e-324])
def test_the_narrowest_blur_is_none(sigma: float) -> None:
    x = torch.randn(1, 2, 6, 7)
    assert torch.equal(gaussian_blur(x, 5, sigma), x)


def test_native_leaves_float64_to_the_reference() -> None:
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert gaussian_blur(x, 3).dtype == torch.float64
    with pytest.raises(InputError, match=r"float64|not available"):
        gaussian_blur(x, 3, backend="native")


def test_rules_of_kernel_size_and_sigma() -> None:
    sizes = {r: default_kernel_size(r) for r in (1, 64, 128, 256, 512, 1024, 2048)}
    assert sizes == {1: 1, 64: 7, 128: 11, 256: 15, 512: 21, 1024: 31, 2048: 45}
    assert default_sigma(31) == pytest.approx(5.4667, abs=1e-4)
    assert default_sigma(31, "opencv") == pytest.approx(5.0)
    with pytest.raises(InputError, match="sigma_rule"):
        default_sigma(31, "torch")
    with pytest.raises(InputError, match="num_scales"):
        gaussian_pyramid(torch.zeros(1, 3, 8, 8), 0)
