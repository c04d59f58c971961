"""Which backend runs, without a silent fallback; kernels as ops of PyTorch."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from msvq_fast.nn import VectorQuantizer
from msvq_fast.ops import (
    InputError,
    backend,
    gaussian_blur,
    gaussian_pyramid,
    multiscale_loss,
    nearest_code,
    vector_quantize,
)
from msvq_fast.ops.backend import Op, kernel_op
from msvq_fast.ops.checks import is_watched


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op whose two kernels run every call."""
    monkeypatch.setattr(backend, "_warned", set())
    made = Op("msvq_fast.ops.gaussian_blur")
    made.missing = {}
    made.kernels = {name: kernel(None) for name in ("native", "triton")}
    return made


def kernel(reason: str | None) -> SimpleNamespace:
    return SimpleNamespace(unsupported=lambda x: reason)


def on(device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, device=device)


@pytest.mark.parametrize(
    ("device", "order"),
    [("cuda", ["native", "triton"]), ("cpu", ["native"]), ("meta", [])],
)
def test_the_first_of_the_device_that_can(op: Op, device: str, order: list[str]) -> None:
    x = on(device)
    for name in order:
        assert op.pick(x) == name
        op.kernels[name] = kernel(f"{name} is tired")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert op.pick(x) == "reference"
        assert op.pick([x]) == "reference"


def test_a_missing_kernel_is_passed_over(op: Op) -> None:
    del op.kernels["native"]
    op.missing["native"] = "not built here"
    assert op.pick(on("cuda")) == "triton"
    with pytest.raises(InputError, match="cannot run gaussian_blur: not built here"):
        op.pick(on("cuda"), backend="native")


def test_the_reference_on_cuda_warns_once_with_every_reason(op: Op) -> None:
    op.kernels = {name: kernel(f"{name} is tired") for name in ("native", "triton")}
    with pytest.warns(UserWarning, match="gaussian_blur .* native is tired; triton is tired"):
        op.pick(on("cuda"))
    op.pick(on("cuda"))  # a second warning would be an error
    op.pick(on("cpu"))
    op.kernels["native"] = kernel("another reason")
    op.pick(on("cuda"), backend="reference")
    with pytest.warns(UserWarning, match="another reason"):
        op.pick(on("cuda"))


@pytest.mark.parametrize("name", ["conv_bias_relu", "upsample_image"])
def test_kernels_of_pytorch_itself_are_no_slow_reference(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = importlib.import_module(f"msvq_fast.ops.{name}.op").OP
    monkeypatch.setattr(own, "missing", dict.fromkeys(("native", "triton"), "not here"))
    assert own.pick(on("cuda")) == "reference"  # a warning would be an error


@pytest.mark.parametrize("name", ["native", "triton"])
def test_what_is_asked_for_runs_or_raises(op: Op, name: str) -> None:
    assert op.pick(on("cpu"), backend=name) == name
    op.kernels[name] = kernel("it is tired")
    with pytest.raises(InputError, match=f"backend='{name}' cannot run .*: it is tired"):
        op.pick(on("cpu"), backend=name)
    with pytest.raises(InputError, match="backend='cuda'; expected None or one of"):
        op.pick(on("cpu"), backend="cuda")


def test_a_first_call_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from msvq_fast import ops\n"
        "x, codes = torch.rand(2, 3, 16, 16), torch.rand(4, 3)\n"
        "for backend in (None, 'reference'): ops.nearest_code(x, codes, dim=1, backend=backend)\n"
        "ops.vector_quantize(x, codes, dim=1); ops.multiscale_loss([x, x], x)\n"
        "ops.local_attention(x.flatten(2)[..., None], [x.flatten(2)[..., None]],"
        " [x.flatten(2)[..., None]], grids=[(16, 16)], kernels=[3])\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_autograd_notices_what_a_kernel_changes() -> None:
    scale = getattr(torch.ops.msvq_fast, "multiscale_loss_scale_native", None)
    if scale is None:
        pytest.skip("needs the C++ extension")
    weight, saved = torch.ones(3, requires_grad=True), torch.ones(3)
    out = (weight * saved).sum()
    scale([saved], torch.tensor(1.0), [1.0], "sum")  # by 1: not even a write in place tells
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_compiler_does_not_trace_a_kernel() -> None:
    traced: list[bool] = []

    @kernel_op("kernel_of_a_test", "cpu")
    def double(x: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return 2 * x

    def call(x: Tensor) -> Tensor:
        outs: list[Tensor] = []  # eval and re.sub are not traced: the op is called as it is

        def add(_: object) -> str:
            eval("outs.append(double(x))", {"double": double, "outs": outs, "x": x})
            return ""

        re.sub("a", add, "a")
        return outs[0]

    x = torch.rand(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frames that it leaves alone
        out = torch.compile(call, backend="eager")(x)
    assert torch.equal(out, 2 * x) and traced == [False]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_who_watches_operations() -> None:
    seen: list[bool] = []

    def call(x: Tensor) -> Tensor:
        seen.append(is_watched())
        return 2 * x

    x = torch.rand(3)
    call(x)
    with FlopCounterMode(display=False):
        call(x)
    torch.jit.trace(call, x, check_trace=False)
    assert seen == [False, True, True]
    compiled = torch.compile(lambda x: x + is_watched(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)


def test_an_op_does_not_ask_for_an_export_where_nothing_traces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The question loads PyTorch's exporter and takes a tenth of a small call's time."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: pytest.fail("asked"))
    x, codebook = torch.rand(1, 4, 8, 8), torch.rand(8, 4)
    multiscale_loss([x], gaussian_blur(x, 3), backend="reference")
    vector_quantize(x, codebook, dim=1)
    nearest_code(x, codebook, dim=1, backend="reference")


def test_counts_may_be_those_of_numpy() -> None:
    """Sizes read from an array or a file are often so."""
    pyramid = gaussian_pyramid(torch.rand(1, 3, 8, 8), np.int64(2))
    assert len(pyramid) == 2
    assert VectorQuantizer(np.int32(8), np.int64(4)).codebook.shape == (8, 4)
