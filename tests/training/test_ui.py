"""`msvq ui`: what it shows, and the page itself in a real browser where there is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from msvq_fast.cli import main
from msvq_fast.data import signed_to_uint8, to_uint8
from msvq_fast.models import from_preset
from msvq_fast.ops import InputError
from msvq_fast.priors import MaskGITPrior, PriorConfig
from msvq_fast.training.reconstruct import common_gain
from msvq_fast.training.ui import Viewer, build_page

SMALL = {"resolution": 32, "latents": (4, 8), "width": 16, "code_dim": 8, "num_codes": 16}
GRIDS = ((4, 4), (8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a prior over its codes and a picture of 60 x 40 pixels."""
    root = tmp_path_factory.mktemp("ui")
    torch.manual_seed(1)
    model = from_preset("tiny", **SMALL)
    model.initialise_codebooks(torch.rand(8, 3, 32, 32) * 2 - 1)
    model.save_pretrained(root / "model")
    MaskGITPrior(PriorConfig(GRIDS, num_codes=16, width=32, heads=2, depth=1)).save_pretrained(
        root / "prior"
    )
    y, x = np.mgrid[0:40, 0:60]
    pixels = np.stack([4 * x, 6 * y, 255 - 4 * x], -1).astype(np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    return root


@pytest.fixture(scope="module")
def viewer(folder: Path) -> Viewer:
    from msvq_fast import models, priors

    model = models.from_pretrained(folder / "model")
    return Viewer(model, priors.from_pretrained(folder / "prior"), torch.device("cpu"))


def test_it_shows_sums_contributions_and_codes(viewer: Viewer, folder: Path) -> None:
    sums, contributions, maps = viewer.look(folder / "picture.png")
    assert [caption.partition(",")[0] for _, caption in sums] == [
        "image",
        "sum of 0",
        "sum of 0..1",
    ]
    assert len(contributions) == len(maps) == 2
    for picture, _ in (*sums, *contributions, *maps):
        assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
    assert np.array_equal(contributions[0][0], sums[1][0]), "the first sum is the first part"
    x = viewer.read(folder / "picture.png")
    assert np.array_equal(sums[0][0][4::8, 4::8].transpose(2, 0, 1), to_uint8(x[0]).numpy())
    with torch.no_grad():
        codes = viewer.model.eval().encode(x)
        part = viewer.model.contributions(codes)[1]
    gain = common_gain([part])
    assert contributions[1][1] == f"contribution 1 around grey, x {gain}" and gain > 1
    shown = contributions[1][0][4::8, 4::8].transpose(2, 0, 1)  # every pixel is 8 x 8
    assert np.abs(shown.astype(int) - signed_to_uint8(part[0], gain).numpy()).max() <= 1
    assert f"codes 1, 8x8, {len(codes[1].unique())} different" == maps[1][1]


def test_clicks_of_two_people_wait_for_each_other(
    viewer: Viewer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path, modes = viewer.model, folder / "picture.png", []
    encode = model.encode

    def slow(x: torch.Tensor) -> list[torch.Tensor]:
        time.sleep(0.05)
        modes.append((model.training, torch.backends.cudnn.allow_tf32))
        return encode(x)

    monkeypatch.setattr(model, "encode", slow)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model.train()
    shown = [viewer.look(path)[0][-1][0], viewer.redraw(path, 1, 0)[0][0]]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            look, redraw = pool.submit(viewer.look, path), pool.submit(viewer.redraw, path, 1, 0)
            assert np.array_equal(look.result()[0][-1][0], shown[0])
            assert np.array_equal(redraw.result()[0][0], shown[1])
            assert model.training and torch.backends.cudnn.allow_tf32, "left as they were"
    assert modes == [(False, False)] * 8


def test_a_prior_of_images_of_another_size_is_refused(viewer: Viewer) -> None:
    larger = PriorConfig(((8, 8), (16, 16)), num_codes=16, width=32, heads=2, depth=1)
    with pytest.raises(InputError, match=r"draws grids .*16\)\); the page shows images of 32 px"):
        Viewer(viewer.model, MaskGITPrior(larger), torch.device("cpu"))


def test_a_prior_of_other_codes_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", sys)  # not needed before the page
    config = PriorConfig(GRIDS, num_codes=6, width=32, heads=2, depth=1)
    MaskGITPrior(config).save_pretrained(tmp_path)
    assert main(["ui", f"--checkpoint={folder / 'model'}", f"--prior={tmp_path}"]) == 2
    assert "of 6 codes; " in capsys.readouterr().err


def test_drawings_keep_the_coarse_codes(
    viewer: Viewer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], viewer.model.decode

    def note(codes: list[torch.Tensor]) -> torch.Tensor:
        decoded.append(codes)
        return decode(codes)

    monkeypatch.setattr(viewer.model, "decode", note)
    drawn = viewer.redraw(folder / "picture.png", 3, seed=5)
    again = viewer.redraw(folder / "picture.png", 3, seed=5)
    assert len(drawn) == 3
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    viewer.redraw(folder / "picture.png", 3, seed=6)
    coarse = viewer.model.encode(viewer.read(folder / "picture.png"))[0]
    assert all(torch.equal(codes[0], coarse.expand(3, -1, -1)) for codes in decoded)
    assert torch.equal(decoded[0][1], decoded[1][1]) and not torch.equal(
        *(c[1] for c in decoded[1:])
    )
    with pytest.raises(InputError, match="count=9; expected 1 to 8"):
        viewer.redraw(folder / "picture.png", 9, seed=5)
    with pytest.raises(InputError, match="count=None; expected 1 to 8"):
        viewer.redraw(folder / "picture.png", None, seed=5)
    with pytest.raises(InputError, match="seed=None; expected a whole number"):
        viewer.redraw(folder / "picture.png", 3, seed=None)
    with pytest.raises(InputError, match="drawing needs one"):
        Viewer(viewer.model, None, torch.device("cpu")).redraw(folder / "picture.png", 1, 0)


def test_the_page_shows_pixels_as_they_are(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio's own format is a WebP that loses some."""
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    build_page(viewer)
    galleries = gradio.Gallery.call_args_list
    assert len(galleries) >= 3
    assert all(gallery.kwargs["format"] == "png" for gallery in galleries)


def test_gradio_is_named_where_it_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui", f"--checkpoint={folder / 'model'}"]) == 2
    assert "msvq ui needs gradio, which is not installed" in capsys.readouterr().err


def _why_no_browser() -> str | None:
    for package in ("gradio", "selenium"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    return None


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Where a running `msvq ui` listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = [f"--checkpoint={folder / 'model'}", f"--prior={folder / 'prior'}", "--device=cpu"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "msvq_fast", "ui", *models, f"--port={port}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    flags += " disable-background-networking disable-component-update window-size=1200,1500"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(_why_no_browser() is not None, reason=str(_why_no_browser()))
@pytest.mark.filterwarnings("ignore")
def test_the_page_in_a_browser(address: str, browser: Any, folder: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 60)

    def pictures(key: str) -> list[Any]:
        found = browser.find_elements(By.CSS_SELECTOR, f"#{key} .grid-container img")
        width = "return arguments[0].naturalWidth"
        return [i for i in found if browser.execute_script(width, i) == 256]

    browser.get(address)
    wait.until(lambda d: d.find_elements(By.ID, "show"))
    browser.find_element(By.ID, "show").click()
    wait.until(lambda d: "upload one first" in d.find_element(By.TAG_NAME, "body").text)
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(folder / "picture.png"))
    wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "img[src*='picture.png']"))
    browser.find_element(By.ID, "show").click()
    for key, count in (("sums", 3), ("contributions", 2), ("maps", 2)):
        wait.until(lambda d, key=key, count=count: len(pictures(key)) == count)
    assert "PSNR" in browser.find_element(By.ID, "sums").text
    browser.find_element(By.ID, "draw").click()
    wait.until(lambda d: len(pictures("drawn")) == 4)
    browser.save_screenshot(str(tmp_path / "page.png"))
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert not refused, refused
