"""What a prior cannot be made of, asked or drawn from; draws under autocast."""

from __future__ import annotations

import pytest
import torch
from priors.test_priors import GRIDS, SMALL, cached_logits, prior, random_codes

from msvq_fast.ops import InputError
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig, sample


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": ()}, "grids"),
        ({"kernels": (3,)}, "2 odd windows"),
        ({"kernels": (3, 4)}, "2 odd windows"),
        ({"kernels": (3, 1)}, "at least 3"),
        ({"width": 15}, "multiple of heads"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_configurations(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PriorConfig(**{"grids": GRIDS, **SMALL, **options})


def test_bad_calls() -> None:
    model = prior(AutoregressivePrior)
    with pytest.raises(InputError, match="training mode"):
        sample(model.train(), 1)
    model.eval()
    with pytest.raises(InputError, match=r"codes\[1\]"):
        model(random_codes(((4, 4), (4, 4))))
    with pytest.raises(InputError, match="num_classes=0"):
        model(random_codes(GRIDS), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="decoding"):
        sample(model, 1, settings={"decoding": "quick"})
    with pytest.raises(InputError, match="top_p"):
        sample(model, 1, settings={"top_p": 0.0})


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": torch.zeros(2).long(), "classes": 0}, "num_classes=0"),
        ({"labels": torch.tensor([1])}, r"labels is torch.int64 \(1,\); expected int64 \(2,\)"),
        ({"labels": [1, 2]}, r"labels is a list; expected an int64 tensor \(2,\)"),
        ({"labels": torch.tensor([1.0, 2.0])}, "labels is torch.float32"),
        ({"labels": torch.tensor([1, 4])}, r"labels span \[1, 4\]; expected 0 to 3"),
        ({"fixed": [torch.zeros(2, 16, 1).long(), None]}, "fixed is torch.int64"),
        ({"fixed": [None, torch.full((2, 8, 8), 11)]}, "fixed has code 11; expected below 11"),
        ({"coarser": [torch.zeros(3, 4, 4).long()]}, r"coarser\[0\] is .*expected int64 \(2, 4"),
        ({"coarser": [torch.full((2, 4, 4), 11)]}, r"coarser\[0\] spans \[11, 11\]; .* 0 to 10"),
        ({"coarser": [torch.full((2, 4, 4), -1)]}, r"coarser\[0\] spans \[-1, -1\]"),
        ({"coarser": [torch.zeros(2, 4, 4).int()]}, r"coarser\[0\] is torch.int32"),
        ({"coarser": random_codes(GRIDS, batch=3)}, r"coarser\[0\] is .*expected int64 \(2, 4"),
        ({"first": torch.arange(3)}, r"first is torch.int64 \(3,\); expected int64 \(2,\)"),
    ],
)
def test_bad_draws(kind: type, call: dict, message: str) -> None:
    call = dict(call)
    model = prior(kind, num_classes=call.pop("classes", 3))
    with pytest.raises(InputError, match=message):
        sample(model, 2, **call)
    with pytest.raises(InputError, match="coarser has 0 grids; expected 1"):
        model.draw_scale(1, [], batch=1, seed=0)


@pytest.mark.parametrize("kind", [AutoregressivePrior, MaskGITPrior])
@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("code", [-100, -1, 11])  # -100 is what cross-entropy leaves out
def test_codes_out_of_range(kind: type, scale: int, code: int) -> None:
    model, codes = prior(kind), random_codes(GRIDS)
    codes[scale][1, 2, 3] = code
    calls = [model, *([model.logits] if kind is AutoregressivePrior else [])]
    for call in calls:
        with pytest.raises(InputError, match=rf"codes\[{scale}\] spans .*of 0 to 10"):
            call(codes)


@pytest.mark.parametrize("name", ["guidance", "choice_temperature"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_not_finite(name: str, value: float) -> None:
    model, labels = prior(MaskGITPrior, num_classes=3), torch.tensor([0, 1])
    with pytest.raises(InputError, match=f"{name}={value}; expected a finite number"):
        sample(model, 2, labels=labels, settings={name: value})


@pytest.mark.parametrize("kernels", [None, (3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_under_autocast(dtype: torch.dtype, kernels: tuple[int, int] | None) -> None:
    model = prior(AutoregressivePrior, kernels=kernels)
    codes = random_codes(GRIDS)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        drawn = [sample(model, 2, settings={"decoding": d}) for d in ("wavefront", "sequential")]
        cached, whole = cached_logits(model, codes), model.logits(codes)
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    for one, other in zip(cached, whole, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.2)
