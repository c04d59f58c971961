from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from msvq_fast.data import ImageReadError, read_centre, read_image, resize_short_side, to_float
from msvq_fast.ops.checks import InputError


def gradient(height: int, width: int) -> np.ndarray:
    """Smooth, different in every channel and in both directions, so that a turn shows."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * y // (height - 1), 255 * x // (width - 1), 255 - 255 * y // (height - 1)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- reading: every kind of pixel ---


def test_rgb_is_exact_and_channels_first(tmp_path: Path) -> None:
    pixels = gradient(5, 9)
    Image.fromarray(pixels).save(tmp_path / "é 猫 a.png")
    image = read_image(tmp_path / "é 猫 a.png")
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 9) and image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_rgb_is_not_copied_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a photograph of 170 megapixels a copy has 650 MiB."""
    Image.fromarray(gradient(16, 16)).save(tmp_path / "a.jpg")
    expected = np.asarray(Image.open(tmp_path / "a.jpg")).transpose(2, 0, 1)
    monkeypatch.setattr(Image.Image, "copy", None)
    assert np.array_equal(read_image(tmp_path / "a.jpg").numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(gradient(16, 16)).convert(mode)
    # uncompressed YCbCr is read by Pillow 13, but not by 12.0; libtiff converts it by its own rule
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    source.save(tmp_path / "x.tiff", **options)
    expected = np.asarray(source.convert("RGB")).transpose(2, 0, 1)
    found = read_image(tmp_path / "x.tiff").numpy()
    np.testing.assert_allclose(found.astype(int), expected, rtol=0, atol=int(mode == "YCbCr"))


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "cyan.jpg")[:, 4, 4].tolist()
    assert red < 10 and green > 245 and blue > 245


def declare_transparent(path: Path, grey: int) -> None:
    """Put a tRNS chunk of one 16-bit value before the pixels of a PNG."""
    head, tail = path.read_bytes().split(b"IDAT", 1)
    body = b"tRNS" + struct.pack(">H", grey)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(head[:-4] + chunk + head[-4:] + b"IDAT" + tail)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16", "RGB"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    options: dict[str, object] = {}
    if mode in ("RGBA", "LA"):
        source = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
        source.putpixel((1, 0), (0, 0, 0, 0))
        source = source.convert(mode)
    else:  # one value declared transparent
        source = Image.new(mode, (2, 1))
        if mode == "P":
            source.putpalette([0, 0, 0, 10, 20, 30])
        source.putpixel((1, 0), 1 if mode != "RGB" else (1, 1, 1))
        options["transparency"] = 1 if mode != "RGB" else (1, 1, 1)
    if mode == "I;16":  # Pillow 10 reads it, but does not write it
        source.save(tmp_path / "x.png")
        declare_transparent(tmp_path / "x.png", 1)
    else:
        source.save(tmp_path / "x.png", **options)
    assert read_image(tmp_path / "x.png")[:, 0].T.tolist() == [[0, 0, 0], [255, 255, 255]]


def test_half_transparent_mixes_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (100, 0, 200, 51)).save(tmp_path / "x.png")  # alpha 0.2
    assert read_image(tmp_path / "x.png").flatten().tolist() == [224, 204, 244]


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 257, 300, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"x{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 7 1 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    expected = np.round(levels / 257).astype(int).tolist()
    assert read_image(path).tolist() == [expected] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((2, 2), 70000, dtype=dtype)).save(tmp_path / "x.tiff")
    with pytest.raises(ImageReadError, match="no known range"):
        read_image(tmp_path / "x.tiff")


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = gradient(16, 32)
    # How the camera stored it: the inverse of what the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"quality": 100} if suffix in (".jpg", ".webp") else {}
    path = tmp_path / f"x{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **quality)
    image = read_image(path)
    assert image.shape == (3, 16, 32)
    error = image.int() - torch.from_numpy(upright).permute(2, 0, 1).int()
    assert error.float().abs().mean() < 5  # lossy formats; a wrong turn gives more than 60


