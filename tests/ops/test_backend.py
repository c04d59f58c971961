"""Which backend runs: the order of every device, no silent fallback, one warning on CUDA."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from msvq_fast.ops import InputError, backend
from msvq_fast.ops.backend import Op


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


@pytest.mark.parametrize("name", ["native", "triton"])
def test_what_is_asked_for_runs_or_raises(op: Op, name: str) -> None:
    assert op.pick(on("cpu"), backend=name) == name
    op.kernels[name] = kernel("it is tired")
    with pytest.raises(InputError, match=f"backend='{name}' cannot run .*: it is tired"):
        op.pick(on("cpu"), backend=name)
    with pytest.raises(InputError, match="backend='cuda'; expected None or one of"):
        op.pick(on("cpu"), backend="cuda")
