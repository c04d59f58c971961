"""Result files that are complete after every row, one per suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import machine


class Book:
    """The results under ``folder``; with ``resume``, those that this commit has there already."""

    def __init__(self, folder: Path, *, device: str, commit: str, resume: bool) -> None:
        self.folder, self.device, self.commit, self.resume = folder, device, commit, resume
        self.described: dict[str, Any] = {}
        self.records: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, described: dict[str, Any], suites: list[str]) -> None:
        """Start the files of a machine, or go on with them."""
        self.described = described
        for suite in suites:
            if suite not in self.records:
                self.records[suite] = self._read(suite) or machine.record(
                    suite, described, self.commit, self.device, results=[], missing=[]
                )

    def path(self, suite: str) -> Path:
        return machine.path(self.folder, suite, self.described, self.device)

    def has(self, suite: str, group: str, name: str) -> bool:
        results = self.records[suite]["results"]
        return any(r["group"] == group and r["name"] == name for r in results)

    def add(self, suite: str, outcome: dict[str, Any]) -> None:
        """Record what `run_row` returned, in place of what the row had, and write the file."""
        record = self.records[suite]
        (row,) = outcome.values()
        for key in ("results", "missing"):
            record[key] = [
                r for r in record[key] if (r["group"], r["name"]) != (row["group"], row["name"])
            ]
        record["results" if "result" in outcome else "missing"].append(row)
        machine.write(self.path(suite), record)

    def _read(self, suite: str) -> dict[str, Any] | None:
        path = self.path(suite)
        if not self.resume or not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # The results themselves, once tracked, make the tree dirty.
        same = record["commit"].removesuffix("-dirty") == self.commit.removesuffix("-dirty")
        return record if same else None
