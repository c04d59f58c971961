"""The scripts in examples/: every command that they give is one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from msvq_fast import cli

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def stage2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage2", EXAMPLES / "stage2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["stage2.py", "--out=runs/there"])
    return module


def test_stage2_gives_commands_that_exist(
    stage2: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def parsed(arguments: Sequence[str]) -> int:
        options = cli._parser().parse_args([cli._underscored(a) for a in arguments])
        given.append((options["command"], options[options["command"]]))
        return 0

    monkeypatch.setattr(stage2, "msvq", parsed)
    stage2.main()
    names = [name for name, _ in given]
    assert names == ["train", "tokenize", "tokenize", "train-prior", "train-prior", *["sample"] * 4]
    outputs = {options["out"] for _, options in given}
    assert len(outputs) == len(given)
    for name, options in given[1:]:  # what one writes the next reads
        inputs = {"tokenize": "checkpoint", "train-prior": "tokens", "sample": "prior"}[name]
        assert options[inputs] in outputs


def test_stage2_ends_with_the_first_error(
    stage2: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage2, "msvq", lambda arguments: 2)
    with pytest.raises(SystemExit, match="2"):
        stage2.main()
