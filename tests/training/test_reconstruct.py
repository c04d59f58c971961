from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.cli import main
from msvq_fast.data import code_map, read_image, signed_to_uint8, to_float, to_uint8
from msvq_fast.models import from_preset
from msvq_fast.ops import InputError
from msvq_fast.training import reconstruct
from msvq_fast.training.reconstruct import (
    _fitted,
    common_gain,
    reconstruct_grid,
    run_reconstruct,
)
from msvq_fast.training.share_config import ReconstructConfig

SMALL = {"width": 8, "code_dim": 8, "num_residual_blocks": 1, "num_codes": 32}


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to save_png, which still writes the file."""
    calls = {}

    def spy(path, rows, **labels):
        calls.update(rows=rows, **labels)
        real(path, rows, **labels)

    real = reconstruct.save_png
    monkeypatch.setattr(reconstruct, "save_png", spy)
    return calls


def photo(path, width, height):
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_row_is_input_contributions_sums_and_codes(tmp_path, drawn):
    model = from_preset("tiny", **SMALL).train()
    images = [(f"i{i}", torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)) for i in range(2)]
    reconstruct_grid(model, images, tmp_path / "grid.png")
    assert model.training
    with torch.no_grad():
        x = to_float(images[1][1])[None]
        codes = model.eval().encode(x)
        c_0, c_1 = model.contributions(codes)
    row = drawn["rows"][1]
    assert len(row) == 1 + 2 + 2 + 2
    assert torch.equal(row[0], images[1][1])
    assert torch.equal(row[3], to_uint8(c_0[0]))
    assert torch.equal(row[4], to_uint8((c_0 + c_1)[0]))
    for m, column in ((0, 1), (1, 2)):
        gain = int(drawn["column_labels"][column].partition(", x ")[2] or 1)
        assert torch.equal(row[column], signed_to_uint8((c_0, c_1)[m][0], gain))
        assert torch.equal(row[5 + m], code_map(codes[m][0], 32))
    assert drawn["column_labels"][3:] == ["sum of 0", "sum of 0..1", "codes 0", "codes 1"]
    assert [label.split()[0] for label in drawn["row_labels"]] == ["i0", "i1"]
    assert read_image(tmp_path / "grid.png").shape[2] > 7 * 96


def test_faint_detail_is_amplified_and_said_so(tmp_path, drawn, monkeypatch):
    model = from_preset("tiny", **SMALL)
    faint = 0.1 * torch.rand(1, 3, 64, 64) - 0.05
    monkeypatch.setattr(model, "contributions", lambda codes: [torch.ones(1, 3, 64, 64), faint])
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    reconstruct_grid(model, [("black", image)], tmp_path / "grid.png")
    assert drawn["column_labels"][1:3] == ["contribution 0", "contribution 1\naround grey, x 16"]
    assert torch.equal(drawn["rows"][0][2], signed_to_uint8(faint[0], 16))


def test_a_few_bright_values_do_not_set_the_gain():
    faint = torch.full((1000,), 0.06)
    for bright, gain in ((4, 16), (20, 1)):
        faint[:bright] = 1
        assert common_gain([faint[:500], faint[500:]]) == gain


def test_a_large_jpeg_is_never_decoded_smaller_than_shown(tmp_path):
    path = photo(tmp_path / "x.jpg", 640, 480)
    assert _fitted(path, 200, 8).shape == (3, 200, 264)


def test_vqvae2_has_one_reconstruction_and_every_token_map(tmp_path, drawn):
    model = from_preset("vqvae2-tiny", **SMALL)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    reconstruct_grid(model, [("photo", image)], tmp_path / "grid.png")
    assert drawn["column_labels"] == ["input", "reconstruction", "codes 0", "codes 1"]
    assert [tuple(p.shape[1:]) for p in drawn["rows"][0]] == [(64, 64), (64, 64), (8, 8), (16, 16)]


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (90, 70, None, (64, 88)),  # never enlarged, cropped to whole strides of 8
        (600, 300, None, (256, 512)),  # short side to 256
        (300, 600, 64, (128, 64)),
        (8, 31, 64, (24, 8)),
    ],
)
def test_photos_of_any_size(tmp_path, drawn, width, height, size, expected):
    from_preset("tiny", **SMALL).save_pretrained(tmp_path / "model")
    path = photo(tmp_path / "photo.png", width, height)
    out = tmp_path / "new" / "grid.png"
    config = ReconstructConfig(
        str(tmp_path / "model"), data=str(path), out=str(out), size=size, device="cpu"
    )
    assert run_reconstruct(config) == out
    assert out.is_file()
    assert tuple(drawn["rows"][0][0].shape[1:]) == expected
    if (width, height) == (90, 70):
        assert torch.equal(drawn["rows"][0][0], read_image(path)[:, 3:67, 1:89])


@pytest.mark.parametrize("packed", [False, True])
def test_limit_spreads_over_the_data(tmp_path, drawn, packed):
    from_preset("tiny", **SMALL).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(5):
        photo(tmp_path / "images" / f"{i}.png", 32, 32)
    data = str(tmp_path / "images")
    if packed:
        data = f"wds:{tmp_path / 'images.tar'}"
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            tar.add(tmp_path / "images", arcname=".")
    run_reconstruct(
        ReconstructConfig(
            str(tmp_path / "model"),
            data=data,
            split="all",
            out=str(tmp_path / "grid.png"),
            limit=2,
            device="cpu",
        )
    )
    assert [label.split()[0] for label in drawn["row_labels"]] == ["0", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"size": 4}, "size=4; this model takes at least 8 pixels"),
        ({"data": "/nowhere"}, "'/nowhere' does not exist"),
        ({"checkpoint": "/nowhere"}, "/nowhere does not exist"),
        ({"data": "SMALL"}, "has 7x30 pixels; this model takes at least 8x8"),
        ({"out": "FILE/grid.png"}, "cannot write"),
        ({"out": "FOLDER"}, "is a folder"),
    ],
)
def test_bad_settings_stop_the_command(tmp_path, change, message):
    from_preset("tiny", **SMALL).save_pretrained(tmp_path)
    places = {
        "SMALL": str(photo(tmp_path / "small.png", 7, 30)),
        "FILE/grid.png": str(tmp_path / "small.png" / "grid.png"),
        "FOLDER": str(tmp_path),
    }
    change = {name: places.get(value, value) for name, value in change.items()}
    options = {
        "checkpoint": str(tmp_path),
        "data": str(photo(tmp_path / "photo.png", 40, 40)),
        "out": str(tmp_path / "grid.png"),
        "device": "cpu",
    }
    with pytest.raises(InputError, match=message):
        run_reconstruct(ReconstructConfig(**{**options, **change}))
    assert not (tmp_path / "grid.png").exists()


def test_what_cannot_be_drawn_is_left_out(tmp_path, drawn, capsys):
    from_preset("tiny", **SMALL).save_pretrained(tmp_path / "model")
    data, out = tmp_path / "images", tmp_path / "grid.png"
    data.mkdir()
    photo(data / "good.png", 32, 32)
    photo(data / "small.png", 7, 30)
    (data / "text.png").write_text("no image")
    options = [f"--data={data}", f"--out={out}", "--split=all", "--device=cpu"]
    assert main(["reconstruct", f"--checkpoint={tmp_path / 'model'}", *options]) == 0
    assert [label.split()[0] for label in drawn["row_labels"]] == ["good"]
    printed = capsys.readouterr().out
    assert f"skipped: image '{data / 'small.png'}' has 7x30 pixels" in printed
    assert f"skipped: cannot read image '{data / 'text.png'}'" in printed
    (data / "good.png").unlink()
    out.unlink()
    assert main(["reconstruct", f"--checkpoint={tmp_path / 'model'}", *options]) == 2
    error = capsys.readouterr().err
    assert "none of the 2 images can be drawn; image" in error and error.count("\n") == 1
    assert not out.exists()


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch, capsys):
    from_preset("tiny", **SMALL).save_pretrained(tmp_path)
    path, out = photo(tmp_path / "large.png", 300, 300), tmp_path / "grid.png"
    options = [f"--checkpoint={tmp_path}", f"--data={path}", f"--out={out}", "--device=cpu"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)  # above it Pillow warns
    assert main(["reconstruct", *options]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    assert main(["reconstruct", *options]) == 2
    assert "large.png': Image size (90000 pixels) exceeds limit" in capsys.readouterr().err


def test_the_picture_replaces_no_photograph(tmp_path, capsys):
    from_preset("tiny", **SMALL).save_pretrained(tmp_path)
    path = photo(tmp_path / "image.png", 32, 32)
    jpeg = tmp_path / "image.jpg"
    jpeg.write_bytes(path.read_bytes())
    folder = tmp_path / "photographs"
    folder.mkdir()
    others = [photo(folder / f"{i}.PNG", 32, 32) for i in range(4)]
    for data, out, message in (
        (path, path, "is an image that is read"),
        (path, jpeg, "expected a name that ends"),
        *((folder, other, "is an image that is read") for other in others),
    ):
        before = out.read_bytes()
        options = [f"--checkpoint={tmp_path}", f"--data={data}", f"--out={out}", "--device=cpu"]
        assert main(["reconstruct", *options, "--limit=1"]) == 2
        error = capsys.readouterr().err
        assert f"out='{out}'" in error and message in error and error.count("\n") == 1
        assert out.read_bytes() == before
    options = [f"--checkpoint={tmp_path}", f"--data={folder}", f"--out={folder / 'grid.PNG'}"]
    assert main(["reconstruct", *options, "--split=all", "--device=cpu"]) == 0


def test_no_image_is_named(tmp_path):
    with pytest.raises(InputError, match="images is empty"):
        reconstruct_grid(from_preset("tiny", **SMALL), [], tmp_path / "grid.png")
