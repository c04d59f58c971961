"""docs/migration.md: our call beside the one it replaces, where that library is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's code defines."""
    text = PAGE.read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S)), found)
    return found


@pytest.mark.filterwarnings("ignore")
def test_vector_quantize_pytorch() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    from msvq_fast.nn import VectorQuantizer

    torch.manual_seed(0)
    settings = {"decay": 0.99, "commitment_weight": 0.25, "threshold_ema_dead_code": 0}
    theirs = library.VectorQuantize(
        dim=16, codebook_size=32, accept_image_fmap=True, **settings, eps=1e-5
    )
    ours = VectorQuantizer(32, 16, decay=0.99, commitment_weight=0.25, laplace_eps=1e-5)
    book = theirs._codebook
    moved = {"codebook": book.embed, "cluster_size": book.cluster_size, "code_sums": book.embed_avg}
    ours.load_state_dict({name: tensor[0] for name, tensor in moved.items()})
    for _ in range(3):
        z = torch.randn(2, 16, 8, 8)
        want, got = theirs(z), ours(z)
        assert torch.equal(got.codes, want[1])
        torch.testing.assert_close(got.z_q, want[0])
        torch.testing.assert_close(got.commitment_loss, want[2].squeeze())
        torch.testing.assert_close(ours.codebook, book.embed[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_kornia(names: dict[str, Any]) -> None:
    filters = pytest.importorskip("kornia.filters")
    metrics = pytest.importorskip("kornia.metrics")
    x = names["x"]
    want = filters.gaussian_blur2d(x, (15, 9), (2.0, 3.0), "reflect")
    torch.testing.assert_close(names["blurred"], want, rtol=1e-5, atol=1e-6)
    similarity = metrics.ssim(x, 0.9 * x, 11).mean().double()
    torch.testing.assert_close(names["similarity"][0], similarity, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_natten(names: dict[str, Any]) -> None:
    functional = pytest.importorskip("natten.functional")
    q, k, v = torch.randn(3, 1, 8, 9, 2, 16)
    want = functional.na2d(q, k, v, kernel_size=(3, 3))
    torch.testing.assert_close(names["na2d"](q, k, v, kernel_size=3), want, rtol=1e-4, atol=1e-5)
