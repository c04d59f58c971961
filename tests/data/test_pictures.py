from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from msvq_fast.data import code_map, pictures, save_png, signed_to_uint8, to_float, to_uint8
from msvq_fast.ops.checks import InputError


def colour(red: int, green: int, blue: int, height: int = 64, width: int = 64) -> torch.Tensor:
    rgb = torch.tensor([red, green, blue], dtype=torch.uint8)
    return rgb[:, None, None].expand(3, height, width)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


def box_of(pixels: np.ndarray, red: int, green: int, blue: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the only rectangle of a colour."""
    rows, columns = np.nonzero((pixels == (red, green, blue)).all(axis=-1))
    top, left = rows.min(), columns.min()
    height, width = rows.max() - top + 1, columns.max() - left + 1
    assert len(rows) == height * width
    return int(top), int(left), int(height), int(width)


def dark(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(axis=-1) < 100


# --- 8-bit conversions ---


def test_to_uint8_inverts_to_float() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)


def test_to_uint8_rounds_and_clips() -> None:
    x = torch.tensor([-1.5, 0.3 / 127.5 - 1, 0.7 / 127.5 - 1, 1.2, float("inf"), float("nan")])
    assert to_uint8(x).tolist() == [0, 0, 1, 255, 255, 0]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_signed_is_centred_on_grey() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, float("nan")])
    assert signed_to_uint8(x).tolist() == [0, 64, 128, 191, 255, 0]
    assert signed_to_uint8(x / 4, gain=4).tolist() == [0, 64, 128, 191, 255, 0]


def test_conversions_take_tensors_with_gradients() -> None:
    x = torch.zeros(3, 2, 2, requires_grad=True)
    assert not to_uint8(x).requires_grad and not signed_to_uint8(x).requires_grad


# --- token maps ---


def test_code_map_gives_every_code_its_own_colour() -> None:
    colours = code_map(torch.arange(512).view(16, 32), 512)
    assert colours.shape == (3, 16, 32) and colours.dtype == torch.uint8
    assert torch.unique(colours.flatten(1), dim=1).shape[1] >= 505
    step = colours.flatten(1).int().diff(dim=1).abs().sum(dim=0)
    assert step.min() > 60  # neighbouring indices are told apart by eye


def test_code_map_depends_on_the_code_alone() -> None:
    codes = torch.randint(0, 100, (5, 7))
    whole = code_map(codes, 100)
    assert torch.equal(code_map(codes[2:3, 4:5], 100)[:, 0, 0], whole[:, 2, 4])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0, 4]]), r"codes lie in 0\.\.4; expected 0\.\.3"),
        (torch.tensor([[-1, 0]]), r"codes lie in -1\.\.0"),
        (torch.tensor([0, 1]), r"shape \(2,\).*expected int64 \(h, w\)"),
        (torch.zeros(2, 2), r"float32; expected int64 \(h, w\)"),
    ],
)
def test_code_map_refuses(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        code_map(codes, 4)


# --- grids ---


def test_grid_without_labels_holds_the_pictures(tmp_path: Path) -> None:
    rows = [[colour(255, 0, 0), colour(0, 255, 0)], [None, colour(0, 0, 255)]]
    save_png(tmp_path / "grid.png", rows)
    pixels = pixels_of(tmp_path / "grid.png")
    red, green, blue = (box_of(pixels, *rgb) for rgb in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert red[2:] == green[2:] == blue[2:] == (64, 64)
    assert red[0] == green[0] and green[1] == blue[1]
    gap = green[1] - red[1] - 64
    assert gap > 0 and blue[0] - green[0] - 64 == gap
    assert (pixels[blue[0] :, : blue[1]] == 255).all()


def test_small_pictures_fill_their_cell_with_sharp_pixels(tmp_path: Path) -> None:
    codes = torch.zeros(3, 2, 4, dtype=torch.uint8)
    codes[0] = torch.tensor([[10, 20, 30, 40], [50, 60, 70, 80]])
    save_png(tmp_path / "grid.png", [[codes, colour(255, 0, 0, 32, 64)]])
    pixels = pixels_of(tmp_path / "grid.png")
    for value in range(10, 90, 10):
        assert box_of(pixels, value, 0, 0)[2:] == (16, 16)


def test_labels_are_written_beside_their_pictures(tmp_path: Path) -> None:
    rows = [[colour(255, 0, 0), colour(0, 255, 0)], [colour(1, 2, 255), None]]
    save_png(tmp_path / "plain.png", rows)
    save_png(
        tmp_path / "grid.png",
        rows,
        row_labels=["contribution of a long name", "sum"],
        column_labels=["C_0", "C_1\ngain 4"],
        title="Step 10",
    )
    pixels, plain = pixels_of(tmp_path / "grid.png"), pixels_of(tmp_path / "plain.png")
    first = box_of(pixels, 255, 0, 0)
    right = box_of(pixels, 0, 255, 0)
    below = box_of(pixels, 1, 2, 255)
    for top, left in (first[:2], below[:2]):
        assert dark(pixels[top : top + 64, :left]).any()
    for left in (first[1], right[1]):
        assert dark(pixels[first[0] - 20 : first[0], left : left + 64]).any()
    assert dark(pixels[:30, : first[1]]).any()  # the title
    assert not dark(pixels[[0, -1]]).any() and not dark(pixels[:, [0, -1]]).any()
    assert pixels.shape[0] > plain.shape[0] + 40 and pixels.shape[1] > plain.shape[1] + 40


def test_text_longer_than_its_space_is_wrapped_inside_the_picture(tmp_path: Path) -> None:
    picture = colour(255, 0, 0, 48, 96)
    words = "many words that do not fit above one narrow picture"
    save_png(tmp_path / "grid.png", [[picture]], row_labels=[words], column_labels=[words])
    pixels = pixels_of(tmp_path / "grid.png")
    assert pixels.shape[1] < 4 * 96
    assert not dark(pixels[[0, -1]]).any() and not dark(pixels[:, [0, -1]]).any()


def test_labels_above_narrow_pictures_do_not_touch(tmp_path: Path) -> None:
    row = [colour(255, 0, 0, 32, 32), colour(0, 255, 0, 32, 32)]
    save_png(tmp_path / "grid.png", [row], column_labels=["contribution 0", "contribution 1"])
    pixels = pixels_of(tmp_path / "grid.png")
    first, second = box_of(pixels, 255, 0, 0), box_of(pixels, 0, 255, 0)
    assert first[2:] == second[2:] == (32, 32)
    assert second[1] - first[1] > ImageFont.load_default(size=13).getlength("contribution")
    middle = (first[1] + 32 + second[1]) // 2
    assert not dark(pixels[:, middle - 1 : middle + 1]).any()


def test_a_long_file_name_is_broken_beside_its_picture(tmp_path: Path) -> None:
    row = [colour(255, 0, 0, 64, 64)]
    save_png(tmp_path / "grid.png", [row], row_labels=["9f86d081" * 16], title="MSVQVAE")
    pixels = pixels_of(tmp_path / "grid.png")
    assert pixels.shape[1] < 4 * 64
    assert not dark(pixels[[0, -1]]).any() and not dark(pixels[:, [0, -1]]).any()


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], {}, "rows holds no picture"),
        ([[None]], {}, "rows holds no picture"),
        ([[torch.zeros(3, 4, 4)]], {}, r"float32; expected uint8 \(3, h, w\)"),
        ([[torch.zeros(1, 4, 4, dtype=torch.uint8)]], {}, r"shape \(1, 4, 4\)"),
        ([[colour(1, 2, 3)]], {"row_labels": ["a", "b"]}, "2 labels for 1 rows"),
        ([[colour(1, 2, 3)]], {"column_labels": []}, "0 labels for 1 columns"),
    ],
)
def test_bad_grids(
    tmp_path: Path, rows: list[list[torch.Tensor]], labels: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        save_png(tmp_path / "grid.png", rows, **labels)
    assert list(tmp_path.iterdir()) == []


# --- writing ---


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new/é 猫/grid.png"
    for _ in range(2):  # the second time over the first
        save_png(path, [[colour(1, 2, 3)]], title="é")
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file/grid.png", tmp_path / "folder.png"):
        with pytest.raises(InputError) as error:
            save_png(path, [[colour(1, 2, 3)]])
        assert str(error.value).startswith(f"cannot write {str(path)!r}: ")
        assert "\n" not in str(error.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failed_write_keeps_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.png"
    save_png(path, [[colour(1, 2, 3)]])
    before = path.read_bytes()

    def full_disk(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        save_png(path, [[colour(9, 9, 9)]])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_a_very_long_word_is_broken_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    font, measured = ImageFont.load_default(size=13), []
    length = font.getlength
    monkeypatch.setattr(font, "getlength", lambda text: measured.append(text) or length(text))
    monkeypatch.setattr(ImageFont, "load_default", lambda size: font)
    text = pictures._text("x" * 1000, 13, 104)
    assert "".join(text.lines) == "x" * 1000
    assert len(measured) < 3000
