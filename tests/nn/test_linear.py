from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from msvq_fast.nn import linear as module
from msvq_fast.nn.linear import LEAST_ROWS, Linear


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Any processor as one that gains from convolutions; the shapes that were convolved."""
    shapes, conv2d = [], F.conv2d

    def note(x, *rest):
        shapes.append(x.shape)
        return conv2d(x, *rest)

    monkeypatch.setattr(module, "_mkl_lacks_avx512", lambda: True)
    monkeypatch.setattr(module, "_LEAST_PRODUCTS", LEAST_ROWS * 4)
    monkeypatch.setattr(F, "conv2d", note)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(LEAST_ROWS, 24), (2, 80, 24), (1, LEAST_ROWS, 24), (4, 2, 32, 24), (160, 1)]
)
def test_convolved_rows_equal_products(
    bias: bool, shape: tuple[int, ...], convolutions: list[torch.Size]
) -> None:
    torch.manual_seed(0)
    layer = Linear(shape[-1], 10, bias=bias)
    exact = nn.Linear(shape[-1], 10, bias=bias).double()
    exact.load_state_dict(layer.state_dict())  # the same names
    x = torch.randn(shape, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    out, out64 = layer(x), exact(x64)
    assert len(convolutions) == 1
    assert out.shape == out64.shape and out.is_contiguous() == out64.is_contiguous()
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(out, (x, *layer.parameters()), grad)
    true = torch.autograd.grad(out64, (x64, *exact.parameters()), grad.double())
    for a, b in zip((out, *found), (out64, *true), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def test_rows_in_another_order_are_not_mixed(convolutions: list[torch.Size]) -> None:
    layer = Linear(8, 4)
    x = torch.randn(8, 16, 16).transpose(0, 2)  # (16, 16, 8), not contiguous
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(convolutions) == 1


def test_what_gains_nothing_is_a_product(convolutions: list[torch.Size]) -> None:
    layer, rows = Linear(8, 4), torch.randn(LEAST_ROWS, 8)
    for x in (rows[:-16], torch.randn(LEAST_ROWS + 8, 8), rows[:0], rows[0]):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    Linear(3, 1)(rows[:, :3])  # fewer products
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16
    layer.double()(rows.double())
    with pytest.raises(RuntimeError, match="dtype"):  # F.linear's error, as of nn.Linear
        layer(rows)
    Linear(8, 4, device="meta")(rows.to("meta"))
    assert convolutions == []


class OnlyLinear(torch.Tensor):
    """Weights that only ``F.linear`` takes, as quantized ones."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = (args[0], args[1].as_subclass(torch.Tensor), *args[2:])
        elif func in (torch.Tensor.__getitem__, F.conv2d):
            raise NotImplementedError
        return super().__torch_function__(func, (), args, kwargs)


def test_weights_of_another_class_meet_a_product(convolutions: list[torch.Size]) -> None:
    layer, rows = Linear(8, 4), torch.randn(LEAST_ROWS, 8)
    expected = F.linear(rows, layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OnlyLinear))
    assert torch.equal(layer(rows), expected)
    assert convolutions == []


def test_rows_of_another_width_are_named(convolutions: list[torch.Size]) -> None:
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 4 channels"):
        Linear(8, 4)(torch.randn(LEAST_ROWS, 4))
    assert len(convolutions) == 1


def test_who_watches_sees_a_product(convolutions: list[torch.Size]) -> None:
    layer, rows = Linear(8, 4), torch.randn(LEAST_ROWS, 8)
    for graph in (torch.export.export(layer, (rows,)).graph, make_fx(layer)(rows).graph):
        assert "conv" not in str(graph)
    assert convolutions == []


def test_a_processor_is_asked_for_its_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = module._mkl_lacks_avx512.__wrapped__
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for text, wanted in (("vendor_id\t: AuthenticAMD\n", True), ("GenuineIntel", False)):
        monkeypatch.setattr(module.Path, "read_text", lambda self, text=text: text)
        assert ask() is wanted
    monkeypatch.setattr(module.Path, "read_text", lambda self: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert ask() is False
