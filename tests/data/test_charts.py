from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msvq_fast.data import charts, curve_chart, histogram
from msvq_fast.data.charts import COLOURS
from msvq_fast.ops import InputError


def where(picture, colour):
    """Rows and columns of the pixels of a colour, antialiased edges left out."""
    distance = (picture.long() - torch.tensor(colour).view(3, 1, 1)).abs().amax(dim=0)
    return (distance < 40).nonzero(as_tuple=True)


def test_a_falling_curve_falls():
    x = torch.arange(1, 101).double()
    picture = curve_chart(
        {"rising": x, "falling": 1 / x}, x=x, x_label="cycles", y_label="power", size=(200, 300)
    )
    assert picture.shape == (3, 200, 300) and picture.dtype == torch.uint8
    rows, columns = where(picture, COLOURS[1])
    left = columns < 200  # the legend is at the right
    correlation = torch.corrcoef(torch.stack([rows[left].double(), columns[left].double()]))
    assert correlation[0, 1] > 0.99  # row numbers grow downwards
    assert rows[left].max() - rows[left].min() > 30


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (1.0, 1000.0, ["1", "10", "100", "1000"]),
        (2.0, 80.0, ["20", "40", "60", "80"]),  # with one power of ten in it
        (20.0, 30.0, ["20", "25", "30"]),
        (0.0204, 0.0206, ["0.0204", "0.0206"]),
        (1e-15, 1e15, [f"{10.0**d:g}" for d in range(-15, 16, 3)]),  # not 31 on top of another
    ],
)
def test_logarithmic_axes_have_labels_within_a_decade_too(
    low: float, high: float, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(
        charts._Frame, "_text", lambda self, x, y, text, anchor: written.append((x, text))
    )
    x = torch.tensor([low, high], dtype=torch.float64)
    charts.curve_chart({"": x}, x=x, x_label="", y_label="")
    places, labels = zip(*written[: len(texts)], strict=True)
    assert list(labels) == texts
    steps = np.diff(np.log([float(text) for text in texts]))
    np.testing.assert_allclose(np.diff(places) / steps, np.diff(places)[0] / steps[0], rtol=1e-3)


def test_values_that_are_not_positive_are_left_out():
    x = torch.arange(1, 11).double()
    values = torch.where(x > 5, x, torch.zeros_like(x))
    full = curve_chart({"a": values, "b": x}, x=x, x_label="", y_label="")
    _, columns = where(full, COLOURS[0])
    assert len(columns)
    values[9] = math.inf
    assert where(curve_chart({"a": values}, x=x, x_label="", y_label=""), COLOURS[0])
    with pytest.raises(InputError, match="no positive value"):
        curve_chart({"a": -x}, x=x, x_label="", y_label="")
    with pytest.raises(InputError, match="curve 'a' has 3 values for 10 places"):
        curve_chart({"a": x[:3]}, x=x, x_label="", y_label="")


def test_a_single_point_is_seen():
    x = torch.arange(1, 11).double()
    curves = {"line": x, "point": torch.where(x == 2, x, 0.0)}
    picture = curve_chart(curves, x=x, x_label="", y_label="", size=(200, 300))
    _, columns = where(picture, COLOURS[1])
    assert (columns < 200).any()  # the legend is at the right


def test_the_legend_of_an_even_use_is_above_its_bars(monkeypatch):
    written = {}
    monkeypatch.setattr(
        charts._Frame, "_text", lambda self, x, y, text, anchor: written.setdefault(text, y)
    )
    picture = histogram(torch.ones(512, dtype=torch.int64), label="100 % used")
    rows, _ = where(picture, COLOURS[1])
    assert written["100 % used"] / 2 + 7 < rows.min()  # drawn twice as large, half a line of 13


def test_histogram_sorts_and_fills():
    counts = torch.tensor([1, 8, 0, 4, 2, 0, 0, 1])
    picture = histogram(counts, label="five of eight", size=(200, 300))
    rows, columns = where(picture, COLOURS[1])
    heights = [int((columns == c).sum()) for c in sorted(set(columns.tolist()))]
    bars = [h for h in heights if h > 4]
    assert max(bars[:20]) == max(bars)  # the most frequent code stands first
    area = len(rows) / max(bars)
    assert picture.shape == (3, 200, 300)
    # Shares over the highest share: (8 + 4 + 2 + 1 + 1) / 8 = 2 bars' worth of area.
    width = columns.max() - columns.min() + 1
    assert area / (float(width) / 5) == pytest.approx(2, rel=0.2)
    with pytest.raises(InputError, match="counts holds nothing"):
        histogram(counts * 0, label="")
