from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msvq_fast.cli import main
from msvq_fast.data import StoredImage, list_named_images
from msvq_fast.models import MEMORY_MODES, from_pretrained
from msvq_fast.models.autoencoder import Autoencoder
from msvq_fast.training.checkpoint import checkpoint_path, find_model
from msvq_fast.training.resume import describe_images

Train = Callable[..., int]
ReadMetrics = Callable[[Path], list[dict[str, Any]]]


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == "train"]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(out, step) / "model.safetensors")


def test_it_learns_the_built_in_photographs(tmp_path: Path, read_metrics: ReadMetrics) -> None:
    sizes = ["--model.resolution=32", "--model.latents=[4,8]", "--model.width=16"]
    run = ["--batch_size=8", "--repeat=20", "--steps=120", "--log_every=20", "--lr=1e-3"]
    others = ["--data=builtin:photos", "--resize=64", "--device=cpu", "--validate_every=4"]
    assert main(["train", f"--out={tmp_path}", *sizes, *run, *others]) == 0
    records = read_metrics(tmp_path)
    curve = losses(records)
    assert curve[-1] < 0.75 * curve[0]
    held_out = [record["psnr"][-1] for record in records if record["kind"] == "validation"]
    assert len(held_out) == 2 and held_out[-1] > held_out[0]
    last = [record for record in records if record["kind"] == "train"][-1]
    assert all(percent >= 100 / 128 for percent in last["usage"])
    assert all(1 < perplexity <= 128 for perplexity in last["perplexity"])


def test_log_lines_are_means_over_their_steps(
    tmp_path: Path, train: Train, read_metrics: ReadMetrics
) -> None:
    for every in (1, 3):
        assert train(tmp_path / str(every), "--steps=6", f"--log_every={every}") == 0
    single, means = (losses(read_metrics(tmp_path / name)) for name in ("1", "3"))
    assert means == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-6)


def test_accumulation_is_one_large_batch(
    tmp_path: Path, train: Train, read_metrics: ReadMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(float(clip(*a))))
    every = ("--steps=2", "--log_every=1", "--grad_clip=1e9")
    assert train(tmp_path / "a", *every, "--accumulate=2") == 0
    assert train(tmp_path / "b", *every, "--batch_size=8") == 0
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)  # Adam itself takes any scale
    a, b = (read_metrics(tmp_path / name) for name in "ab")
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)
    # Codes depend on the weights before the step, so the first step's statistics are the same.
    assert a[0]["perplexity"] == pytest.approx(b[0]["perplexity"], rel=1e-6)
    a_sizes, b_sizes = (weights(tmp_path / name, 2)["quantizers.0.cluster_size"] for name in "ab")
    assert a_sizes.sum() == b_sizes.sum() > 0


