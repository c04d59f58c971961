from __future__ import annotations

import dataclasses
import io
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

from msvq_fast.cli import main
from msvq_fast.ops import InputError
from msvq_fast.training import compare, compare_figures
from msvq_fast.training.checkpoint import find_model
from msvq_fast.training.compare_config import CompareConfig
from msvq_fast.training.compare_figures import PICTURES, _half_power, _most_detailed, _psnr, _View
from msvq_fast.training.compare_report import describe, headings, print_comparison, rows, summarize
from msvq_fast.training.paper import PAPER_RESULTS
from msvq_fast.training.progress import MetricsFile
from msvq_fast.training.window import TrainingError
from tests.training.test_evaluate import Terminal


def config(pictures: Path, out: Path, /, **changes) -> CompareConfig:
    options = {
        "data": str(pictures),
        "out": str(out),
        "seeds": (0, 1),
        "width_scale": 1 / 16,
        "resolution": 16,
        "steps": 2,
        "batch_size": 4,
        "betas": (0.5, 0.9),
        "workers": 0,
        "device": "cpu",
    }
    return CompareConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    torch.set_num_threads(1)
    assert compare.run_compare(config(pictures, out)) == 0
    return out


def test_every_run_and_the_report_are_there(done):
    runs = sorted(path.name for path in (done / "runs").iterdir())
    names = ("imagenet256-s", "vqvae2-imagenet256-s")
    assert runs == [f"{name}-seed{seed}" for name in names for seed in (0, 1)]
    for name in PICTURES:
        assert (done / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads((done / "comparison.json").read_text())
    assert [(r["preset"], r["seed"]) for r in record["runs"]] == [
        (f"{model}imagenet256-s", seed) for seed in (0, 1) for model in ("vqvae2-", "")
    ]
    assert record["latents"] == [2, 4] and record["images"] > 0
    assert record["paper"]["msvqvae"]["psnr"] == 32.95
    assert set(record["half_power_cycles"]) >= {"image", "MS-VQVAE C_0", "VQ-VAE 2"}
    figures = record["models"]["msvqvae"]["figures"]
    values = [r["reconstructions"][-1]["mse"] for r in record["runs"] if r["model"] == "MSVQVAE"]
    assert figures["mse"]["values"] == values and values[0] != values[1]
    assert figures["lpips"] is None
    table = (done / "table.txt").read_text()
    assert table.count("paper") == 2 and "VQ-VAE 2" in table and "32.95" in table


def test_both_models_are_trained_alike(done):
    runs = {
        name: json.loads((done / "runs" / f"{name}-seed1" / "config.json").read_text())
        for name in ("imagenet256-s", "vqvae2-imagenet256-s")
    }
    ours, base = runs.values()
    different = {key for key in ours if ours[key] != base[key]}
    assert different == {"preset", "out"}
    assert ours["seed"] == 1 and ours["model"]["width"] == 8 and ours["validate_every"] == 0


def test_finished_runs_are_not_run_again(done, pictures, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_train", lambda config: pytest.fail("trained again"))
    before = (done / "comparison.json").read_text()
    drawn, draw = [], compare.draw_comparison

    def note(folders, *rest, **options):
        drawn.extend(folder.parent.parent.name for folder in folders.values())
        return draw(folders, *rest, **options)

    monkeypatch.setattr(compare, "draw_comparison", note)
    assert compare.run_compare(config(pictures, done)) == 0
    assert drawn == ["vqvae2-imagenet256-s-seed0", "imagenet256-s-seed0"]
    assert capsys.readouterr().out.count("finished before") == 4
    assert (done / "comparison.json").read_text() == before


def test_a_lost_evaluation_is_made_again_from_the_trained_model(done, pictures, tmp_path):
    shutil.copytree(done, tmp_path / "copy")
    result = tmp_path / "copy" / "runs" / "imagenet256-s-seed0" / "evaluation" / "results.json"
    before = json.loads(result.read_text())
    result.unlink()
    assert compare.run_compare(config(pictures, tmp_path / "copy")) == 0
    after = json.loads(result.read_text())
    assert after["reconstructions"] == before["reconstructions"]
    assert after["codebooks"] == before["codebooks"]


def test_another_comparison_in_the_same_folder_is_refused(done, pictures, tmp_path):
    before = (done / "settings.json").read_text()
    with pytest.raises(InputError, match="holds another comparison: steps is 2 there and 3 here"):
        compare.run_compare(config(pictures, done, steps=3))
    assert (done / "settings.json").read_text() == before
    shutil.copytree(done, tmp_path / "copy")
    for run in (tmp_path / "copy" / "runs").iterdir():
        shutil.rmtree(run / "checkpoints")  # for their room; the figures are still there
    with pytest.raises(InputError, match="holds another comparison"):
        compare.run_compare(config(pictures, tmp_path / "copy", steps=3))


def test_settings_reach_training_and_evaluation():
    given = CompareConfig(
        data="data",
        epochs=4,
        steps=5,
        batch_size=3,
        accumulate=2,
        lr=1e-3,
        betas=(0.1, 0.2),
        schedule="constant",
        resize=300,
        precision="bf16",
        channels_last="on",
        workers=7,
        log_every=9,
        device="cpu",
        lpips_weights="lpips.pth",
        extractor="efflite0",
        inception_weights="inception.pth",
        efflite0_weights="eff.pth",
        force_fd=True,
    )
    own = {field.name for field in dataclasses.fields(given)} - {"preset", "out"}
    training = given.training("imagenet256-s", 6, "run")
    evaluation = given.evaluation("run", "figures")
    reached = set()
    for part, others in ((training, {"lpips_weights"}), (evaluation, {"batch_size"})):
        shared = own & {field.name for field in dataclasses.fields(part)} - others
        assert {n: getattr(part, n) for n in shared} == {n: getattr(given, n) for n in shared}
        reached |= shared
    of_models = {"width_scale", "resolution", "codebook_init", "restart_below", "gradient"}
    assert own - reached == {*of_models, "seeds", "pictures"}
    assert training.seed == 6 and evaluation.checkpoint == "run"


def test_a_first_try_that_failed_may_be_corrected(pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def failing(training):
        Path(training.out).mkdir(parents=True)
        MetricsFile(Path(training.out), step=0, tensorboard=False).close()
        raise TrainingError("the loss is no longer finite")

    monkeypatch.setattr(compare, "run_train", failing)
    with pytest.raises(TrainingError):
        compare.run_compare(config(pictures, out, lr=1e30))
    first = MetricsFile(out / "runs" / "vqvae2-imagenet256-s-seed0", step=0, tensorboard=False)
    monkeypatch.setattr(compare, "run_train", lambda config: 130)
    with pytest.raises(InputError, match="holds another comparison"):  # it runs
        compare.run_compare(config(pictures, out))
    first.close()
    assert compare.run_compare(config(pictures, out)) == 130
    assert json.loads((out / "settings.json").read_text())["lr"] is None


def test_black_images_have_no_power(pictures, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(pictures / "train", data / "train")
    (data / "val").mkdir()
    Image.new("RGB", (24, 24)).save(data / "val" / "black.png")
    assert compare.run_compare(config(data, out, seeds=(0,), steps=1)) == 0
    assert json.loads((out / "comparison.json").read_text())["half_power_cycles"]["image"] is None


def test_figures_are_written_before_pictures_are_drawn(done, pictures, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    before = json.loads((out / "comparison.json").read_text())
    for name in ("comparison.json", "table.txt"):
        (out / name).unlink()
    monkeypatch.setattr(compare, "draw_comparison", lambda *a, **o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare.run_compare(config(pictures, out))
    after = json.loads((out / "comparison.json").read_text())
    assert after == {**before, "half_power_cycles": {}}
    assert (out / "table.txt").read_text() == (done / "table.txt").read_text()


def test_a_stopped_training_stops_the_comparison(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_train", lambda config: 130)
    assert compare.run_compare(config(pictures, tmp_path / "out")) == 130
    assert not (tmp_path / "out" / "comparison.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, r"seeds=\[\]; expected at least one"),
        ({"seeds": (1, 1)}, "each once"),
        ({"width_scale": 0.0}, r"width_scale=0\.0; expected a positive"),
        ({"width_scale": float("inf")}, r"width_scale=inf; expected a positive finite"),
        ({"lr": float("nan")}, "lr=nan; expected a positive finite number"),
        ({"data": "nowhere"}, "data folder 'nowhere' does not exist"),
        ({"pictures": "nowhere"}, "data folder 'nowhere' does not exist"),
        ({"lpips_weights": "nowhere"}, "nowhere"),
        ({"preset": "vqvae2-imagenet256-s"}, "expected a preset of MS-VQVAE"),
        ({"preset": "imagenet"}, "preset 'imagenet' is unknown"),
        ({"resolution": 100}, "resolution=100; expected a multiple of 8, the pixels"),
        ({"resolution": 0}, "resolution=0; expected a multiple of 8"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(change, message, pictures, tmp_path):
    with pytest.raises(InputError, match=message):
        compare.run_compare(config(pictures, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def draw(done: Path, data: Path, out: Path, *, size: int) -> None:
    names = {"vqvae2": "vqvae2-imagenet256-s-seed0", "msvqvae": "imagenet256-s-seed0"}
    folders = {key: find_model(str(done / "runs" / name)) for key, name in names.items()}
    compare.draw_comparison(folders, out, data=str(data), size=size, resize=None)


def test_held_out_tiles_are_in_memory_one_at_a_time(done, pictures, tmp_path, monkeypatch):
    before, read = [], compare_figures.evaluation_tiles

    def reading(*args, **options):
        for name, tile in read(*args, **options):
            assert sum(old() is not None for old in before) <= 1
            before.append(weakref.ref(tile))
            yield name, tile

    monkeypatch.setattr(compare_figures, "evaluation_tiles", reading)
    draw(done, pictures, tmp_path, size=8)
    assert len(before) > 2


def test_held_out_images_that_cannot_be_read_are_named(done, pictures, tmp_path, capsys):
    shutil.copytree(pictures / "val", tmp_path / "data/val")
    (tmp_path / "data/train").mkdir()
    (tmp_path / "data/val/text.png").write_text("no image")
    draw(done, tmp_path / "data", tmp_path, size=16)
    assert capsys.readouterr().out.count("skipped: cannot read image") == 1


def test_several_processes_are_sent_elsewhere(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start several with other seeds"):
        compare.run_compare(config(pictures, tmp_path / "out"))


def test_command_line_has_it(capsys):
    assert main(["compare", "--help"]) == 0
    assert "--width_scale" in capsys.readouterr().out


def result(mse: float, usage: float, kid: float | None = None, fd: float | None = None) -> dict:
    book = {"usage": usage, "perplexity": 2 * usage}
    sets = {"fd": fd, "kid": kid, "suffix": "-EffLite0"}
    quality = {"mse": mse, "ssim": 0.5, "lpips": None, "psnr": 20.0}
    return {
        "parameters": 1_000_000,
        "usage": usage,
        "perplexity": 2 * usage,
        "images": 3,
        "model_config": {"latents": [32, 64]},
        "codebooks": [book, {key: value / 2 for key, value in book.items()}],
        "reconstructions": [quality],
        "reconstructed_set": None if kid is None else sets,
    }


def summary(ours: list[float], base: list[float], kid: float | None = None) -> dict:
    results = {}
    for seed, (a, b) in enumerate(zip(ours, base, strict=True)):
        results["vqvae2-imagenet256-s", seed] = result(b, 50.0, kid)
        results["imagenet256-s", seed] = result(a, 60.0, kid)
    return summarize("imagenet256-s", results)


@pytest.mark.parametrize(
    ("ours", "base", "here", "verdict"),
    [
        ([0.010, 0.012], [0.014, 0.016], "better", "agrees"),
        ([0.014, 0.016], [0.010, 0.012], "worse", "differs"),
        ([0.010, 0.015], [0.014, 0.016], "not clearly different", "undecided"),
    ],
)
def test_a_direction_needs_seeds_that_do_not_overlap(ours, base, here, verdict):
    found = summary(ours, base)
    assert found["directions"]["mse"] == {"paper": "better", "here": here, "verdict": verdict}
    assert any(line.endswith(f"{here}: {verdict}") for line in describe(found))
    assert found["directions"]["perplexity"]["verdict"] == "differs"  # the paper's is lower
    assert "kid" not in found["directions"] and "lpips" not in found["directions"]


def test_nothing_is_decided_where_the_paper_sees_no_difference():
    results = {}
    for seed in (0, 1):
        # Too few images for a Fréchet distance in one run: the others' mean is not theirs.
        results["vqvae2-imagenet256-s", seed] = result(0.01, 50.0, kid=0.05, fd=seed or None)
        results["imagenet256-s", seed] = result(0.01, 50.0, kid=0.05, fd=3.0)
        results["imagenet256-s", seed]["reconstructions"][0]["ssim"] = 0.6
    found = summarize("imagenet256-s", results)
    equal = {"paper": "equal", "here": "better", "verdict": "undecided"}
    assert found["directions"]["ssim"] == equal
    assert found["models"]["vqvae2"]["figures"]["fd"] is None
    assert found["models"]["msvqvae"]["figures"]["fd"]["mean"] == 3.0


def test_rows_are_means_and_spreads_beside_the_paper():
    found = summary([0.010, 0.012], [0.014, 0.016], kid=0.05)
    assert headings(found)[-1] == "rKID-EffLite0 e-3"
    table = dict(rows(found))
    assert list(table) == ["VQ-VAE 2", "VQ-VAE 2, paper", "MS-VQVAE", "MS-VQVAE, paper"]
    cells = dict(zip(headings(found), table["MS-VQVAE"], strict=True))
    assert cells["MSE e-3"] == "11.00 ± 1.41"
    assert cells["CB usage %"] == "60-30 (60 ± 0)"
    assert cells["rKID-EffLite0 e-3"] == "50.0 ± 0.0"
    paper = dict(zip(headings(found), table["VQ-VAE 2, paper"], strict=True))
    assert paper["perplexity"] == "273-380 (327)"
    assert (paper["MSE e-3"], paper["rKID-EffLite0 e-3"]) == ("0.59", "-")
    file = io.StringIO()
    print_comparison(found, file)
    assert "2 seeds, 3 held-out tiles" in file.getvalue()
    assert "± is the standard deviation" in file.getvalue()


def test_no_figure_is_cut_off_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    found, file = summary([0.010, 0.012], [0.014, 0.016], kid=0.05), Terminal()
    print_comparison(found, file)
    assert "…" not in file.getvalue()
    cells = [cell for _, row in rows(found) for cell in row]
    assert all(cell in file.getvalue() for cell in cells)


@pytest.mark.parametrize("suffix", ["", "-EffLite0"])
def test_the_papers_fid_stands_beside_a_fid_alone(suffix):
    results = {("vqvae2-imagenet256-s", 0): result(0.01, 50.0, kid=0.05, fd=3.0)}
    results["imagenet256-s", 0] = result(0.01, 50.0, kid=0.05, fd=2.0)
    for run in results.values():
        run["reconstructed_set"]["suffix"] = suffix
    found = summarize("imagenet256-s", results)
    paper = dict(zip(headings(found), dict(rows(found))["MS-VQVAE, paper"], strict=True))
    file = io.StringIO()
    print_comparison(found, file)
    assert "1 seed, " in file.getvalue() and "±" not in file.getvalue()
    printed = f"{PAPER_RESULTS['imagenet256-s'].rfid:.2f}"
    if suffix:
        assert paper["rFD-EffLite0"] == "-" and "fd" not in found["directions"]
        assert not any("FID" in line for line in describe(found)) and printed not in file.getvalue()
    else:
        assert paper["rFID"] == printed and found["directions"]["fd"]["here"] == "better"
        assert printed in file.getvalue()


def test_one_seed_has_no_spread_and_foreign_presets_no_paper():
    results = {("vqvae2-tiny", 0): result(0.1, 9.0), ("tiny", 0): result(0.2, 9.0)}
    found = summarize("tiny", results)
    assert found["models"]["msvqvae"]["figures"]["mse"]["spread"] is None
    assert found["directions"] == {} and [name for name, _ in rows(found)] == [
        "VQ-VAE 2",
        "MS-VQVAE",
    ]


def test_half_power():
    power = torch.zeros(16, dtype=torch.float64)
    power[3] = 1.0  # four cycles
    assert 3.5 <= _half_power(power) <= 4.5
    power[9] = 1.0
    assert _half_power(power) > 9.5
    assert _half_power(torch.zeros(16, dtype=torch.float64)) is None


def test_the_psnr_beside_a_row_is_that_of_the_whole_sum():
    image, grey = torch.full((3, 4, 4), 255, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)
    near = torch.full((2, 3, 4, 4), 0.8)
    assert _psnr(_View([grey, near], [], []), image, 1) == "20.00"  # off by 0.1 of [0, 1]


def test_the_most_detailed_window():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 30:40:2, 44:52] = 200
    top, left = _most_detailed(image, 16)
    assert 24 <= top <= 32 and 36 <= left <= 46
