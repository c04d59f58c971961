from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from msvq_fast import models, priors
from msvq_fast.cli import main
from msvq_fast.data import read_image, resize_short_side, signed_to_uint8, to_float, to_uint8
from msvq_fast.ops import InputError
from msvq_fast.priors import AutoregressivePrior, MaskGITPrior, PriorConfig
from msvq_fast.training import sample
from msvq_fast.training.prior_config import SampleConfig
from msvq_fast.training.sample import coarse_scores

NUM_CODES = 6
SIZES = {"num_codes": NUM_CODES, "depth": 1, "heads": 2, "width": 16}
GRIDS = ((2, 2), (4, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    small = {"width": 8, "code_dim": 4, "num_residual_blocks": 1, "num_codes": NUM_CODES}
    model = models.from_preset("tiny", resolution=16, latents=(2, 4), **small)
    for quantizer in model.quantizers:
        quantizer.codebook.normal_()
    model.save_pretrained(root / "model")
    AutoregressivePrior(PriorConfig(GRIDS, **SIZES)).save_pretrained(root / "autoregressive")
    MaskGITPrior(PriorConfig(GRIDS, kernels=(3, 5), **SIZES)).save_pretrained(root / "maskgit")
    other = PriorConfig(((2, 2), (6, 6)), **SIZES)
    MaskGITPrior(other).save_pretrained(root / "other")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is handed to save_png, which still writes the file."""
    calls: dict[str, Any] = {}

    def spy(path: Path, rows: Any, **labels: Any) -> None:
        calls.update(rows=rows, **labels)
        real(path, rows, **labels)

    real = sample.save_png
    monkeypatch.setattr(sample, "save_png", spy)
    return calls


def run(folders: dict[str, Path], out: Path, kind: str, *options: str) -> int:
    places = [f"--prior={folders[kind]}", f"--checkpoint={folders['model']}", f"--out={out}"]
    return main(["sample", *places, "--device=cpu", *options])


def load(folders: dict[str, Path], kind: str) -> tuple[Any, Any]:
    model = models.from_pretrained(folders["model"]).eval()
    return model, priors.from_pretrained(folders[kind]).eval()


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_the_grid_is_contributions_above_their_sum(
    folders: dict[str, Path], tmp_path: Path, grid: dict[str, Any], kind: str
) -> None:
    out = tmp_path / "new" / "grid.png"
    assert run(folders, out, kind, "--images=3", "--seed=5", "--batch_size=2") == 0
    model, prior = load(folders, kind)
    codes = priors.sample(prior, 3, seed=5)
    with torch.no_grad():
        images, (c_0, c_1) = to_uint8(model.decode(codes)), model.contributions(codes)
    assert grid["row_labels"][1].endswith("x 4")
    parts = (to_uint8(c_0), signed_to_uint8(c_1, 4), images)
    # Batches of another size round the convolutions otherwise.
    for shown, expected in zip(grid["rows"], parts, strict=True):
        difference = torch.stack(shown).int() - expected.int()
        assert difference.abs().max() <= 1
    assert grid["row_labels"][::2] == ["contribution 0", "image"]
    assert out.is_file()
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["images_per_second"] > 0 and len(record["scores"]) == 3


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_rejection_keeps_the_most_likely_coarse_images(
    folders: dict[str, Path], tmp_path: Path, grid: dict[str, Any], kind: str
) -> None:
    out = tmp_path / "grid.png"
    options = ("--images=7", "--reject=keep=2", "--variations=3", "--batch_size=4")
    assert run(folders, out, kind, *options) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    _, prior = load(folders, kind)
    coarse = priors.sample(prior, 7, upto=0)[0]
    scores = coarse_scores(prior, coarse).tolist()
    assert record["scores"] == pytest.approx(scores)
    assert record["kept"] == sorted(range(7), key=lambda i: -scores[i])[:2]
    rows = grid["rows"]
    assert [len(row) for row in rows] == [3] * 6
    for first in (0, 3):  # contribution 0 is the same, details are not
        assert all(torch.equal(rows[first][0], picture) for picture in rows[first])
        assert not torch.equal(rows[first + 1][0], rows[first + 1][1])
    assert grid["row_labels"][2] == f"image {record['kept'][0]}"


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_variations_depend_on_the_image_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    decoded: list[torch.Tensor] = []

    def spy(model: Any, codes: list[torch.Tensor]) -> list[torch.Tensor]:
        decoded.append(codes[1])
        return real(model, codes)

    def numbered(*arguments: Any, **options: Any) -> list[torch.Tensor]:
        if "coarser" in options:
            numbers.append(options["first"])
        return draw(*arguments, **options)

    real, draw = sample._decode, priors.sample
    numbers: list[torch.Tensor] = []
    monkeypatch.setattr(sample, "_decode", spy)
    monkeypatch.setattr(priors, "sample", numbered)
    _, prior = load(folders, kind)
    plain, seen = priors.sample(prior, 9)[1], {}
    for options in (
        ("--images=7", "--reject=keep=2", "--variations=3", "--batch_size=4"),
        ("--images=7", "--reject=keep=5", "--variations=2", "--batch_size=3"),
        ("--images=9", "--variations=3"),
    ):
        decoded.clear()
        assert run(folders, tmp_path / "grid.png", kind, *options) == 0
        kept = json.loads((tmp_path / "grid.json").read_text())["kept"]
        for v, codes in enumerate(torch.cat(decoded).split(len(kept))):
            for image, drawn in zip(kept, codes, strict=True):
                assert torch.equal(drawn, seen.setdefault((image, v), drawn))
    assert len(seen) == 9 * 3
    assert len(torch.cat(numbers).unique()) == 9 * 3  # no image's variation is drawn as another's
    for image in range(9):
        assert torch.equal(seen[image, 0], plain[image])
        assert not torch.equal(seen[image, 1], seen[image, 2])


def test_a_prior_of_another_models_codes_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior, grid = tmp_path / "prior", tmp_path / "grid.png"
    shutil.copytree(folders["maskgit"], prior)
    for digest, code in ((models.weights_digest(folders["model"]), 0), ("ab", 2)):
        learnt = {"step": 1, "config": {}, "model_config": {"weights_sha256": digest}, "files": {}}
        (prior / "state.json").write_text(json.dumps(learnt))
        assert run({**folders, "maskgit": prior}, grid, "maskgit", "--images=1") == code
    assert f"{prior} learnt codes of another model than" in capsys.readouterr().err


def test_the_hole_has_the_cells_whose_centres_it_holds() -> None:
    config = SampleConfig(prior="", checkpoint="", region=(0.1, 0.3, 0.6, 0.9))
    hole = sample._hole(config, 4, 4)
    assert hole.nonzero().tolist() == [[y, x] for y in (0, 1) for x in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_settings_reach_the_draws(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    settings = {"temperature": 0.5, "top_k": 3, "top_p": 0.75}
    if kind == "maskgit":
        settings |= {"steps": 2, "choice_temperature": 1.5, "order": "halton"}
    calls, draw = [], priors.sample

    def spy(*args: Any, **options: Any) -> list[torch.Tensor]:
        calls.append((options["seed"], options["settings"]))
        return draw(*args, **options)

    monkeypatch.setattr(priors, "sample", spy)
    options = [f"--{name}={value}" for name, value in {**settings, "seed": 3}.items()]
    assert run(folders, tmp_path / "grid.png", kind, "--images=2", *options) == 0
    assert calls == [(3, settings)] * 2  # coarse, then the rest


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_codes_that_cannot_be_scored(folders: dict[str, Path], kind: str) -> None:
    _, prior = load(folders, kind)
    for codes, message in (
        (torch.zeros(1, 2, 2, dtype=torch.int32), r"codes\[0\] is torch.int32"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"expected int64 \(1, 2, 2\)"),
        (torch.full((1, 2, 2), NUM_CODES), r"codes\[0\] spans \[6, 6\]; expected codes of 0 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            coarse_scores(prior, codes)


def test_scores_are_log_probabilities(folders: dict[str, Path]) -> None:
    _, prior = load(folders, "autoregressive")
    # All grids together have probability one.
    cells = torch.cartesian_prod(*[torch.arange(NUM_CODES)] * 4).unflatten(1, (2, 2))
    assert float((4 * coarse_scores(prior, cells)).exp().sum()) == pytest.approx(1, rel=1e-5)
    _, prior = load(folders, "maskgit")
    codes = torch.randint(NUM_CODES, (3, 2, 2))
    model, expected = prior.scale_model(0), torch.zeros(3, dtype=torch.float64)
    for cell in range(4):  # as many cells as groups: each given all others
        masked = codes.flatten(1).clone()
        masked[:, cell] = NUM_CODES
        logits = model(model.embed(masked), model.context([])).detach().double()
        expected += logits.log_softmax(-1)[torch.arange(3), cell, codes.flatten(1)[:, cell]] / 4
    assert torch.allclose(coarse_scores(prior, codes), expected)


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_inpainting_keeps_the_codes_outside(
    folders: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    grid: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    drawn = []

    def spy(model: Any, codes: list[torch.Tensor]) -> list[torch.Tensor]:
        drawn.append(codes)
        return real(model, codes)

    real = sample._decode
    monkeypatch.setattr(sample, "_decode", spy)
    path = pictures / "train" / "3.png"
    options = (f"--inpaint={path}", "--region=[0,0.5,1,1]", "--images=4", "--temperature=5")
    assert run(folders, path, "maskgit", *options) == 2  # would replace it
    assert run(folders, tmp_path / "grid.png", kind, *options) == 0
    model, _ = load(folders, kind)
    image = resize_short_side(read_image(path), 16)
    left = (image.shape[2] - 16) // 2
    image = image[:, :, left : left + 16]
    for mine, given in zip(drawn[0], model.encode(to_float(image)[None]), strict=True):
        half = mine.shape[2] // 2
        assert torch.equal(mine[:, :, :half], given[:, :, :half].expand(4, -1, -1))
        assert not torch.equal(mine[:, :, half:], given[:, :, half:].expand(4, -1, -1))
    shown = grid["rows"][2][0]
    assert torch.equal(shown[:, :, :8], image[:, :, :8]) and bool((shown[:, :, 8:] == 128).all())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("maskgit", ["--images=0"], "images=0; expected at least 1"),
        ("maskgit", ["--variations=0"], "variations=0; expected at least 1"),
        ("maskgit", ["--reject=3"], "reject='3'; expected keep=1 to keep=8"),
        ("maskgit", ["--reject=keep=9"], "reject='keep=9'; expected keep=1 to keep=8"),
        ("maskgit", ["--region=[0.5,0,0.2,1]"], "expected top < bottom"),
        ("maskgit", ["--region=[0.5,0,1,1]"], "region=(0.5, 0.0, 1.0, 1.0) without inpaint"),
        ("maskgit", ["--inpaint=nowhere.png"], "cannot read image 'nowhere.png'"),
        ("maskgit", ["--temperature=-1"], "temperature=-1.0; expected at least 0"),
        ("maskgit", ["--steps=0"], "steps=0; expected at least 1"),
        ("maskgit", ["--out=grid.json"], "out='grid.json'; expected a name that ends with .png"),
        ("autoregressive", ["--steps=3"], "steps=3 is of maskgit"),
        ("autoregressive", ["--top_p=2"], "top_p=2.0; expected 0 < top_p <= 1"),
        ("other", [], "draws grids ((2, 2), (6, 6)) of 6 codes"),
        ("model", [], "holds a 'MSVQVAE'; expected one of AutoregressivePrior"),
        ("maskgit", ["--checkpoint=nowhere"], "nowhere does not exist"),
        ("maskgit", ["--prior=nowhere"], "nowhere does not exist"),
    ],
)
def test_settings_that_cannot_work(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    options: list[str],
    message: str,
) -> None:
    assert run(folders, tmp_path / "grid.png", kind, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "grid.png").exists()


def test_one_scale_has_no_variations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"width": 8, "code_dim": 4, "num_residual_blocks": 1, "num_codes": NUM_CODES}
    model = models.from_preset("tiny", resolution=16, latents=(4,), **small)
    model.save_pretrained(tmp_path / "model")
    MaskGITPrior(PriorConfig(((4, 4),), **SIZES)).save_pretrained(tmp_path / "maskgit")
    folders = {name: tmp_path / name for name in ("model", "maskgit")}
    assert run(folders, tmp_path / "grid.png", "maskgit", "--variations=3") == 2
    assert "variations=3; expected 1: this prior has one scale" in capsys.readouterr().err
    assert run(folders, tmp_path / "grid.png", "maskgit", "--images=2") == 0


def test_several_processes_are_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(folders, tmp_path / "grid.png", "maskgit") == 2
    error = capsys.readouterr().err
    assert error == "msvq: error: sample runs in one process; start it without torchrun\n"
    assert not (tmp_path / "grid.png").exists()
