from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import resource
import shutil
import tarfile

import pytest
import torch
from rich.text import Text

from msvq_fast.data import evaluation_tiles, list_images, to_float
from msvq_fast.metrics import mse, psnr_from_mse, ssim, to_unit_range
from msvq_fast.models import from_preset
from msvq_fast.ops import InputError, default_kernel_size, gaussian_pyramid
from msvq_fast.training.config import EvaluateConfig
from msvq_fast.training.evaluate import evaluate, run_evaluate
from msvq_fast.training.inference import load_model
from msvq_fast.training.results import SetQuality, print_table, write_results, write_text

SMALL = {"width": 8, "code_dim": 8, "num_residual_blocks": 1}


@pytest.fixture
def model():
    options = {"latents": (4, 8, 16), "num_codes": 32, "sigma_rule": "opencv"}
    return from_preset("tiny", **options, **SMALL)


def tiles(count=5, size=32):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, size).to(torch.uint8).expand(3, size, size)
    return [(f"tile{i}", noise[i] // (i + 2) + ramp // 2) for i in range(count)]


def test_figures_are_those_of_the_metrics_on_the_whole_set(model):
    model.train()
    result = evaluate(model, tiles(), batch_size=2)
    assert model.training
    x = to_float(torch.stack([tile for _, tile in tiles()]))
    model.eval()
    with torch.no_grad():
        codes = model.encode(x)
        partials = [to_unit_range(model.decode(codes, upto=m)) for m in range(3)]
    image = to_unit_range(x)
    blur = gaussian_pyramid(x, 3, kernel_size=default_kernel_size(64), sigma_rule="opencv")
    assert [q.scale for q in result.reconstructions] == [0, 1, 2]
    for m, quality in enumerate(result.reconstructions):
        error = mse(partials[m], image)
        assert quality.mse == pytest.approx(float(error.mean()), rel=1e-5)
        assert quality.psnr == pytest.approx(float(psnr_from_mse(error.mean())), abs=1e-4)
        assert quality.ssim == pytest.approx(float(ssim(partials[m], image).mean()), abs=1e-5)
        target = float(mse(partials[m], to_unit_range(blur[m])).mean())
        assert quality.target_mse == pytest.approx(target, rel=1e-5)
        truncated = mse((partials[m] * 255).floor() / 255, image).mean()
        assert quality.psnr_8bit == pytest.approx(float(psnr_from_mse(truncated)), abs=1e-2)
        rows = [row for row in result.per_image if row.scale == m]
        assert [row.image for row in rows] == [name for name, _ in tiles()]
        assert [row.mse for row in rows] == pytest.approx(error.tolist(), rel=1e-5)
    assert result.reconstructions[0].target_mse != result.reconstructions[0].mse
    assert result.final.target_mse == result.final.mse
    for m, book in enumerate(result.codebooks):
        counts = torch.bincount(codes[m].flatten(), minlength=32)
        p = counts[counts > 0].double() / counts.sum()
        assert book.grid == tuple(codes[m].shape[1:])
        assert book.usage == 100 * len(p) / 32
        assert book.perplexity == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-9)
    assert result.usage == pytest.approx(sum(b.usage for b in result.codebooks) / 3)
    assert result.perplexity == pytest.approx(sum(b.perplexity for b in result.codebooks) / 3)
    assert result.images == 5
    assert result.parameters == sum(p.numel() for p in model.parameters())


def test_batches_do_not_change_the_figures(model):
    seen = []
    tf32 = []
    one = evaluate(
        model,
        tiles(),
        batch_size=1,
        progress=lambda _: tf32.append(torch.backends.cudnn.allow_tf32),
    )
    assert tf32 == [False] * 5
    all_ = evaluate(model, iter(tiles()), batch_size=5, progress=seen.append)
    assert seen == [5]
    assert one.codebooks == all_.codebooks
    for a, b in zip(one.reconstructions, all_.reconstructions, strict=True):
        assert (a.mse, a.ssim, a.psnr) == pytest.approx((b.mse, b.ssim, b.psnr), rel=1e-5)


def test_rows_come_by_file_tile_and_scale_in_any_batches(model):
    named = ["a.png:0,0", "a.png:0,1", "a.png:10,0", "a.png:2,0", "b.png"]
    images = [tile for _, tile in tiles()]
    for size in (1, 3):
        result = evaluate(model, zip(named, images, strict=True), batch_size=size)
        rows = [(row.image, row.scale) for row in result.per_image]
        order = [*named[:2], named[3], named[2], named[4]]
        assert rows == [(name, scale) for name in order for scale in range(3)]


def test_sizes_may_mix(model):
    mixed = [*tiles(1, 32), *tiles(2, 48)]
    result = evaluate(model, mixed, batch_size=4)
    assert result.images == 3
    names = [row.image for row in result.per_image if row.scale == 0]
    assert names == ["tile0", "tile0", "tile1"]


def test_one_reconstruction_of_vqvae2_and_all_its_codebooks():
    model = from_preset("vqvae2-tiny", num_codes=32, **SMALL)
    result = evaluate(model, tiles(), batch_size=5)
    assert [q.scale for q in result.reconstructions] == [1]
    assert [b.grid for b in result.codebooks] == [(4, 4), (8, 8)]
    assert result.final.mse == result.final.target_mse
    text = table(result)
    row_0, row_1 = (next(r for r in text.splitlines() if r.split()[:1] == [m]) for m in "01")
    assert row_0.split()[2:6] == ["-"] * 4
    assert row_1.split()[3] == f"{result.final.psnr:.2f}"


def test_training_state_is_untouched(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model.train(), tiles(2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_files_hold_the_result(model, tmp_path):
    result = evaluate(model, tiles(), settings={"data": "here"})
    write_results(result, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["per_image.csv", "results.json"]
    saved = json.loads((folder / "results.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert saved["reconstructions"][2]["psnr"] == result.final.psnr
    assert saved["settings"]["data"] == "here"
    assert saved["settings"]["metric_range"] == [0, 1]
    assert saved["model_config"]["latents"] == [4, 8, 16]
    with (folder / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert float(rows[-1]["mse"]) == result.per_image[-1].mse


def test_a_perfect_reconstruction_is_null_in_json_and_inf_in_csv(model, tmp_path, monkeypatch):
    x = to_float(tiles(1)[0][1])[None]
    monkeypatch.setattr(model, "contributions", lambda codes: [x, x * 0, x * 0])
    result = evaluate(model, tiles(1))
    assert result.final.mse == 0
    assert result.final.psnr == math.inf
    write_results(result, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["reconstructions"][2]["psnr"] is None
    assert "inf" in (tmp_path / "per_image.csv").read_text()


def table(result):
    file = io.StringIO()
    print_table(result, file)
    return file.getvalue()


def test_table_off_a_terminal_is_plain_text(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    result = evaluate(model, tiles())
    text = table(result)
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert f"{result.parameters:,} parameters, 5 images" in text
    rows = [line.split() for line in text.splitlines()]
    quality, book = result.reconstructions[1], result.codebooks[1]
    figures = [f"{1e3 * quality.mse:.3f}", f"{quality.psnr:.2f}", f"{quality.ssim:.4f}"]
    figures += [f"{1e3 * quality.target_mse:.3f}", f"{book.usage:.1f}", f"{book.perplexity:.1f}"]
    assert ["1", "4x4", *figures] in rows
    assert ["mean", f"{result.usage:.1f}", f"{result.perplexity:.1f}"] in rows


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("columns", "ruled"), [(120, True), (80, False), (40, False)])
def test_table_on_a_terminal_has_rules_where_they_fit_and_every_figure(
    model, columns, ruled, monkeypatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    result = evaluate(model, tiles(2))
    judged = [dataclasses.replace(q, lpips=0.1234) for q in result.reconstructions]
    result = dataclasses.replace(result, reconstructions=tuple(judged))
    file = Terminal()
    print_table(result, file)
    text = file.getvalue()
    assert ("━" in text) == ruled
    assert "…" not in text
    assert all(f"{q.psnr:.2f}" in text and f"{q.ssim:.4f}" in text for q in judged)
    widest = max(len(Text.from_ansi(line).plain) for line in text.splitlines()[1:])
    assert widest <= max(columns, 80)


def test_bad_input_of_evaluate(model):
    with pytest.raises(InputError, match="tiles is empty"):
        evaluate(model, [])
    with pytest.raises(InputError, match="batch_size=0"):
        evaluate(model, tiles(), batch_size=0)
    with pytest.raises(InputError, match="20x20 pixels; both sides must be multiples of 16"):
        evaluate(model, tiles(size=20))
    with torch.no_grad():
        next(model.step_two[2].parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="reconstruction of 'tile0' is not finite"):
        evaluate(model, tiles())


def test_an_unwritable_folder_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = evaluate(model, tiles(2))
    with pytest.raises(InputError, match=r"cannot write .*per_image\.csv") as raised:
        write_results(result, tmp_path / "file")
    assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_command_on_the_builtin_photographs(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    config = EvaluateConfig(
        str(tmp_path / "model"), out=str(tmp_path / "out"), crop="center", limit=2, device="cpu"
    )
    result = run_evaluate(config)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["images"] == 2
    expected = {"split": "val", "size": 64, "resize": 64, "crop": "center", "skipped": {}}
    assert expected.items() <= saved["settings"].items()
    assert len(saved["settings"]["weights_sha256"]) == 64
    assert "perplexity" in capsys.readouterr().out
    paths = list_images("builtin:photos", split="val")
    model = load_model(tmp_path / "model", torch.device("cpu"))
    same = evaluate(model, evaluation_tiles(paths, size=64, crop="center", limit=2))
    assert same.per_image == result.per_image


def test_models_run_in_the_order_that_convolutions_take_on_a_cpu(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", torch.device("cpu"))
    x = torch.rand(2, 3, 64, 64).sub_(0.5)
    with torch.no_grad():
        codes = loaded.encode(x)
        assert all(map(torch.equal, codes, model.encode(x)))
        torch.testing.assert_close(loaded.decode(codes), model.decode(codes))
        features = loaded.encoder(x)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    assert not any(f.is_contiguous() for f in features)


def test_file_names_that_are_no_text(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    picture = list_images("builtin:photos", split="val")[0]
    for name in (b"caf\xc3\xa9.jpg", b"caf\xe9.jpg"):
        shutil.copy(picture, os.fsencode(data) + b"/" + name)
    options = {"checkpoint": str(tmp_path / "model"), "data": str(data), "out": str(tmp_path)}
    run_evaluate(EvaluateConfig(**options, split="all", crop="center", device="cpu"))
    with (tmp_path / "per_image.csv").open(encoding="utf-8") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    assert names == {"café.jpg", r"caf\udce9.jpg"}


@pytest.mark.parametrize("packed", [False, True])
def test_command_names_skipped_files(model, tmp_path, capsys, packed):
    from PIL import Image

    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (70, 80), (9, 99, 199)).save(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "torn.png").write_bytes(b"\x89PNG")
    data, place = str(tmp_path / "images"), tmp_path / "images"
    if packed:
        data, place = f"wds:{tmp_path}/*.tar", tmp_path / "x.tar"
        with tarfile.open(place, "w") as tar:
            for name in ("good.png", "torn.png"):
                tar.add(tmp_path / "images" / name, arcname=name)
    config = EvaluateConfig(
        str(tmp_path / "model"),
        data=data,
        split="all",
        out=str(tmp_path),
        size=32,
        device="cpu",
    )
    result = run_evaluate(config)
    assert result.images == 4
    assert list(result.settings["skipped"]) == [str(place / "torn.png")]
    assert "torn.png" in capsys.readouterr().out
    rows = csv.DictReader(io.StringIO((tmp_path / "per_image.csv").read_text()))
    tiles_of_it = ("0,0", "0,1", "1,0", "1,1")
    assert {row["image"] for row in rows} == {
        f"{'x.tar/' * packed}good.png:{tile}" for tile in tiles_of_it
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 40}, "size=40; this model takes multiples of 16 pixels"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"data": "/nowhere"}, "'/nowhere' does not exist"),
        ({"checkpoint": "/nowhere"}, "/nowhere does not exist"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_bad_settings_stop_the_command(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    options = {"checkpoint": str(tmp_path), "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(InputError, match=message):
        run_evaluate(EvaluateConfig(**{**options, **change}))
    assert not (tmp_path / "out").exists()


def test_a_set_is_described_in_a_line():
    found = SetQuality(
        suffix="",
        extractor="Inception",
        sha256="0123456789abcdef" * 4,
        dim=5,
        images=20,
        originals=30,
        fd=1.5,
        kid=0.0025,
        inception_score=(3.0, 0.25),
        inception_score_originals=(4.0, 0.5),
    )
    rest = "20 images, 30 originals, Inception, 5 features, weights sha256 0123456789abcdef"
    line = f"FID 1.500, KID 2.500e-3, IS 3.000 ± 0.250 (originals 4.000); {rest}"
    assert found.describe() == line
    other = dataclasses.replace(found, suffix="-X", fd=None)
    assert other.describe().startswith(
        "FD-X not given below 10 images (force_fd), KID-X 2.500e-3, IS-X 3.000"
    )


def test_a_full_disk_keeps_the_figures_of_before(tmp_path):
    file = tmp_path / "results.json"
    write_text(file, "before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write '.*results\.json': File too large"):
            write_text(file, "after" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "before\n" and list(tmp_path.iterdir()) == [file]


def test_an_unwritable_output_stops_the_command_before_the_work(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(type(model), "encode", lambda self, x: pytest.fail("worked first"))
    config = EvaluateConfig(str(tmp_path), out=str(tmp_path / "out"), device="cpu")
    with pytest.raises(InputError, match=r"cannot write into .*out.: not a folder"):
        run_evaluate(config)
