"""How models are run for figures and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from msvq_fast.training.inference import inference_mode

CUDNN: Any = torch.backends.cudnn


@pytest.fixture
def kinds() -> Iterator[list[Any]]:
    """What has a precision of its own; all is as PyTorch starts, before and after."""
    if not hasattr(CUDNN, "conv"):
        pytest.skip("torch 2.9 brought fp32_precision")
    yield [CUDNN.conv, CUDNN.rnn]
    torch.backends.fp32_precision = "none"
    CUDNN.allow_tf32 = True


@pytest.mark.parametrize("everywhere", ["none", "tf32"])
@pytest.mark.parametrize("conv", ["none", "ieee", "tf32"])
def test_no_tf32_however_it_was_chosen(kinds: list[Any], everywhere: str, conv: str) -> None:
    torch.backends.fp32_precision = everywhere
    CUDNN.conv.fp32_precision = conv
    before = [kind.fp32_precision for kind in kinds]
    with inference_mode(nn.Identity()), inference_mode(nn.Identity()):
        assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
        assert not CUDNN.allow_tf32
    assert [kind.fp32_precision for kind in kinds] == before


def test_flags_that_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.backends.disable_global_flags` does for good."""
    monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)
    before = CUDNN.allow_tf32
    with inference_mode(nn.Identity()):
        assert not CUDNN.allow_tf32
    assert CUDNN.allow_tf32 is before


@pytest.mark.parametrize("allowed", [False, True])
def test_other_choices_stay(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    monkeypatch.setattr(CUDNN, "enabled", False)
    monkeypatch.setattr(CUDNN, "deterministic", True)
    monkeypatch.setattr(CUDNN, "allow_tf32", allowed)
    model = nn.Identity()
    with pytest.raises(KeyError), inference_mode(model):
        assert not (model.training or torch.is_grad_enabled() or CUDNN.allow_tf32)
        assert CUDNN.deterministic and not CUDNN.enabled
        raise KeyError
    assert model.training and torch.is_grad_enabled()
    assert CUDNN.allow_tf32 is allowed
