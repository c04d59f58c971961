"""Configurations of strangers beside weights that they do not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msvq_fast import models, priors
from msvq_fast.nn.saved import build_and_load, save_weights
from msvq_fast.ops import InputError

# The first of each fails at once where nothing is checked, the last takes all memory.
MODEL = [{"num_codes": 10**30}, {"code_dim": 10**12}, {"num_residual_blocks": 10**12}]
PRIOR = [{"grids": [[10**9] * 2]}, {"grids": [[1e300, 4]]}, {"depth": 10**12}]


def change(folder: Path, values: dict[str, Any]) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def test_a_model_is_no_larger_than_its_weights(tmp_path: Path) -> None:
    for values in MODEL:
        models.from_preset("tiny").save_pretrained(tmp_path)
        change(tmp_path, values)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be loaded: ") as error:
            models.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


def test_a_prior_is_no_larger_than_its_weights(tmp_path: Path) -> None:
    sizes = priors.PriorConfig(((2, 2),), num_codes=8, width=8, heads=2, depth=1)
    for values in PRIOR:
        priors.MaskGITPrior(sizes).save_pretrained(tmp_path)
        change(tmp_path, values)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be loaded: ") as error:
            priors.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [models.from_pretrained, priors.from_pretrained])
@pytest.mark.parametrize("text", ["[" * 10**5, '{"model": []}', '{"model": {}}'])
def test_odd_configurations_are_named(load: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"is not the configuration of a|holds a '"):
        load(tmp_path)


@pytest.mark.parametrize(
    "values", [{"num_codes": 1.5}, {"heads": 2.0}, {"depth": True}, {"grids": [[1e400, 2]]}]
)
def test_a_prior_of_odd_numbers_is_named(values: dict[str, Any], tmp_path: Path) -> None:
    sizes = priors.PriorConfig(((2, 2),), num_codes=8, width=8, heads=2, depth=1)
    priors.MaskGITPrior(sizes).save_pretrained(tmp_path)
    change(tmp_path, values)
    with pytest.raises(InputError, match="is not the configuration of a prior: "):
        priors.from_pretrained(tmp_path)


def test_what_a_model_starts_with_is_as_without_a_file(tmp_path: Path) -> None:
    models.from_preset("tiny").save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = models.from_preset("tiny")
    after = torch.get_rng_state()
    torch.manual_seed(0)
    build_and_load(lambda: models.build(expected.config), tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_weights_have_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(nn.Linear(2, 2), tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o604)
    save_weights(nn.Linear(2, 2), tmp_path / "new")  # as one that is written over keeps its own
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604


def test_a_disk_without_permissions_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    save_weights(nn.Linear(2, 2), tmp_path / "new")
    build_and_load(lambda: nn.Linear(2, 2), tmp_path / "new")
