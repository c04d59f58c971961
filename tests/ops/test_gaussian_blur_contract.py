"""The blur under torch.compile, its rules for kernel size and sigma, and its errors."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
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
from msvq_fast.ops.gaussian_blur.op import OP


def test_numbers_of_numpy() -> None:
    x = torch.rand(1, 3, 8, 8)
    got = gaussian_blur(x, np.int64(5), np.float32(1.5))
    assert torch.equal(got, gaussian_blur(x, 5, 1.5))
    assert torch.equal(
        gaussian_pyramid(x, 2, kernel_size=np.int32(3))[0],
        gaussian_pyramid(x, 2, kernel_size=3)[0],
    )


def test_a_kernel_far_larger_than_the_image() -> None:
    x = torch.rand(1, 1, 8, 6)
    got = gaussian_blur(x, 20001, 3.0)
    torch.testing.assert_close(got, gaussian_blur(x, 101, 3.0))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.skipif("native" not in OP.kernels, reason=str(OP.missing.get("native")))
def test_no_memory_is_an_error() -> None:
    """And not the end of the process, whichever thread finds none."""
    script = """
import resource, torch
from msvq_fast.ops import gaussian_blur
x = torch.rand(2, 1, 512, 8)
torch.set_num_threads(2)
want = gaussian_blur(x, 31, 2.0, backend="native")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20),) * 2)
try:
    gaussian_blur(x, 8001, 2.0, backend="native")
except MemoryError:
    print(torch.equal(gaussian_blur(x, 31, 2.0, backend="native"), want))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


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
        ({"sigma": "auto"}, "sigma='auto'"),
        ({"sigma": torch.tensor(2.0)}, r"sigma=tensor\(2.\); expected a positive finite number"),
        ({"kernel_size": 8193, "backend": "native"}, "the CPU kernel takes up to 8191 taps"),
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
        ({"sigma": (1.0, 2.0)}, r"sigma=\(1.0, 2.0\); expected a positive finite number"),
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
    x = torch.rand(1, 1, 9, 11)
    sigmas = (default_sigma(3), default_sigma(7))  # of each axis its own
    assert torch.equal(gaussian_blur(x, (3, 7)), gaussian_blur(x, (3, 7), sigmas))
    with pytest.raises(InputError, match="sigma_rule"):
        default_sigma(31, "torch")
    with pytest.raises(InputError, match="num_scales"):
        gaussian_pyramid(torch.zeros(1, 3, 8, 8), 0)
