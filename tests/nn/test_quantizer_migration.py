"""docs/vector_quantize.md on vector-quantize-pytorch, held against the package itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from msvq_fast.nn import VectorQuantizer

package = pytest.importorskip("vector_quantize_pytorch")
PAGE = (Path(__file__).parents[2] / "docs" / "vector_quantize.md").read_text(encoding="utf-8")


def test_every_option_is_in_the_table() -> None:
    table = re.findall(r"^\| (`.*?) \| (.*?) \|$", PAGE, flags=re.M)
    theirs = {word for cell, _ in table for word in re.findall(r"`(\w+)", cell)}
    options = set(inspect.signature(package.VectorQuantize).parameters)
    call = set(inspect.signature(package.VectorQuantize.forward).parameters)
    assert options <= theirs
    assert theirs <= options | call
    ours = {word for _, cell in table for word in re.findall(r"^`(\w+)`", cell)}
    known = {*inspect.signature(VectorQuantizer).parameters, "defer_updates"}
    assert {"code_dim", "num_codes", "decay", "laplace_eps", "restart_below"} <= ours <= known


def test_the_same_settings_train_alike() -> None:
    theirs = package.VectorQuantize(
        dim=16,
        codebook_size=64,
        decay=0.99,
        commitment_weight=0.25,
        accept_image_fmap=True,
        rotation_trick=False,
    )
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert code is not None
    page: dict[str, object] = {}
    exec(code[1], page)
    ours = VectorQuantizer(64, 16, laplace_eps=1e-5)
    page["take_over"](ours, theirs.state_dict())  # type: ignore[operator]
    for _ in range(10):
        z = torch.randn(4, 16, 16, 16) * 0.1
        inputs = [z.clone().requires_grad_() for _ in range(2)]
        want, want_codes, want_loss = theirs(inputs[0])
        got = ours(inputs[1])
        assert got.code_counts.min() > 0  # a code without a latent keeps its vector here only
        assert torch.equal(got.codes, want_codes)
        torch.testing.assert_close(got.z_q, want)
        torch.testing.assert_close(got.commitment_loss, want_loss)
        (want.square().sum() + want_loss).backward()
        (got.z_q.square().sum() + got.commitment_loss).backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        torch.testing.assert_close(ours.codebook, theirs.codebook)
