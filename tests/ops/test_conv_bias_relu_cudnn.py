"""Which convolutions cuDNN joins with what follows; here something stands in for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msvq_fast.ops.conv_bias_relu.op import OP
from tests.ops.conv_cases import LAST, LAYERS, inputs, needs_triton, run, small


class Cudnn:
    """Stands in for cuDNN's fused convolutions, of an x that says that it is on a GPU."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels = pytest.importorskip("msvq_fast.ops.conv_bias_relu.triton_kernels")
        self.calls: list[tuple] = []
        self.error: str | None = None
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", self.convolve)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", self.convolve)
        monkeypatch.setattr(self.kernels, "_refused", set())

    def convolve(self, *arguments):
        self.calls.append(arguments)
        if self.error:
            raise RuntimeError(self.error)
        return "fused"

    def __call__(self, x: Tensor, *others: Tensor | None):
        steps = ([1, 1], [1, 1], [1, 1])
        return self.kernels._fused(x.as_subclass(self.OnGpu), *others, steps)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    return Cudnn(monkeypatch)


def test_deterministic_algorithms_are_not_left_to_cudnn(
    cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fused convolutions take any."""
    given = inputs(LAYERS[1], False, torch.float16)
    assert cudnn(*given) == "fused"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert cudnn(*given) is None
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert cudnn(*given) is None


def test_what_cudnn_is_asked_for(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, residual = inputs(LAYERS[1], True, torch.float16)
    apart = small(16)[::2]  # float32
    for bias, rest in ((apart, None), (apart, residual), (small(16).half()[::2], None)):
        assert cudnn(x, weight, bias, rest) == "fused"
        *_, taken = (t for t in cudnn.calls[-1] if isinstance(t, Tensor) and t.dim() == 1)
        assert taken.dtype == torch.float16 and taken.is_contiguous()
        assert any(t is rest for t in cudnn.calls[-1]) == (rest is not None)
    for tensors in (
        (x.float(), weight.float()),
        (x[:0], weight),
        (x[:, :12], weight[:, :12]),
        (x, weight[:7]),
    ):
        assert cudnn(*tensors, bias, None) is None
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert cudnn(x, weight, bias, None) is None
    assert len(cudnn.calls) == 3


def test_what_cudnn_refuses_it_is_asked_for_once(cudnn: Cudnn) -> None:
    *given, residual = inputs(LAYERS[1], True, torch.float16)
    for error in ("Unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED"):
        cudnn.kernels._refused.clear()
        cudnn.calls.clear()
        cudnn.error = error
        assert cudnn(*given, None) is None and cudnn(*given, None) is None
        assert len(cudnn.calls) == 1
        cudnn.error = None
        assert cudnn(*given, residual) == "fused"  # that is another call
    cudnn.error = "out of memory"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            cudnn(*given, residual)


@needs_triton
def test_cudnn_makes_the_relu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = OP.kernels["triton"]
    asked = []
    monkeypatch.setattr(kernels, "_fused", lambda *a: asked.append(a))
    for layer, want in ((LAYERS[3], "relu"), (LAYERS[1], "sum"), (LAYERS[1], "both")):
        run(inputs(layer, False), layer, want, "triton")
    assert not asked
    x, weight, bias, residual = inputs(LAYERS[1], True)
    run([x, weight, bias, residual.contiguous()], LAYERS[1], "relu", "triton")
    assert asked[0][3].is_contiguous(memory_format=LAST)
