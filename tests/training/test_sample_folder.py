from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msvq_fast import priors
from msvq_fast.data import list_images, read_image, save_png, to_uint8
from msvq_fast.training import sample
from msvq_fast.training.sample_folder import SETTINGS_FILE
from tests.training.test_sample import folders, grid, load, run

__all__ = ["folders", "grid"]  # fixtures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the images whose details were drawn."""
    numbers: list[int] = []
    finish = sample._Draws.finish

    def note(self: Any, images: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        numbers.extend(images.tolist())
        return finish(self, images, *rest)

    monkeypatch.setattr(sample._Draws, "finish", note)
    return numbers


def test_every_image_is_a_file_and_the_grid_shows_the_first(
    folders: dict[str, Path], tmp_path: Path, grid: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_SHOWN", 3)
    to = tmp_path / "new" / "images"
    options = ("--images=7", "--seed=5", "--batch_size=2", f"--folder={to}")
    assert run(folders, tmp_path / "grid.png", "maskgit", *options) == 0
    model, prior = load(folders, "maskgit")
    with torch.no_grad():
        expected = to_uint8(model.decode(priors.sample(prior, 7, seed=5)))
    paths = list_images(to, split="all")  # as evaluate --samples finds them
    assert [Path(str(path)).name for path in paths] == [f"{i:06d}.png" for i in range(7)]
    for path, image in zip(paths, expected, strict=True):
        assert (read_image(path).int() - image.int()).abs().max() <= 1
    assert [len(row) for row in grid["rows"]] == [3, 3, 3]
    assert torch.equal(grid["rows"][2][2], read_image(paths[2]))


def test_variations_of_what_was_kept_have_names_of_their_own(
    folders: dict[str, Path], tmp_path: Path, grid: dict[str, Any]
) -> None:
    to = tmp_path / "images"
    options = ("--images=4", "--reject=keep=2", "--variations=2", f"--folder={to}")
    assert run(folders, tmp_path / "grid.png", "autoregressive", *options) == 0
    kept = [int(label.split()[1]) for label in grid["row_labels"] if label.startswith("image")]
    names = {f"{image:06d}-{variation}.png" for image in kept for variation in (0, 1)}
    assert {path.name for path in to.glob("*.png")} == names and len(names) == 4
    shown = grid["rows"][2][1]  # the first image's second variation
    assert torch.equal(read_image(to / f"{kept[0]:06d}-1.png"), shown)


def test_a_stopped_drawing_goes_on(
    folders: dict[str, Path], tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_SHOWN", 1)
    to = tmp_path / "images"
    options = ("--images=6", "--batch_size=2", f"--folder={to}")
    assert run(folders, tmp_path / "grid.png", "maskgit", *options) == 0
    whole = {path.name: path.read_bytes() for path in to.iterdir()}
    (to / "000003.png").unlink()
    (to / ".000004.tmp").write_bytes(b"half")  # of the kill
    drawn.clear()
    assert run(folders, tmp_path / "other.png", "maskgit", *options) == 0
    assert drawn == [0, 1, 2, 3]  # the grid's and the missing one's batches
    assert {path.name: path.read_bytes() for path in to.glob("[0-9s]*")} == whole


def test_images_of_other_settings_are_not_mixed(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "images"
    options = ("--images=2", f"--folder={to}")
    assert run(folders, tmp_path / "grid.png", "maskgit", *options) == 0
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert run(folders, tmp_path / "grid.png", "maskgit", *options, "--seed=1") == 2
    assert "holds images of another seed; expected an empty one" in capsys.readouterr().err
    assert run(folders, tmp_path / "grid.png", "autoregressive", *options) == 2
    assert "holds images of another prior_sha256" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    (to / SETTINGS_FILE).write_text("[]")
    assert run(folders, tmp_path / "grid.png", "maskgit", *options) == 2
    assert f"{SETTINGS_FILE} is not what msvq sample writes" in capsys.readouterr().err
    (to / SETTINGS_FILE).unlink()
    assert run(folders, tmp_path / "grid.png", "maskgit", *options) == 2
    assert "holds files of something else; expected an empty one" in capsys.readouterr().err


def test_settings_may_change_before_there_is_an_image(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(tmp_path / "picture.png", [[torch.zeros(3, 16, 16, dtype=torch.uint8)]])
    to = tmp_path / "images"
    options = ("--images=2", f"--folder={to}", f"--inpaint={tmp_path}/picture.png")
    region = "--region=[0.1, 0.1, 0.2, 0.2]"
    assert run(folders, tmp_path / "grid.png", "maskgit", *options, region) == 2
    assert "holds no cell" in capsys.readouterr().err
    assert run(folders, tmp_path / "grid.png", "maskgit", *options) == 0
    assert run(folders, tmp_path / "grid.png", "maskgit", *options, region) == 2
    assert "holds images of another region" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["samples.png", "deep/grid.png"])
def test_the_grid_is_not_among_the_images(
    folders: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "images"
    assert run(folders, to / name, "maskgit", "--images=2", f"--folder={to}") == 2
    assert f"lies in folder='{to}'" in capsys.readouterr().err
    assert not to.exists()
