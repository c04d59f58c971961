"""LPIPS and distances between sets in ``msvq evaluate``, on weights made up for the test."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from msvq_fast.cli import main
from msvq_fast.data import evaluation_tiles, list_images, to_float, to_uint8
from msvq_fast.metrics import LPIPS, FeatureExtractor, frechet_distance, kernel_distance
from msvq_fast.metrics.efflite0 import EfficientNetLite0
from msvq_fast.models import from_preset
from msvq_fast.ops import InputError
from msvq_fast.training.config import EvaluateConfig
from msvq_fast.training.distributed import World
from msvq_fast.training.evaluate import evaluate, run_evaluate
from msvq_fast.training.judges import FeatureSet, Judges, compare_sets, load_judges
from tests.training.two_processes import run_two

SMALL = {"width": 8, "code_dim": 8, "num_residual_blocks": 1, "num_codes": 32}
ROOT = Path(__file__).parents[2]
ONE = World(0, 1, torch.device("cpu"))


class Colours(FeatureExtractor):
    """Mean colours and a few pixels: features that a test can make itself."""

    name, suffix, dim, sha256 = "colours", "-Colours", 5, "0" * 64

    def _extract(self, pixels):
        features = torch.cat([pixels.mean(dim=(2, 3)), pixels[:, 0, 0, :2]], dim=1) / 255
        return features, features


@pytest.fixture
def model():
    return from_preset("tiny", latents=(8, 16), **SMALL)


def tiles(count=6, size=64):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return [(f"tile{i}.png", noise[i] // (i + 2)) for i in range(count)]


def test_lpips_of_every_partial_sum_and_image(model):
    judge = LPIPS("alex")
    result = evaluate(model, tiles(), batch_size=4, judges=Judges(lpips=judge))
    x = to_float(torch.stack([tile for _, tile in tiles()]))
    model.eval()
    with torch.no_grad():
        codes = model.encode(x)
        for m in range(2):
            want = judge(model.decode(codes, upto=m).clamp(-1, 1), x)
            got = [row.lpips for row in result.per_image if row.scale == m]
            assert got == pytest.approx(want.tolist(), rel=1e-4)
            assert result.reconstructions[m].lpips == pytest.approx(float(want.mean()), rel=1e-4)
    assert result.settings["lpips"] == {"net": "alex", "sha256": ""}


def test_sets_are_originals_and_rounded_reconstructions(model):
    extractor = Colours()
    result = evaluate(model, tiles(), batch_size=4, judges=Judges(extractor=extractor))
    found = result.reconstructed_set
    x = torch.stack([tile for _, tile in tiles()])
    model.eval()
    with torch.no_grad():
        fake = extractor(to_uint8(model.reconstruct(to_float(x))))[0]
    real = extractor(x)[0]
    assert found.fd is None  # six images are fewer than twice five features
    want = kernel_distance(real, fake, paired=True)
    assert found.kid == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert "FD-Colours not given below 10 images" in found.describe()
    assert "FID" not in found.describe() and "6 images" in found.describe()
    forced = evaluate(model, tiles(), judges=Judges(extractor=extractor, force_fd=True))
    want = frechet_distance(real, fake)
    assert forced.reconstructed_set.fd == pytest.approx(want, rel=1e-3)
    enough = evaluate(model, tiles(10), judges=Judges(extractor=extractor))
    assert enough.reconstructed_set.fd is not None


def test_a_perfect_reconstruction_is_at_kernel_distance_zero(model, monkeypatch):
    x = to_float(torch.stack([tile for _, tile in tiles()]))
    monkeypatch.setattr(model, "contributions", lambda codes: [x, 0 * x])
    result = evaluate(model, tiles(), batch_size=6, judges=Judges(extractor=Colours()))
    assert result.reconstructed_set.kid == pytest.approx(0, abs=1e-12)


def test_the_parts_of_the_inception_score_hold_all_classes_whatever_the_processes(monkeypatch):
    class Sure(Colours):
        def _extract(self, pixels):
            logits = 50 * F.one_hot(pixels[:, 0, 0, 0].long(), 10).float()
            return super()._extract(pixels)[0], logits

    extractor = Sure()
    images = torch.arange(10, dtype=torch.uint8).repeat_interleave(40)
    images = images.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    names = [f"class{i // 40}/{i}.png" for i in range(400)]
    alone = FeatureSet(extractor)
    alone.add(names, images)
    one = compare_sets(extractor, alone, alone, paired=False, force_fd=False, world=ONE)
    assert 8 < one.inception_score[0] <= 10  # in the order of the files it is 1
    assert one.inception_score[1] > 0  # of ten parts
    alike = FeatureSet(extractor)
    alike.add(names, images[:1].expand(400, -1, -1, -1))
    other = compare_sets(extractor, alone, alike, paired=False, force_fd=False, world=ONE)
    assert other.inception_score == pytest.approx((1, 0))
    assert other.inception_score_originals == one.inception_score_originals
    shares = [FeatureSet(extractor) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.add(names[rank::2], images[rank::2])
    parts = [(s._names, s._features, s._logits) for s in shares]
    monkeypatch.setattr("msvq_fast.training.judges.gather", lambda value, world: parts)
    two = compare_sets(extractor, *shares, paired=False, force_fd=False, world=ONE)
    assert two == one


def weights(folder: Path) -> tuple[Path, Path]:
    """Random but settled weights of LPIPS and EfficientNet-Lite0."""
    state = LPIPS("squeeze").state_dict()
    heads = {k: v for k, v in state.items() if k.startswith("heads")}
    renamed = {f"lin{k[6:]}.model.1.weight": v.view(1, -1, 1, 1) for k, v in heads.items()}
    torch.save({**state, **renamed}, folder / "lpips.pth")
    torch.save(EfficientNetLite0().state_dict(), folder / "eff.pth")
    return folder / "lpips.pth", folder / "eff.pth"


def folder_of_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, (name, tile) in enumerate(tiles(count)):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(folder / f"{number:02d}-{name}")
    return folder


def test_command_writes_hashes_and_figures(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    lpips, eff = weights(tmp_path)
    data = folder_of_images(tmp_path / "images", 4)
    arguments = [
        *("evaluate", f"--checkpoint={tmp_path / 'model'}", f"--data={data}", "--split=all"),
        *(f"--out={tmp_path / 'out'}", "--device=cpu", f"--lpips-weights={lpips}"),
        *("--extractor=efflite0", f"--efflite0-weights={eff}"),
    ]
    assert main(arguments) == 0
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["settings"]["lpips"]["net"] == "squeeze"
    assert len(saved["settings"]["lpips"]["sha256"]) == 64
    found = saved["reconstructed_set"]
    assert (found["extractor"], found["dim"], found["images"]) == ("EfficientNet-Lite0", 1280, 4)
    assert len(found["sha256"]) == 64 and found["fd"] is None
    printed = capsys.readouterr().out
    assert "LPIPS" in printed and f"sha256 {found['sha256'][:16]}" in printed
    assert "KID-EffLite0" in printed and "FID" not in printed
    with (tmp_path / "out" / "per_image.csv").open() as file:
        assert all(float(row["lpips"]) > 0 for row in csv.DictReader(file))


def test_weights_that_are_given_name_their_network(tmp_path):
    config = EvaluateConfig(efflite0_weights=str(weights(tmp_path)[1]))
    judges = load_judges(config, torch.device("cpu"))
    assert judges.extractor is not None and judges.extractor.suffix == "-EffLite0"
    assert load_judges(EvaluateConfig(), torch.device("cpu")).extractor is None


@pytest.mark.parametrize("count", [0, 1])
def test_a_set_of_one_image_has_no_distances(count):
    judged = FeatureSet(Colours())
    images = torch.stack([tile for _, tile in tiles()])
    judged.add([f"{n}.png" for n in range(count)], images[:count])
    with pytest.raises(InputError, match=f"a set to compare has {count} images; expected at least"):
        compare_sets(Colours(), judged, judged, paired=True, force_fd=False, world=ONE)


def test_samples_are_compared_as_a_set(tmp_path, capsys):
    _, eff = weights(tmp_path)
    data = folder_of_images(tmp_path / "images", 5)
    options = {
        "data": str(data),
        "split": "all",
        "samples": str(data),
        "size": 64,
        "extractor": "efflite0",
        "efflite0_weights": str(eff),
        "force_fd": True,
        "device": "cpu",
    }
    assert run_evaluate(EvaluateConfig(out=str(tmp_path / "out"), **options)) is None
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["samples"]
    assert saved["fd"] == pytest.approx(0, abs=1e-6)
    assert saved["images"] == saved["originals"] == 5
    assert "FD-EffLite0 0.000" in capsys.readouterr().out


def test_samples_are_cut_as_the_originals_and_are_no_pairs(tmp_path, monkeypatch):
    judges = "msvq_fast.training.samples_evaluation.load_judges"
    monkeypatch.setattr(judges, lambda *_: Judges(extractor=Colours()))
    data = folder_of_images(tmp_path / "images", 5)
    cut = {"size": 32, "resize": 40, "crop": "tiles"}
    options = {"data": str(data), "split": "all", "samples": str(data), "device": "cpu", **cut}
    run_evaluate(EvaluateConfig(out=str(tmp_path / "out"), **options))
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["samples"]
    images = torch.stack([t for _, t in evaluation_tiles(list_images(data, split="all"), **cut)])
    features = Colours()(images)[0]
    assert saved["images"] == len(images)
    # An image and its equal count as any two: the distance lies below 0.
    assert saved["kid"] == pytest.approx(kernel_distance(features, features), rel=1e-6)
    assert saved["kid"] < -1e-4


def test_samples_go_through_the_network_in_batches(tmp_path, monkeypatch):
    sizes = []

    class Counting(Colours):
        def _extract(self, pixels):
            sizes.append(len(pixels))
            return super()._extract(pixels)

    judges = "msvq_fast.training.samples_evaluation.load_judges"
    monkeypatch.setattr(judges, lambda *_: Judges(extractor=Counting()))
    data = folder_of_images(tmp_path / "images", 5)
    options = {"data": str(data), "split": "all", "samples": str(data), "device": "cpu"}
    cut = {"size": 32, "crop": "center", "batch_size": 2}
    run_evaluate(EvaluateConfig(out=str(tmp_path / "out"), **cut, **options))
    assert sizes == [2, 2, 1] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "m", "samples": "s"}, "needs --checkpoint or --samples, .*both given"),
        ({}, "needs --checkpoint or --samples, .*neither given"),
        ({"samples": "s"}, "needs --size"),
        ({"samples": "s", "size": 64}, "needs --extractor"),
        ({"samples": "s", "size": 64, "extractor": "inception"}, "needs inception_weights"),
        ({"samples": "s", "size": 64, "inception_weights": "/no"}, "'/no' does not exist"),
        ({"samples": "s", "size": 64, "lpips_weights": "w"}, "lpips_weights='w' with samples"),
    ],
)
def test_bad_settings_stop_the_command(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_evaluate(EvaluateConfig(out=str(tmp_path / "out"), device="cpu", **change))
    assert not (tmp_path / "out").exists()


def test_inception_weights_alone_choose_the_inception(tmp_path):
    config = EvaluateConfig("model", inception_weights=str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        load_judges(config, torch.device("cpu"))


def test_processes_of_other_options_end(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    data = folder_of_images(tmp_path / "images", 5)
    lpips = weights(tmp_path)[0]
    options = ["evaluate", f"--checkpoint={tmp_path / 'model'}", f"--data={data}", "--split=all"]
    options += ["--size=32", "--device=cpu", f"--out={tmp_path / 'out'}"]
    program = "import os, sys\nfrom msvq_fast.cli import main\nif os.environ['RANK'] == '1': "
    for theirs, message in (
        ("--limit=2", "limit is None in process 0 and 2 in process 1"),
        (f"--lpips-weights={lpips}", "lpips_weights is None in process 0 and given in process 1"),
    ):
        for done in run_two(tmp_path, options, f"{program}sys.argv.append({theirs!r})"):
            assert done == (2, f"msvq: error: {message}; expected the same in all\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_share_the_images(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    data = folder_of_images(tmp_path / "images", 5)
    (data / "04-torn.png").write_bytes(b"\x89PNG")
    lpips, eff = weights(tmp_path)
    options = [
        *("evaluate", f"--checkpoint={tmp_path / 'model'}", f"--data={data}", "--split=all"),
        *("--size=32", "--device=cpu", "--batch-size=2", f"--lpips-weights={lpips}"),
        *("--extractor=efflite0", f"--efflite0-weights={eff}"),
    ]
    assert main([*options, f"--out={tmp_path / 'one'}"]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "msvq_fast", *options, f"--out={tmp_path / 'two'}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("VQVAE,") == 1
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert (one["images"], two["settings"]["processes"]) == (two["images"], 2)
    assert one["codebooks"] == two["codebooks"]
    assert list(two["settings"]["skipped"]) == [str(data / "04-torn.png")]
    for a, b in zip(one["reconstructions"], two["reconstructions"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    kids = [r["reconstructed_set"]["kid"] for r in (one, two)]
    assert kids[0] == pytest.approx(kids[1], rel=1e-5, abs=1e-12)
    scores = [r["reconstructed_set"]["inception_score_originals"] for r in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    names = []
    for folder in ("one", "two"):
        with (tmp_path / folder / "per_image.csv").open() as file:
            names.append([(row["image"], row["scale"]) for row in csv.DictReader(file)])
    assert sorted(names[0]) == sorted(names[1])
    assert [n for n, s in names[0] if s == "1"] == [n for n, s in names[1] if s == "1"]
