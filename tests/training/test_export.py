from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.torch_version import TorchVersion

from msvq_fast.cli import main
from msvq_fast.models import MSVQVAE, VQVAE2, from_preset
from msvq_fast.training import export

SMALL = {
    "resolution": 16,
    "latents": (2, 4),
    "width": 8,
    "code_dim": 4,
    "num_codes": 16,
    "num_residual_blocks": 1,
}


def small_model(preset: str) -> MSVQVAE | VQVAE2:
    """A model whose codebooks lie among its latents, so that it uses many codes."""
    torch.manual_seed(4)
    model = from_preset(preset, **SMALL).eval()
    model.initialise_codebooks(images(8))
    return model


def images(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.fixture(params=["tiny", "vqvae2-tiny"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> MSVQVAE | VQVAE2:
    model = small_model(request.param)
    model.save_pretrained(tmp_path / "model")
    return model


def command(folder: Path, *options: str) -> int:
    return main(["export", f"--checkpoint={folder / 'model'}", f"--out={folder / 'out'}", *options])


def need_onnx() -> ModuleType:
    """ONNX Runtime, or the test is skipped."""
    if TorchVersion(torch.__version__) < "2.8":
        pytest.skip("PyTorch's exporter cannot take our ops")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("kind", "file"), [("torch", "encode.pt2"), ("onnx", "encode.onnx")])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, kind: str, file: str) -> None:
    if kind == "onnx":
        need_onnx()
    small_model("tiny").save_pretrained(tmp_path / "model")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from msvq_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    options = [f"--format={kind}", f"--checkpoint={tmp_path / 'model'}", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-c", code, "export", *options],
        env={**os.environ, "HOME": str(tmp_path)},  # ONNX Runtime writes there, or says it cannot
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"msvq: error: cannot write {out / file}: File too large\n"
    assert list(out.iterdir()) == []


def test_onnx_runtime_gives_the_tokens_of_pytorch(
    model: MSVQVAE | VQVAE2, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = need_onnx()
    out = tmp_path / "out"
    assert command(tmp_path, "--size=32") == 0
    printed = capfd.readouterr()
    assert printed.err == "" and len(printed.out.splitlines()) == 3, "PyTorch's remarks are kept"
    assert "encode: 240 of 240 tokens of 3 images are PyTorch's" in printed.out
    names = ["decode.onnx", "encode.onnx", "export.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    x = images(5, 32)
    with torch.no_grad():
        codes = model.encode(x)
        image = model.decode(codes)
    assert all(len(grid.unique()) > 4 for grid in codes)
    encode = runtime.InferenceSession(out / "encode.onnx")
    found = encode.run(["codes_0", "codes_1"], {"images": x.numpy()})
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(found, codes, strict=True))
    decode = runtime.InferenceSession(out / "decode.onnx")
    (drawn,) = decode.run(["images"], {f"codes_{m}": g.numpy() for m, g in enumerate(codes)})
    torch.testing.assert_close(torch.from_numpy(drawn), image, rtol=1e-4, atol=1e-5)
    record = json.loads((out / "export.json").read_text())
    assert record["size"] == 32 and record["compared"]["encode"]["tokens"] == 240


LOAD = """
import sys
sys.modules["msvq_fast"] = None  # torch alone must do
import torch
x, codes, image = torch.load(sys.argv[2])
encode = torch.export.load(f"{sys.argv[1]}/encode.pt2").module()
decode = torch.export.load(f"{sys.argv[1]}/decode.pt2").module()
with torch.no_grad():
    assert all(torch.equal(a, b) for a, b in zip(encode(x), codes, strict=True))
    torch.testing.assert_close(decode(*codes), image, rtol=1e-5, atol=1e-6)
"""


def test_saved_graphs_need_torch_alone(model: MSVQVAE | VQVAE2, tmp_path: Path) -> None:
    # In a container the process that was killed had the same number.
    (tmp_path / "out" / f".export.{os.getpid()}").mkdir(parents=True)
    assert command(tmp_path, "--format=torch") == 0
    x = images(5)
    with torch.no_grad():
        codes = model.encode(x)
        torch.save((x, codes, model.decode(codes)), tmp_path / "expected.pt")
    arguments = [str(tmp_path / "out"), str(tmp_path / "expected.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_file_names_no_folder_of_the_machine_that_wrote_it(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        need_onnx()
    small_model("tiny").save_pretrained(tmp_path / "model")
    assert command(tmp_path, f"--format={kind}") == 0
    written = list((tmp_path / "out").iterdir())
    assert len(written) == 3
    for path in written:
        content = path.read_bytes()  # archives of torch are not compressed
        for source in (export.__file__, torch.__file__):
            assert str(Path(source).parent).encode() not in content, path.name


def test_wrong_tokens_are_told_from_rounding() -> None:
    model, x = small_model("tiny"), images(2)
    with torch.no_grad():
        codes = model.encode(x)
        assert export.compare_codes(model, x, codes)["within_rounding_of_a_tie"] == 0
        found = codes[1].clone()
        found[0, 0, 0] = twin = (int(found[0, 0, 0]) + 1) % 16
        with pytest.raises(export.ExportError, match="1 of 32 tokens of scale 1 that differ"):
            export.compare_codes(model, x, [codes[0], found])
        # A code as far from the latent as the nearest one, on its other side, but for rounding.
        z = model.latents(x, codes)[1][0, :, 0, 0]
        book = model.quantizers[1].codebook
        book[twin] = z + (z - book[codes[1][0, 0, 0]]) * (1 + 1e-6)
        found = model.encode(x)[1]
        found[0, 0, 0] = twin
        assert export.compare_codes(model, x, [codes[0], found])["within_rounding_of_a_tie"] == 1
        book[twin] = z + (z - book[codes[1][0, 0, 0]]) * 1.05  # no rounding goes that far
        with pytest.raises(export.ExportError, match="1 of 32 tokens of scale 1 that differ"):
            export.compare_codes(model, x, [codes[0], found])


def test_wrong_images_are_told_from_rounding() -> None:
    model = small_model("tiny")
    with torch.no_grad():
        codes = model.encode(images(2))
        exact = model.decode(codes)
        export.compare_images(model, codes, exact)
        with pytest.raises(export.ExportError, match="exported decode is off by"):
            export.compare_images(model, codes, exact + 1e-4)


def test_an_export_that_disagrees_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("tiny").save_pretrained(tmp_path / "model")
    assert command(tmp_path, "--format=torch") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write = export._write

    def spoiled(*arguments: object) -> export.Run:
        run = write(*arguments)
        return lambda tensors: [t + (t == 0).to(t.dtype) for t in run(tensors)]

    monkeypatch.setattr(export, "_write", spoiled)
    capsys.readouterr()
    assert command(tmp_path, "--format=torch") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "that differ from PyTorch's" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    assert command(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"format=onnx needs {missing}, which is not installed" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_exporter_that_cannot_take_our_ops_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    assert command(tmp_path) == 2
    error = capsys.readouterr().err
    assert "format=onnx needs PyTorch 2.8 or newer, it is 2.7.1+cpu" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_size_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model("tiny").save_pretrained(tmp_path / "model")
    assert command(tmp_path, "--size=20", "--format=torch") == 2
    assert "size=20; this model takes multiples of 8 pixels" in capsys.readouterr().err
