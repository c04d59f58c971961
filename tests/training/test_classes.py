"""Classes from the images through tokens and a prior to samples of a class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msvq_fast import models, priors
from msvq_fast.cli import main
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig
from msvq_fast.training import sample
from msvq_fast.training.checkpoint import checkpoint_path, find_model
from msvq_fast.training.tokens import load_tokens, write_index, write_shard

GRIDS, NUM_CODES = [(2, 2), (4, 4)], 6
SIZES = ["--depth=1", "--heads=2", "--width=16", "--device=cpu", "--batch_size=8", "--log_every=9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    small = {"width": 8, "code_dim": 4, "num_residual_blocks": 1, "num_codes": NUM_CODES}
    vq = models.from_preset("tiny", resolution=16, latents=(2, 4), **small)
    for quantizer in vq.quantizers:
        quantizer.codebook.normal_()
    vq.save_pretrained(folder)
    return folder


@pytest.fixture
def classed(pictures: Path, tmp_path: Path) -> Path:
    """The pictures for training in folders 10, 9 and cat, one of them broken."""
    root = tmp_path / "classed"
    for number, path in enumerate(sorted((pictures / "train").iterdir())):
        folder = root / ("10", "9", "cat")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)
    (root / "9" / "0.png").write_bytes(b"no image")
    return root


def tokenize(model: Path, data: Path, out: Path, *options: str) -> int:
    places = [f"--checkpoint={model}", f"--data={data}", f"--out={out}", "--split=all"]
    return main(["tokenize", *places, "--device=cpu", "--shard_size=3", *options])


@pytest.mark.parametrize("crop", [["--crop=tiles", "--size=8"], ["--crop=random", "--repeat=3"]])
def test_tokens_have_the_classes_of_their_images(
    model: Path, classed: Path, tmp_path: Path, crop: list[str]
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert tokenize(model, classed, plain, *crop) == 0
    assert tokenize(model, classed, out, "--labels", *crop) == 0
    tokens, without = load_tokens(out), load_tokens(plain)
    assert tokens.classes == ("cat", "9", "10")  # numbers by value
    assert tokens.labels is not None and tokens.labels.dtype == torch.int64
    assert [name.split("/")[0] for name in tokens.names()] == [
        tokens.classes[n] for n in tokens.labels
    ]
    assert len(set(tokens.labels.tolist())) == 3 and len(tokens.index["skipped"]) == 1
    assert without.classes == () and without.labels is None
    assert all(map(torch.equal, tokens.codes, without.codes))


def test_other_classes_are_other_tokens(
    model: Path, classed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert tokenize(model, classed, out) == 0
    assert tokenize(model, classed, out, "--labels") == 2
    assert "labels_sha256 is None there" in capsys.readouterr().err
    shutil.rmtree(out)
    assert tokenize(model, classed, out, "--labels") == 0
    assert tokenize(model, classed, out, "--labels") == 0
    assert tokenize(model, classed, out) == 2
    assert "labels_sha256" in capsys.readouterr().err
    (classed / "stray.png").write_bytes((classed / "cat" / "2.png").read_bytes())
    assert tokenize(model, classed, tmp_path / "new", "--labels") == 2
    assert "has no class for 'stray.png'" in capsys.readouterr().err


def write_tokens(folder: Path, classes: list[str] | None, labels: list[int]) -> Path:
    """Every image of class n is n + 1 everywhere on scale 0 and 5 - n on scale 1."""
    folder.mkdir(parents=True)
    one = torch.ones(len(labels), 1, 1, dtype=torch.int64)
    number = torch.tensor(labels).reshape(-1, 1, 1)
    codes = [(number + 1).expand(-1, 2, 2), (5 * one - number).expand(-1, 4, 4)]
    own = None if classes is None else labels
    index: dict[str, Any] = {
        "num_codes": NUM_CODES,
        "grids": GRIDS,
        "files": 1,
        "files_done": 1,
        "complete": True,
        "shards": [write_shard(folder, 0, list(map(str, labels)), codes, own)],
        "settings": {"weights_sha256": "a", "size": 16},
    }
    write_index(folder, index if classes is None else {**index, "classes": classes})
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    write_tokens(root / "none", None, [0, 1, 2] * 8)
    return write_tokens(root / "train", ["a", "b, b", "c"], [0, 1, 2] * 8).parent


def train(tokens: Path, out: Path, *options: str) -> int:
    return main(["train-prior", f"--tokens={tokens / 'train'}", f"--out={out}", *SIZES, *options])


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_a_prior_learns_the_classes_and_draws_them(
    model: Path, tokens: Path, tmp_path: Path, kind: str
) -> None:
    held_out = tmp_path / "held_out"
    # Only some of the classes, under other numbers.
    write_tokens(held_out, None, [2, 0])
    stored = load_tokens(held_out)
    shard = write_shard(held_out, 0, ["2", "0"], [c.long() for c in stored.codes], [0, 1])
    write_index(held_out, {**stored.index, "shards": [shard], "classes": ["c", "a"]})
    run = tmp_path / "run"
    settings = ("--lr=3e-2", "--steps=60", "--dropout=0", "--label_smoothing=0")
    settings += ("--validate_every=50",)
    assert train(tokens, run, f"--kind={kind}", f"--validation={held_out}", *settings) == 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "validation"
    if kind == "autoregressive":  # of masked codes what is seen says the rest
        assert max(last["nll"]) < 0.2

    prior = priors.from_pretrained(find_model(run)).eval()
    assert prior.config.num_classes == 3
    labels = torch.tensor([0, 1, 2] * 4)
    drawn = priors.sample(prior, 12, labels=labels)
    wanted = (labels + 1, 5 - labels)
    share = [(g == w[:, None, None]).float().mean() for g, w in zip(drawn, wanted, strict=True)]
    assert min(share) > 0.9
    free = priors.sample(prior, 12)[0]  # "no label" was learnt too
    assert len(free[:, 0, 0].unique()) > 1 and bool(
        ((free >= 1) & (free <= 3)).float().mean() > 0.9
    )

    out = tmp_path / "grid.png"
    places = [f"--prior={run}", f"--checkpoint={model}", f"--out={out}", "--device=cpu"]
    # Codes of another model: what they decode to does not matter here.
    state = find_model(run) / "state.json"
    state.write_text(state.read_text().replace('"weights_sha256": "a"', '"weights_sha256": null'))
    options = ["--images=5", '--labels=["c","b, b"]', "--batch_size=2", "--reject=keep=3"]
    options += ["--guidance=1"] if kind == "maskgit" else []
    assert main(["sample", *places, *options]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["labels"] == [("c", "b, b")[i % 2] for i in record["kept"]]
    # Coarse images of their class are nearly certain, given the class.
    assert min(record["scores"][i] for i in record["kept"]) > -0.5


def test_every_batch_is_of_the_classes_of_its_images(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_codes": NUM_CODES, "depth": 1, "heads": 2, "width": 16}
    prior = MaskGITPrior(PriorConfig(tuple(GRIDS), num_classes=3, **sizes))
    prior.save_pretrained(tmp_path / "prior")
    asked, scored = [], []
    draw, score = priors.sample, sample.coarse_scores

    def note_draw(*arguments: Any, first: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        asked.append((first % 2**32, options["labels"]))
        return draw(*arguments, first=first, **options)

    def note_score(
        prior: MaskGITPrior, codes: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        scored.append(labels)
        return score(prior, codes, labels)

    monkeypatch.setattr(priors, "sample", note_draw)
    monkeypatch.setattr(sample, "coarse_scores", note_score)
    places = [f"--prior={tmp_path / 'prior'}", f"--checkpoint={model}", "--device=cpu"]
    options = ['--labels=["2","0"]', "--images=5", "--batch_size=3", "--reject=keep=3"]
    out = f"--out={tmp_path / 'grid.png'}"
    assert main(["sample", *places, *options, "--variations=2", out]) == 0
    numbers, labels = (torch.cat(parts) for parts in zip(*asked, strict=True))
    assert len(numbers) == 5 + 2 * 3 and torch.equal(labels, 2 * (numbers % 2 == 0))
    assert torch.cat(scored).tolist() == [2, 0, 2, 0, 2]


def test_dropped_labels_follow_from_the_step(tokens: Path, tmp_path: Path) -> None:
    settings = ("--label_dropout=0.5", "--warmup_epochs=0", "--min_lr_fraction=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(tokens, whole, *settings, "--steps=9") == 0
    assert train(tokens, parts, *settings, "--steps=4") == 0
    assert train(tokens, parts, "--label_dropout=0.4", "--steps=9", "--resume=auto") == 2
    assert train(tokens, parts, *settings, "--steps=9", "--resume=auto") == 0
    ours, theirs = (load_file(checkpoint_path(p, 9) / "model.safetensors") for p in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    never = tmp_path / "never"
    assert train(tokens, never, "--label_dropout=0", *settings[1:], "--steps=9") == 0
    other = load_file(checkpoint_path(never, 9) / "model.safetensors")
    none = "scales.0.labels.weight"  # the row of "no label" alone is decayed, never learnt
    assert not torch.equal(other[none][3], theirs[none][3])


def test_a_checkpoint_from_before_the_option_resumes(tokens: Path, tmp_path: Path) -> None:
    assert train(tokens, tmp_path, "--steps=2") == 0
    path = checkpoint_path(tmp_path, 2) / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["label_dropout"]
    path.write_text(json.dumps(state))
    assert train(tokens, tmp_path, "--steps=3", "--resume=auto", "--label_dropout=0.2") == 2
    assert train(tokens, tmp_path, "--steps=3", "--resume=auto") == 0


def test_classes_that_do_not_fit(
    model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error() -> str:
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    other = write_tokens(tmp_path / "other", ["a", "d"], [0, 1])
    assert train(tokens, tmp_path / "run", f"--validation={other}") == 2
    assert "has 2 classes; expected those of the tokens, 3 classes, 'd' not among them" in error()
    none = tokens / "none"
    assert train(tokens, tmp_path / "run", f"--validation={none}") == 2
    assert "has no classes; expected those of the tokens, 3 classes" in error()
    assert not (tmp_path / "run").exists()

    sizes = {"num_codes": NUM_CODES, "depth": 1, "heads": 2, "width": 16}
    shape = tuple(GRIDS)
    MaskGITPrior(PriorConfig(shape, num_classes=12, **sizes)).save_pretrained(tmp_path / "twelve")
    AutoregressivePrior(PriorConfig(shape, **sizes)).save_pretrained(tmp_path / "zero")

    def sample(prior: str, *options: str) -> int:
        places = [f"--prior={tmp_path / prior}", f"--checkpoint={model}", "--device=cpu"]
        return main(["sample", *places, f"--out={tmp_path / 'grid.png'}", *options])

    assert sample("twelve", '--labels=["11","12"]') == 2
    assert "learnt no class '12'; expected one of its 12 classes, 0, 1, 2" in error()
    assert sample("zero", '--labels=["0"]') == 2
    assert "learnt no class '0'; expected null" in error()
    assert sample("twelve", "--guidance=2") == 2
    assert "guidance=2.0 without labels" in error()
    assert sample("zero", '--labels=["0"]', "--guidance=2") == 2
    assert "guidance=2.0 is of maskgit" in error()
    assert not (tmp_path / "grid.png").exists()
    for labels in ('["11"]', "[11]"):  # YAML's numbers are the names
        assert sample("twelve", f"--labels={labels}", "--images=2") == 0
        record = json.loads((tmp_path / "grid.json").read_text())
        assert record["labels"] == ["11", "11"]


def test_labels_take_the_numbers_of_other_classes(tokens: Path) -> None:
    loaded = load_tokens(tokens / "train")
    assert loaded.numbered_as(["c", "x", "b, b", "a"]).labels[:3].tolist() == [3, 2, 0]
    plain = load_tokens(tokens / "none")
    assert plain.numbered_as(()) is plain
