from __future__ import annotations

import importlib
import inspect
import json
import os
import resource
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import msvq_fast
from msvq_fast import __version__, models
from msvq_fast.cli import attribute_texts, main, parse
from msvq_fast.ops.backend import Op
from msvq_fast.training.config import FREE_ON_RESUME, TrainConfig

Train = Callable[..., int]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must exit with 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("msvq: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_help_answers_before_torch_could_be_loaded() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = "import sys\nfrom msvq_fast.cli import main\ncode = main(['train', '--help'])\n"
    program += "sys.exit(code or 'torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3  # of processor time: others may be using the machine


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--model.num_codes" in printed and "Peak learning rate of Adam;" in printed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"msvq_fast {__version__}"


def test_free_fields_are_fields() -> None:
    assert set(TrainConfig.__dataclass_fields__) >= FREE_ON_RESUME


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "no command given; expected one of train, evaluate, compare, reconstruct, tokenize, "
            "train-prior",
        ),
        (["trian"], "unknown command trian; did you mean train?"),
        (["train", "--lrr", "3"], "unknown option --lrr; did you mean --lr?"),
        (["train", "--model.num_code=3"], "did you mean --model.num_codes?"),
        (["train", "--zzzzzz"], "unknown option --zzzzzz; msvq train --help"),
        (["evaluate", "--gan_start=1"], "unknown option --gan_start; msvq evaluate --help"),
        (["train", "--flip=false"], "--flip takes no value; its opposite is --no_flip"),
        (["train", "--flip", "false"], "'false' belongs to no option; those that are true or "),
        (["train", "--lr", "fast"], "--lr fast: expected float"),
        (["train", "--steps", "1.5"], "--steps 1.5: expected int or null"),
        (["train", "--crop", "left"], "--crop left: expected random or center"),
        (["train", "--schedule", "step"], "--schedule step: expected cosine, constant or null"),
        (["train", "--betas", "0.9"], "--betas 0.9: expected a list [float, float]"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate"], "evaluate needs --checkpoint"),
        (["train-prior"], "train-prior needs --tokens"),
        (["train-prior", "--kind=gan"], "--kind gan: expected autoregressive or maskgit"),
        # Options of several commands, each with its own choices.
        (["evaluate", "--crop=random"], "--crop random: expected tiles or center"),
        (["info", "--precision=auto"], "--precision auto: expected bf16 or fp32"),
        (["train-prior", "--tokens=t", "--lr=null"], "--lr null: expected float\n"),
        (["reconstruct", "--checkpoint=c", "--limit=x"], "--limit x: expected int\n"),
        (
            ["sample", "--prior=p", "--checkpoint=c", "--labels=cat"],
            "--labels cat: expected a list [str or int, ...] or null",
        ),
    ],
)
def test_wrong_words(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset=huge"], "preset 'huge' is unknown; expected one of"),
        (["--preset=vqvae2-tiny", "--model.kernel_size=3"], "'kernel_size' is not a field of"),
        (["--model.latents=[3,6]"], "resolution 16 must be each of them"),
        (["--model.latents=[2,6]"], "each must be double the one before"),
        (["--model.resolution=20"], "resolution 20 must be each of them"),
        (["--batch_size=0"], "batch_size=0; expected at least 1"),
        (["--batch_size=50", "--repeat=1"], "an epoch has 10 crops, too few for one step of"),
        (["--accumulate=9"], "an epoch has 20 crops, too few for one step of"),
        (["--steps=0"], "steps=0; expected at least 1"),
        ([f"--seed={2**64}"], "seed=18446744073709551616; expected less than 2^64"),
        (["--lr=-1"], "lr=-1.0; expected a positive finite number"),
        (["--betas=[0.9,1]"], "betas=(0.9, 1.0); expected two numbers in [0, 1)"),
        (["--warmup_epochs=.inf"], "warmup_epochs=inf; expected a finite number"),
        (["--min_lr_fraction=2"], "min_lr_fraction=2.0; expected 0 to 1"),
        (["--data=nowhere"], "data folder 'nowhere' does not exist"),
        (["--data=builtin:cats"], "is not built in; expected 'builtin:photos'"),
        (["--data=wds:nowhere-{0..3}.tar"], "there is no shard 'nowhere-0.tar'"),
        (["--device=tpu"], "device='tpu'; expected auto, cpu, cuda or cuda:N"),
        (["--resume=nowhere"], "resume=nowhere does not exist"),
        (["--backend=triton"], "cannot run"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert train(out, "--steps=2", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (out / "checkpoints").is_dir() or not any((out / "checkpoints").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--device=cuda") == 2
    assert "this torch sees no CUDA device; use device=cpu" in capsys.readouterr().err


def test_a_folder_without_images(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no image")
    assert train(tmp_path / "out", f"--data={tmp_path / 'data'}") == 2
    assert "has no image" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train(out, "--steps=2") == 2
        error = capsys.readouterr().err
        assert str(tmp_path / "file") in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_tensorboard_is_asked_for_by_name_when_missing(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tmp_path, "--steps=2", "--tensorboard") == 2
    assert "TensorBoard is not installed; pip install tensorboard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [", "--config"),
        ("lrr: 3", "unknown option --lrr; did you mean --lr?"),
        ("lr: fast", "lr fast: expected float"),
        ("", "--config: the file is empty; expected options with values, such as 'seed: 1'"),
        ("model:", "--config: the file starts with 'model:'; expected options with values"),
        ("model: 3", "--model 3: expected options, such as --model.resolution"),
        ("model: [3]", "--model [3]: expected options, such as --model.resolution"),
        ("batch_size: null", "--batch_size null: expected int"),
        ("out: null", "--out null: expected str"),
    ],
)
def test_a_bad_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "train.yaml").write_text(text)
    error = fails(capsys, "train", f"--config={tmp_path / 'train.yaml'}")
    assert message in error or "Problems parsing config" in error


def test_null_leaves_the_choice_to_the_command(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("steps: 3\nlr: null\nmodel:\n")
    assert parse(["train", f"--config={tmp_path / 'train.yaml'}"])[1] == TrainConfig(steps=3)
    (tmp_path / "sample.yaml").write_text("prior: p\ncheckpoint: c\nregion: null\n")
    with pytest.raises(ArgumentError, match=r"--region null: expected a list \[float, float"):
        parse(["sample", f"--config={tmp_path / 'sample.yaml'}"])


def test_the_printed_config_is_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch-size=3", "--model.latents=[4,8]", "--no_flip", "--betas=[0.5,0.9]"]
    assert main(["train", *options, "--print_config"]) == 0
    printed = capsys.readouterr().out
    values: dict[str, Any] = yaml.safe_load(printed)
    assert values["batch_size"] == 3 and values["flip"] is False and values["betas"] == [0.5, 0.9]
    assert values["model"]["latents"] == [4, 8]
    (tmp_path / "train.yaml").write_text(printed)
    assert main(["train", f"--config={tmp_path / 'train.yaml'}", "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_info_names_every_op_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("reference", "native", "triton", __version__, torch.__version__, "threads"):
        assert word in printed
    for op in ("nearest_code", "vector_quantize", "gaussian_blur", "local_attention"):
        row = next(line for line in printed.splitlines() if line.startswith(op))
        assert row.split()[1] == "available"
    assert "fails" not in printed


@pytest.mark.parametrize("colour", ["", "1"])
def test_info_presets_shows_the_parameters_beside_the_papers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, colour: str
) -> None:
    monkeypatch.setenv("COLUMNS", "20")  # nobody's screen: it is a pipe
    monkeypatch.setenv("FORCE_COLOR", colour)
    assert main(["info", "--presets"]) == 0
    *table, note = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in table}
    assert rows.keys() >= models.PRESETS.keys()
    count = sum(p.numel() for p in models.from_preset("tiny").parameters())
    assert f"{count / 1e6:.3f} M" in rows["tiny"]
    assert "54.3 M" in rows["celebahq1024-l"]
    # Table 4 has 22.2 M with both transformers, which no other table takes apart.
    assert "8.88 M" in rows["ffhq128"] and "Table 4" in note


def test_a_saved_state_tells_what_made_it(tmp_path: Path, train: Train) -> None:
    assert train(tmp_path, "--steps=1") == 0
    state = json.loads((tmp_path / "checkpoints" / "step_00000001" / "state.json").read_text())
    assert state["versions"]["torch"] == torch.__version__
    assert (state["step"], state["epoch"], state["batch"], state["world_size"]) == (1, 0, 1, 1)
    assert state["model_config"]["num_codes"] == 8


def test_options_are_explained_by_docstrings_without_indentation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Python 3.13 compiles them; under -OO there are none."""
    want = attribute_texts(TrainConfig)
    monkeypatch.setattr(TrainConfig, "__doc__", inspect.cleandoc(TrainConfig.__doc__ or ""))
    assert attribute_texts(TrainConfig) == want and len(want) > 30
    monkeypatch.setattr(TrainConfig, "__doc__", None)
    assert main(["train", "--help"]) == 0


@pytest.mark.parametrize("command", ["train --help", "info >&-"])
def test_any_output_will_do(command: str) -> None:
    line = f"{sys.executable} -m msvq_fast {command}"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_a_file_nested_without_end_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep.yaml").write_text(f"data: {'[' * 3000}{']' * 3000}")
    told = fails(capsys, "train", f"--config={tmp_path}/deep.yaml")
    assert "nested too deeply" in told or "maximum nesting depth" in told  # PyYAML's own words


def test_names_that_are_no_utf_8_can_be_printed() -> None:
    program = "from msvq_fast.cli import main\nmain(['--version'])\nprint('wrote \\udcff.png')"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # strict, as of most locales
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, capture_output=True, env=environment, check=False)
    assert done.stdout.endswith(b"wrote ?.png\n"), done.stderr


def test_names_do_not_reach_the_terminal_as_orders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokens.json").write_text(json.dumps({"schema": "\33[31mred\u202e"}))
    error = fails(capsys, "train-prior", f"--tokens={tmp_path}")
    assert r"schema \x1b[31mred\u202e; this version" in error


def test_a_reader_may_leave() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "msvq_fast", "info"]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train", "; try memory=sequential, then strips; lower batch_size and raise accumulate "),
        ("evaluate --checkpoint x", "Tried to allocate 2 GiB; lower batch_size\n"),
        ("info", "Tried to allocate 2 GiB\n"),
    ],
)
def test_too_little_memory_names_the_remedies_that_the_command_has(
    line: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, Tried to allocate 2 GiB. GPU 0 has more")

    command, _ = parse(line.split())
    module = importlib.import_module(command.module)
    monkeypatch.setattr(module, command.function, out_of_memory)
    assert main(line.split()) == 1
    assert hint in capsys.readouterr().err


def test_a_missing_extension_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "msvq_fast._C", None)
    monkeypatch.delattr(msvq_fast, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "msvq_fast.ops.gaussian_blur.native", raising=False)
    assert "C++17 compiler" in Op("msvq_fast.ops.gaussian_blur").missing["native"]
    assert main(["info", "--presets"]) == 0
    assert "note: the C++ extension was not built" in capsys.readouterr().err
