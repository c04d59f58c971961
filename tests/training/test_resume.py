"""What a run that goes on says and keeps when it does so elsewhere or otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msvq_fast.models import from_preset
from msvq_fast.ops import InputError
from msvq_fast.training import loop
from msvq_fast.training.checkpoint import (
    CorruptCheckpointError,
    checkpoint_path,
    find_model,
    list_checkpoints,
    load_optimizer,
    read_state,
    save_checkpoint,
    verify,
)
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.prior_config import TrainPriorConfig
from msvq_fast.training.resume import describe_changes, describe_computation

Train = Callable[..., int]


def state_of(config: TrainConfig, **others: Any) -> dict[str, Any]:
    return {"config": config.to_dict(), "model_config": {}, **others}


def test_a_run_in_another_folder_finds_a_best_of_its_own(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([30.0, 20.0, 10.0, 15.0])  # in dB, after every epoch of five steps
    monkeypatch.setattr(loop, "validate", lambda *a, **o: ([0.1], [next(figures)]))
    first, second = tmp_path / "first", tmp_path / "second"
    schedule = ("--schedule=constant", "--keep_last=1")
    assert train(first, "--steps=5", *schedule) == 0
    assert train(second, "--steps=15", f"--resume={first}", *schedule) == 0
    assert find_model(second) == checkpoint_path(second, 10)
    assert train(second, "--steps=20", f"--resume={second}", *schedule) == 0
    assert find_model(second) == checkpoint_path(second, 10)
    shutil.rmtree(checkpoint_path(second, 10))  # as where only the last was copied
    assert find_model(second) == checkpoint_path(second, 20)


def test_a_saved_model_is_no_run_to_go_on_from(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    from_preset("tiny").save_pretrained(tmp_path / "saved")
    assert train(tmp_path / "run", "--steps=2", f"--resume={tmp_path / 'saved'}") == 2
    assert "saved holds no checkpoint; expected a run or one of its" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("preset", "schedule"), [("tiny", "cosine"), ("vqvae2-tiny", "constant")])
def test_the_default_by_its_name_is_no_change(
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    preset: str,
    schedule: str,
) -> None:
    assert train(tmp_path, f"--preset={preset}", "--steps=2") == 0
    named = ("--lr=0.001", "--betas=[0.5,0.9]", f"--schedule={schedule}", "--resume=auto")
    assert train(tmp_path, f"--preset={preset}", "--steps=3", *named) == 0
    assert "from here on the run is another" not in capsys.readouterr().out
    other = "cosine" if schedule == "constant" else "constant"
    assert train(tmp_path, f"--preset={preset}", f"--schedule={other}", "--resume=auto") == 2
    assert f"schedule is {schedule} there and {other} here" in capsys.readouterr().err


def test_every_byte_of_a_large_file_counts(tmp_path: Path) -> None:
    large = {"moments": torch.zeros(3 << 18)}  # 3 MiB
    folder = save_checkpoint(
        tmp_path,
        model=from_preset("tiny"),
        optimizer=large,
        state={"step": 1, "config": {}, "model_config": {}},
    )
    state = json.loads((folder / "state.json").read_text())
    verify(folder, state)
    with (folder / "optimizer.pt").open("r+b") as file:
        file.seek(1 << 19)
        file.write(b"\1")
    with pytest.raises(InputError, match=r"optimizer\.pt is corrupt: its checksum"):
        verify(folder, state)
    with pytest.raises(InputError, match=r"optimizer\.pt is corrupt"):  # also where it is named
        find_model(folder)


def test_another_way_to_compute_is_a_warning(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--steps=2", "--validate_every=0") == 0
    on = ("--validate_every=0", "--resume=auto")
    assert train(tmp_path, "--steps=3", "--channels_last=off", "--strips=4", *on) == 0
    assert "warning" not in capsys.readouterr().out
    other = ("--channels_last=on", "--memory=strips", "--backend=reference")
    assert train(tmp_path, "--steps=4", *other, *on) == 0
    assert (
        "warning: channels_last off -> on, backend None -> reference, memory default -> strips (8)"
        ": what is trained is the same, but results may differ by rounding\n"
    ) in capsys.readouterr().out
    assert train(tmp_path, "--steps=5", *other, "--strips=2", *on) == 0
    assert "warning: memory strips (8) -> strips (2): what" in capsys.readouterr().out


@pytest.mark.parametrize(("there", "device"), [("auto", "cpu"), ("bf16", "cuda"), ("auto", "cuda")])
def test_auto_and_what_it_stands_for_are_one_precision(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str], there: str, device: str
) -> None:
    """Also where the device is another: what auto meant there can be kept by its name."""
    named, other = ("fp32", "bf16") if device == "cpu" else ("bf16", "fp32")
    assert train(tmp_path, "--steps=2", "--validate_every=0") == 0
    file = list_checkpoints(tmp_path)[-1] / "state.json"
    state = json.loads(file.read_text())
    state["device"], state["config"]["precision"] = device, there
    file.write_text(json.dumps(state))
    on = ("--steps=3", "--validate_every=0", "--resume=auto")
    assert train(tmp_path, f"--precision={other}", *on) == 2
    assert f"precision is {there} there and {other} here" in capsys.readouterr().err
    assert train(tmp_path, f"--precision={named}", *on) == 0
    assert "precision" not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_warns_of_what_it_tells(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--validate_every=0", "--resume=auto")
    assert train(tmp_path, "--steps=2", *options) == 0
    file = list_checkpoints(tmp_path)[-1] / "state.json"
    state = json.loads(file.read_text())
    assert state.pop("device") == "cpu"
    for name in ("backend", "channels_last", "compile", "memory", "strips", "deterministic"):
        del state["config"][name]
    file.write_text(json.dumps(state))
    assert train(tmp_path, "--steps=3", *options) == 0
    assert "warning" not in capsys.readouterr().out
    assert read_state(list_checkpoints(tmp_path)[-1])["step"] == 3
    assert describe_computation(state, TrainConfig(memory="sequential"), "cpu") == [
        "memory default -> sequential: what is trained is the same, but results may differ by "
        "rounding"
    ]


def test_auto_is_known_by_the_device() -> None:
    config = TrainConfig(deterministic=True)
    (line,) = describe_computation(state_of(config, device="cuda"), config, "cpu")
    assert line.startswith("device cuda -> cpu, precision bf16 -> fp32, channels_last on -> off: ")
    assert not describe_computation(state_of(config), config, "cuda")
    # CPUs repeat with and without; CUDA does not.
    without = TrainConfig()
    assert not describe_computation(state_of(config, device="cpu"), without, "cpu")
    (line,) = describe_computation(state_of(config, device="cuda"), without, "cuda")
    assert line.startswith("deterministic True -> False: ")
    prior = TrainPriorConfig(tokens="")
    assert describe_computation({"config": prior.to_dict(), "device": "cuda"}, prior, "cpu") == [
        "device cuda -> cpu, precision bf16 -> fp32: masks and dropout are drawn by the device, "
        "so results differ"
    ]


@pytest.mark.parametrize(
    ("restart_below", "message"),
    [
        (0.0, "sums run in another order, so results agree only up to rounding"),
        (0.5, "codes restart at other latents of them, so results differ"),
    ],
)
def test_steps_that_are_shared_out_otherwise(restart_below: float, message: str) -> None:
    config = TrainConfig(batch_size=4)
    state = state_of(config, world_size=2)
    state["model_config"]["restart_below"] = restart_below
    images = {"images": 1, "images_sha256": ""}
    (line,) = describe_changes(state, TrainConfig(batch_size=8), images, 1)
    assert line.endswith(f"every step has the same 8 crops as before, but {message}")


def test_a_state_of_other_types_is_corrupt(tmp_path: Path, train: Train) -> None:
    assert train(tmp_path, "--steps=1", "--validate_every=0") == 0
    (checkpoint,) = list_checkpoints(tmp_path)
    state = json.loads((checkpoint / "state.json").read_text())
    for change in (
        {"step": "4"},
        {"step": -1},
        {"best": 4},
        {"best": {"step": 1.5}},
        {"config": []},
        {"files": ["model.safetensors"]},
        {"files": {"model.safetensors": 3}},
    ):
        (checkpoint / "state.json").write_text(json.dumps({**state, **change}))
        with pytest.raises(CorruptCheckpointError, match=r"state\.json is corrupt: "):
            find_model(tmp_path)
    for text in ("[" * 10**5, "5"):
        (checkpoint / "state.json").write_text(text)
        with pytest.raises(CorruptCheckpointError, match=r"state\.json is corrupt: "):
            find_model(tmp_path)


def test_an_optimizer_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"optimizer": Code()}, tmp_path / "optimizer.pt")
    with pytest.raises(CorruptCheckpointError, match=r"optimizer\.pt cannot be loaded: "):
        load_optimizer(tmp_path)
    assert not (tmp_path / "ran").exists()
    for odd in (b"", b".", b"no pickle"):
        (tmp_path / "optimizer.pt").write_bytes(odd)
        with pytest.raises(CorruptCheckpointError, match=r"optimizer\.pt cannot be loaded: "):
            load_optimizer(tmp_path)