def test_broken_metadata_does_not_cost_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "x.png", exif=b"Exif\0\0broken bytes")
    assert read_image(tmp_path / "x.png").unique().tolist() == [9]


def test_colour_profile_is_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "x.png", icc_profile=profile)
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [1, 2, 3]


# --- reading: reduced JPEG decoding ---


@pytest.mark.parametrize("min_side", [1, 12, 13, 25, 26, 50, 51, 99, 100, 101, 5000])
@pytest.mark.parametrize("orientation", [1, 6])
def test_min_side_is_never_undercut(tmp_path: Path, min_side: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient(100, 163)).save(tmp_path / "x.jpg", exif=exif)
    image = read_image(tmp_path / "x.jpg", min_side=min_side)
    assert min(image.shape[1:]) >= min(min_side, 100)
    assert min(image.shape[1:]) == {1: 13, 12: 13, 13: 25, 25: 25, 26: 50, 50: 50}.get(
        min_side, 100
    )
    assert (image.shape[2] > image.shape[1]) == (orientation == 1)


def test_min_side_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="min_side=0; expected at least 1"):
        read_image(tmp_path / "x.jpg", min_side=0)


# --- reading: broken files ---


def broken_files(root: Path) -> dict[str, str]:
    """File name -> a word of the reason."""
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(gradient(64, 64)).save(jpeg, "JPEG")
    Image.fromarray(gradient(64, 64)).save(png, "PNG")
    (root / "cut.jpg").write_bytes(jpeg.getvalue()[:-60])
    (root / "cut.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])
    (root / "header.png").write_bytes(png.getvalue()[:20])
    (root / "zero.png").write_bytes(b"")
    (root / "text.png").write_text("just words\n" * 30)
    (root / "vector.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")  # to open it would wait for ever
    return {
        "cut.jpg": "truncated",
        "cut.png": "",
        "header.png": "",
        "zero.png": "empty",
        "text.png": "not an image",
        "vector.jpg": "not an image",
        "folder.png": "directory",
        "absent.png": "No such file",
        "pipe.png": "not a regular file",
    }


def test_broken_files_are_named_in_one_line(tmp_path: Path) -> None:
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(ImageReadError) as error:
            read_image(tmp_path / name)
        assert repr(str(tmp_path / name)) in one_line(error)
        assert reason in str(error.value)
        assert error.value.may_pass == (name in ("folder.png", "absent.png"))


def test_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # above it Pillow warns, at twice it stops
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_image(tmp_path / "x.png").shape == (3, 100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ImageReadError, match=r"x\.png.*exceeds limit"):
        read_image(tmp_path / "x.png")


# --- sizes and ranges ---


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((60, 91), 30, (30, 46)), ((91, 60), 120, (182, 120)), ((3, 7), 1, (1, 2))],
)
def test_resize_short_side(shape: tuple[int, int], size: int, expected: tuple[int, int]) -> None:
    image = torch.from_numpy(gradient(*shape)).permute(2, 0, 1)
    assert resize_short_side(image, size).shape == (3, *expected)


def test_resize_is_antialiased_and_keeps_a_fitting_image() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    inner = resize_short_side(stripes, 16)[:, :, 2:-2]
    assert (inner.int() - 128).abs().max() <= 2
    assert resize_short_side(stripes, 64) is stripes


def test_too_narrow_to_enlarge() -> None:
    with pytest.raises(ImageReadError, match="too narrow"):
        resize_short_side(torch.zeros(3, 1, 4000, dtype=torch.uint8), 1024)


def test_to_float_spans_minus_one_to_one() -> None:
    values = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]), rtol=0, atol=1.2e-7)
    with pytest.raises(InputError, match=r"dtype torch\.float32; expected uint8"):
        to_float(values)


def test_an_image_too_narrow_for_its_centre_is_named(tmp_path: Path) -> None:
    Image.new("L", (30000, 1)).save(tmp_path / "narrow.png")
    with pytest.raises(ImageReadError, match=r"cannot use image '.*narrow\.png': .*too narrow"):
        read_centre(tmp_path / "narrow.png", 256, 256)
