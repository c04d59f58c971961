"""All rows, the important ones first."""

from __future__ import annotations

from collections.abc import Iterable

from device import attention, convolutions, images, quantizer, training
from device.rows import Row


def all_rows() -> list[Row]:
    """Stable order of rank: our rows of the headline shapes, then their peers, then the rest."""
    suites = (quantizer, images, attention, convolutions, training)
    found = [row for suite in suites for row in suite.rows()]
    return sorted(found, key=lambda row: row.rank)


def select(ids: Iterable[str]) -> list[Row]:
    by_id = {row.id: row for row in all_rows()}
    return [by_id[i] for i in ids]
