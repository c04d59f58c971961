from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import weakref
from pathlib import Path

import pytest
import torch

from msvq_fast import models
from msvq_fast.cli import main
from msvq_fast.data import ImageDataset, evaluation_tiles, list_images, to_float
from msvq_fast.ops import InputError
from msvq_fast.training import tokenize
from msvq_fast.training.tokens import Tokens, load_tokens, read_shard, write_index, write_shard

BATCH = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    small = {"width": 8, "code_dim": 4, "num_residual_blocks": 1, "num_codes": 300}
    model = models.from_preset("tiny", resolution=16, latents=(2, 4), **small)
    for quantizer in model.quantizers:  # spread out, so that many codes are in use
        quantizer.codebook.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def arguments(saved: Path, pictures: Path, out: Path, *options: str) -> list[str]:
    settings = [f"--batch_size={BATCH}", "--shard_size=1", "--device=cpu"]
    places = [f"--checkpoint={saved}", f"--data={pictures}", f"--out={out}"]
    return ["tokenize", *places, *settings, *options]


def everything(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("size", [8, 16])
def test_decoded_tokens_are_the_reconstruction(
    saved: Path, pictures: Path, tmp_path: Path, size: int
) -> None:
    assert main(arguments(saved, pictures, tmp_path, "--shard_size=1000", f"--size={size}")) == 0
    tokens = load_tokens(tmp_path)
    model = models.from_pretrained(saved).eval()
    tiles = list(evaluation_tiles(list_images(pictures, split="train"), size=size, crop="tiles"))
    assert tokens.names() == [name for name, _ in tiles]
    assert tokens.grids == tuple((side, side) for side in (size // 8, size // 4))
    assert len(tokens) == len(tiles) > 9 and tokens.num_codes == 300
    assert int(tokens.batch(torch.arange(len(tiles)))[0].max()) > 255  # beyond one byte
    assert tokens.index["settings"]["weights_sha256"] == models.weights_digest(saved)
    with torch.no_grad():
        for start in range(0, len(tiles), BATCH):
            rows = torch.arange(start, min(start + BATCH, len(tiles)))
            x = to_float(torch.stack([tiles[row][1] for row in rows]))
            codes = tokens.batch(rows)
            assert all(c.dtype == torch.int64 for c in codes)
            assert torch.equal(model.decode(codes), model.reconstruct(x))


def test_file_names_that_are_no_text(saved: Path, pictures: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(pictures / "val", data)
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(next(data.iterdir()), data / name)
    assert main(arguments(saved, data, out, "--split=all", "--crop=center")) == 0
    assert name in load_tokens(out).names()


def test_a_full_disk_costs_one_shard(
    saved: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "tokens"
    options = ("--crop=center", "--shard_size=5")
    assert main(arguments(saved, pictures, whole, *options)) == 0
    index, shard = ((whole / n).stat().st_size for n in ("tokens.json", "shard_00000.safetensors"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses what is beyond the limit, as it does on a full disk.
    for limit, name in ((shard - 10, "shard_00000.safetensors"), (index - 10, "tokens.json")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            assert main(arguments(saved, pictures, out, *options)) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"error: cannot write {out / name}: File too large\n" in capsys.readouterr().err
        assert not list(out.glob(".*.tmp"))
    assert main(arguments(saved, pictures, out, *options)) == 0
    assert everything(out) == everything(whole)


def test_random_crops_differ_from_file_to_file(saved: Path, pictures: Path, tmp_path: Path) -> None:
    random = ("--crop=random", "--repeat=4", "--flip", "--seed=3")
    assert main(arguments(saved, pictures, tmp_path, *random)) == 0
    tokens = load_tokens(tmp_path)
    files = list_images(pictures, split="train")
    assert tokens.names() == [f"{path.name}:{i}" for path in files for i in range(4)]
    crop = ImageDataset([files[5]], size=16, seed=3, repeat=4).get(5, 2)
    codes = models.from_pretrained(saved).eval().encode(to_float(crop)[None])
    for mine, expected in zip(tokens.batch(torch.tensor([22])), codes, strict=True):
        assert torch.equal(mine, expected)


def test_crops_are_in_memory_a_batch_at_a_time(saved, pictures, tmp_path, monkeypatch):
    alive, cut = weakref.WeakSet(), tokenize._crops

    def cutting(*args):
        for suffix, tile in cut(*args):
            alive.add(tile)
            assert len(alive) <= BATCH + 4  # with the first ones of files ahead
            yield suffix, tile

    monkeypatch.setattr(tokenize, "_crops", cutting)
    assert main(arguments(saved, pictures, tmp_path, "--crop=random", "--repeat=40")) == 0


@pytest.mark.parametrize("crop", ["tiles", "random"])
def test_workers_do_not_change_the_tokens(
    saved: Path, pictures: Path, tmp_path: Path, crop: str
) -> None:
    written = []
    for workers in (0, 3):
        out = tmp_path / str(workers)
        options = (f"--workers={workers}", f"--crop={crop}")
        assert main(arguments(saved, pictures, out, *options)) == 0
        written.append(everything(out))
    assert written[0] == written[1]


@pytest.mark.parametrize("source", ["pictures", "shards"])
def test_killed_and_started_again_nothing_is_lost_or_twice(
    saved: Path, pictures: Path, tmp_path: Path, source: str, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(source)
    options = ("--size=8", "--batch_size=4", f"--data={data}")  # nine tiles a file
    assert main(arguments(saved, pictures, tmp_path / "whole", *options)) == 0
    whole = everything(tmp_path / "whole")
    assert len(whole) == 11  # ten files, a shard each
    program = (
        "import sys, time\n"
        "from msvq_fast.cli import main\n"
        "from msvq_fast.training import tokenize\n"
        "write = tokenize.write_shard\n"
        "tokenize.write_shard = lambda *shard: (time.sleep(0.1), write(*shard))[1]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments(saved, pictures, out, *options)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("3/10 files"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    done = json.loads((out / "tokens.json").read_text())["files_done"]
    assert 3 <= done < 10
    with pytest.raises(InputError, match=f"not finished: {done} of 10 files; run the same"):
        load_tokens(out)
    assert main(arguments(saved, pictures, out, *options)) == 0
    assert everything(out) == whole


@pytest.mark.parametrize("moment", ["before the shard", "before the index"])
def test_killed_while_writing(
    saved: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    assert main(arguments(saved, pictures, tmp_path / "whole")) == 0
    out = tmp_path / "killed"

    class Killed(BaseException):
        pass

    def stop(folder: Path, *rest: object) -> None:
        if rest[0] == 4:
            (folder / ".shard_00004.safetensors.tmp").write_bytes(b"half")
            raise Killed
        return write_shard(folder, *rest)  # type: ignore[arg-type, return-value]

    def stop_index(folder: Path, index: dict[str, object]) -> None:
        if index["files_done"] == 5:
            raise Killed
        real(folder, index)

    real = tokenize.write_index
    if moment == "before the shard":
        monkeypatch.setattr(tokenize, "write_shard", stop)
    else:
        monkeypatch.setattr(tokenize, "write_index", stop_index)
    with pytest.raises(Killed):
        main(arguments(saved, pictures, out))
    monkeypatch.undo()
    assert main(arguments(saved, pictures, out)) == 0
    assert everything(out) == everything(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(
    saved: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(saved, pictures, tmp_path)) == 0
    before = everything(tmp_path)
    monkeypatch.setattr(tokenize, "write_shard", None)
    assert main(arguments(saved, pictures, tmp_path)) == 0
    assert everything(tmp_path) == before


def test_unreadable_files_are_left_out(
    saved: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes((pictures / "train" / "0.png").read_bytes())
    (data / "b.png").write_text("no image")
    for crop in ("tiles", "random"):
        out = tmp_path / crop
        options = (f"--data={data}", "--split=all", f"--crop={crop}", "--shard_size=99")
        assert main(arguments(saved, pictures, out, *options)) == 0
        assert "skipped: cannot read image" in capsys.readouterr().out
        tokens = load_tokens(out)
        assert list(tokens.index["skipped"]) == ["b.png"]
        assert {name.partition(":")[0] for name in tokens.names()} == {"a.png"}
    (data / "a.png").unlink()
    options = (f"--data={data}", "--split=all")
    assert main(arguments(saved, pictures, tmp_path / "none", *options)) == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err
    shutil.copy(pictures / "train" / "0.png", data / "b.png")  # mended, it is tried again
    assert main(arguments(saved, pictures, tmp_path / "none", *options)) == 0
    assert load_tokens(tmp_path / "none").index["skipped"] == {}


def test_every_file_is_counted(
    saved: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(tokenize, "counting", lambda *_: contextlib.nullcontext(counted.append))
    assert main(arguments(saved, pictures, tmp_path, "--shard_size=1000")) == 0
    assert counted == list(range(1, 11))


def test_several_processes_are_refused(
    saved: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(saved, pictures, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error == "msvq: error: tokenize runs in one process; start it without torchrun\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size=0"], "batch_size=0; expected at least 1"),
        (["--shard_size=0"], "shard_size=0; expected at least 1"),
        (["--size=12"], "size=12; this model takes multiples of 8 pixels"),
        (["--repeat=2"], "crop=tiles has no repeat and no flip"),
        (["--checkpoint=nowhere"], "nowhere does not exist"),
        (["--data=builtin:cats"], "is not built in"),
        (["--device=tpu"], "device='tpu'"),
    ],
)
def test_settings_that_cannot_work(
    saved: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert main(arguments(saved, pictures, out, *options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_shards_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    replace = Path.replace

    def note_name(path: Path, target: Path) -> Path:
        assert path.stat().st_ino in synced
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note_name)
    shard = write_shard(tmp_path, 0, ["a"], [torch.zeros(1, 2, 2, dtype=torch.int64)])
    write_index(tmp_path, {"shards": [shard]})
    assert len(synced) == 2


def test_more_codes_than_16_bits_hold_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"width": 8, "code_dim": 1, "num_residual_blocks": 1, "num_codes": 2**16 + 1}
    models.from_preset("tiny", resolution=16, latents=(2, 4), **small).save_pretrained(tmp_path)
    assert main(arguments(tmp_path, pictures, tmp_path / "out")) == 2
    assert "num_codes=65537; 16 bits hold 65536 codes" in capsys.readouterr().err
    largest = torch.full((1, 1, 1), 2**16 - 1)
    shard = write_shard(tmp_path, 0, ["a"], [largest])
    tokens = Tokens(tmp_path, {}, [read_shard(tmp_path, shard)["codes_0"]], None)
    assert torch.equal(tokens.batch(torch.tensor([0]))[0], largest)


def test_other_tokens_are_not_overwritten(
    saved: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(saved, pictures, tmp_path)) == 0
    before = everything(tmp_path)
    others = ("--size=8", "--batch_size=4", "--split=val", "--shard_size=2", "--resize=20")
    for option in (*others, "--crop=center", "--seed=1"):
        assert main(arguments(saved, pictures, tmp_path, option)) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'tokens.json'} is of other tokens: " in error
        name = option[2:].partition("=")[0]
        assert f"{name} is {json.loads(before['tokens.json'])['settings'][name]}" in error
        assert error.endswith("; give what is there, or choose another out\n")
    for option in ("--repeat=2", "--flip"):
        assert main(arguments(saved, pictures, tmp_path, "--crop=random", option)) == 2
        assert f"; {option[2:].partition('=')[0]} is " in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_tokens_of_shards_are_those_of_the_folder(
    saved: Path, pictures: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for crop in ("tiles", "center", "random"):
        found = []
        for name, data in (("folder", pictures), ("shards", shards)):
            out = tmp_path / crop / name
            assert main(arguments(saved, pictures, out, f"--data={data}", f"--crop={crop}")) == 0
            found.append(load_tokens(out))
        folder, tarred = found
        assert tarred.names() == [
            f"train-{int(name[0]) // 6:03d}.tar/{name}" for name in folder.names()
        ]
        rows = torch.arange(len(folder))
        for a, b in zip(folder.batch(rows), tarred.batch(rows), strict=True):
            assert torch.equal(a, b)


def test_a_shard_with_another_image_of_the_same_name_gives_other_tokens(
    saved: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "x.tar"
    for file in ("0.png", "1.png"):
        with tarfile.open(shard, "w") as tar:
            tar.add(pictures / "train" / file, arcname="a.png")
        code = main(arguments(saved, shard, tmp_path / "out", f"--data=wds:{shard}", "--split=all"))
        assert code == (0 if file == "0.png" else 2)
    assert "is of other tokens: data has other images now; give" in capsys.readouterr().err


def test_altered_shards_are_named(
    saved: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="expected a folder of msvq tokenize"):
        load_tokens(tmp_path)
    assert main(arguments(saved, pictures, tmp_path)) == 0
    shard = tmp_path / "shard_00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"shard_00002.safetensors is corrupt"):
        load_tokens(tmp_path)
    assert main(arguments(saved, pictures, tmp_path)) == 2
    assert "shard_00002.safetensors is corrupt" in capsys.readouterr().err
    shard.unlink()
    with pytest.raises(InputError, match=r"cannot read .*shard_00002.safetensors: No such file"):
        load_tokens(tmp_path)
    index = (tmp_path / "tokens.json").read_text().replace('"schema": 1', '"schema": 2')
    (tmp_path / "tokens.json").write_text(index)
    with pytest.raises(InputError, match="not an index of tokens: schema 2; this version reads 1"):
        load_tokens(tmp_path)
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(InputError, match="is not an index of tokens"):
        load_tokens(tmp_path)
