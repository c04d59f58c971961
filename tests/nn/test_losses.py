from __future__ import annotations

from typing import Any

import pytest
import torch

from msvq_fast.nn import losses
from msvq_fast.nn.losses import GaussianPyramid, MultiScaleLoss


def test_every_setting_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(losses, "gaussian_pyramid", lambda *_, **given: calls.append(given))
    monkeypatch.setattr(losses, "multiscale_loss", lambda *_, **given: calls.append(given))
    x = torch.zeros(1, 3, 8, 8)
    blur = {"kernel_size": 5, "sigma": 1.5, "sigma_rule": "opencv", "border": "circular"}
    blur["backend"] = "reference"
    loss = {**blur, "weights": (1.0, 2.0), "reduction": "sum", "recompute": True}
    GaussianPyramid(2, **blur)(x)
    MultiScaleLoss(**loss)([x, x], x)
    assert calls == [blur, loss]