@pytest.mark.parametrize("memory", ["sequential", "strips"])
def test_memory_modes_train_alike(
    tmp_path: Path, train: Train, read_metrics: ReadMetrics, memory: str
) -> None:
    options = ("--steps=3", "--log_every=1", "--accumulate=2")
    assert train(tmp_path / "plain", *options) == 0
    assert train(tmp_path / memory, f"--memory={memory}", "--strips=2", *options) == 0
    plain, other = (losses(read_metrics(tmp_path / name)) for name in ("plain", memory))
    assert other == pytest.approx(plain, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_compiled_is_the_same_training(
    tmp_path: Path,
    train: Train,
    read_metrics: ReadMetrics,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    options = (f"--memory={memory}", "--strips=2", "--steps=3", "--log_every=1")
    assert train(tmp_path / "plain", *options) == 0
    assert not graphs
    assert train(tmp_path / "compiled", "--compile", *options) == 0
    assert graphs
    plain, other = (losses(read_metrics(tmp_path / name)) for name in ("plain", "compiled"))
    assert other == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("preset", ["tiny", "vqvae2-tiny"])
@pytest.mark.parametrize(
    "options",
    [
        ("--precision=bf16", "--channels_last=on", "--grad_clip=1"),
        ("--model.codebook_init=kmeans", "--model.restart_below=0.5", "--deterministic"),
        ("--backend=reference", "--crop=center", "--no_flip", "--resize=20", "--workers=2"),
        ("--memory=strips", "--strips=3", "--precision=bf16"),
    ],
    ids=["bf16", "kmeans", "center", "strips"],
)
def test_every_option_trains(
    tmp_path: Path,
    train: Train,
    read_metrics: ReadMetrics,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    options: tuple[str, ...],
) -> None:
    starts, initialise = [], Autoencoder.initialise_codebooks

    def counted(model: Autoencoder, x: torch.Tensor) -> None:
        starts.append(x.shape)
        initialise(model, x)

    monkeypatch.setattr(Autoencoder, "initialise_codebooks", counted)
    assert train(tmp_path, f"--preset={preset}", "--steps=3", *options) == 0
    assert not torch.are_deterministic_algorithms_enabled()  # it was for the run alone
    assert starts == [(4, 3, 16, 16)] * ("--model.codebook_init=kmeans" in options)
    records = read_metrics(tmp_path)
    # The second of three steps: MS-VQVAE is half-way down a cosine, VQ-VAE 2 at a constant rate.
    rate = 5.5e-4 if preset == "tiny" else 1e-3
    assert next(r["lr"] for r in records if r["kind"] == "train") == pytest.approx(rate)
    outputs = 2 if preset == "tiny" else 1
    assert [len(r["psnr"]) for r in records if r["kind"] == "validation"] == [outputs]
    model = from_pretrained(find_model(tmp_path))
    assert model.encode(torch.zeros(1, 3, 16, 16))[-1].shape == (1, 4, 4)


def test_metrics_of_steps_after_the_checkpoint_are_dropped(
    tmp_path: Path, train: Train, read_metrics: ReadMetrics
) -> None:
    options = ("--checkpoint_every=2", "--validate_every=0")
    assert train(tmp_path, "--steps=4", *options) == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "loss": 9.0}\n{"kind": "tra')
    assert train(tmp_path, "--steps=6", *options, "--resume=auto") == 0
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4, 6]


def test_an_unreadable_image_is_named_and_counted(
    tmp_path: Path, train: Train, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for path in (pictures / split).iterdir():
            Image.open(path).save(data / split / path.name)
    broken = sorted((data / "train").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:60])
    assert train(tmp_path / "out", f"--data={data}", "--steps=5") == 0
    printed = capsys.readouterr().out
    assert printed.count(str(broken)) == 1 and "skipped image 1 of 10" in printed


def test_unreadable_validation_images_stop_the_run_before_it_trains(
    tmp_path: Path, train: Train, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    first, second = sorted((data / "val").iterdir())
    first.write_bytes(b"")
    assert train(tmp_path / "out", f"--data={data}", "--steps=5") == 0
    assert f"skipped validation image: cannot read image '{first}'" in capsys.readouterr().out
    second.write_bytes(b"")
    assert train(tmp_path / "none", f"--data={data}", "--steps=10") == 2
    error = capsys.readouterr().err
    assert "validation: none of the 2 images can be read; cannot read image" in error
    assert str(second) in error and "without validation (validate_every=0)" in error
    assert not (tmp_path / "none").exists()


def test_codes_out_of_use_are_reported_once(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--steps=12", "--model.num_codes=256", "--validate_every=0") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: less than 10 % of the codes of scale 0, 1 are in use") == 1


def test_a_run_goes_on_when_its_images_have_moved(
    tmp_path: Path, train: Train, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--repeat=2", "--schedule=constant", "--validate_every=0")
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    shutil.copytree(pictures, first)
    assert train(tmp_path / "whole", "--steps=6", f"--data={first}", *options) == 0
    assert train(tmp_path / "moved", "--steps=3", f"--data={first}", *options) == 0
    first.rename(second)
    on = ("--steps=6", "--resume=auto", *options)
    assert train(tmp_path / "moved", f"--data={second}", *on) == 0
    assert "its images have the same names" in capsys.readouterr().out
    whole, moved = (weights(tmp_path / name, 6) for name in ("whole", "moved"))
    assert all(torch.equal(whole[name], moved[name]) for name in whole)

    shutil.copytree(second, other)
    image = other / "train" / "3.png"
    image = image.rename(image.with_stem("renamed"))
    assert train(tmp_path / "moved", f"--data={other}", "--steps=9", *on[1:]) == 2
    assert f"data is {second} there and {other} here" in capsys.readouterr().err
    assert train(tmp_path / "again", f"--data={other}", "--steps=2", *options) == 0
    image.rename(image.with_stem("later"))
    assert train(tmp_path / "again", f"--data={other}", "--steps=4", *on[1:]) == 0
    assert "other names than before" in capsys.readouterr().out


def test_stored_images_are_known_by_their_sizes_too(shards: str) -> None:
    images = list_named_images(shards, split="train")
    name, image = next(iter(images.items()))
    assert isinstance(image, StoredImage) and image.size is not None
    other = {**images, name: dataclasses.replace(image, size=image.size + 1)}
    before, now = describe_images(images), describe_images(other)
    assert before["images"] == now["images"] == len(images)
    assert before["images_sha256"] != now["images_sha256"]


def test_shards_train_as_their_folder_and_resume(
    tmp_path: Path, train: Train, shards: str, read_metrics: ReadMetrics
) -> None:
    options = ("--repeat=2", "--schedule=constant", "--validate_every=1", "--log_every=1")
    assert train(tmp_path / "folder", "--steps=9", *options) == 0
    wds = (f"--data={shards}", "--workers=2", *options)
    assert train(tmp_path / "shards", "--steps=4", *wds) == 0
    assert train(tmp_path / "shards", "--steps=9", "--resume=auto", *wds) == 0
    expected, found = (read_metrics(tmp_path / name) for name in ("folder", "shards"))
    assert losses(found) == losses(expected)
    assert found[-1] == expected[-1] and found[-1]["kind"] == "validation"
    folder, tarred = (weights(tmp_path / name, 9) for name in ("folder", "shards"))
    assert all(torch.equal(tarred[name], folder[name]) for name in folder)


def test_config_json_repeats_the_run(tmp_path: Path, train: Train, pictures: Path) -> None:
    assert train(tmp_path / "a", "--steps=2") == 0
    saved = tmp_path / "a" / "config.json"
    assert main(["train", f"--config={saved}", f"--out={tmp_path / 'b'}"]) == 0
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {**json.loads(saved.read_text()), "out": again["out"]} == again
    expected = weights(tmp_path / "a", 2)
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "b", 2).items())
