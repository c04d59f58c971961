"""The build never fails the install, and loses no more than what cannot be built."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("pybind11")
pytest.importorskip("setuptools")

# Fails to build unless it was configured as FAILS_UNTIL says; writes the module it is asked for.
CMAKE = """#!{python}
import json, pathlib, sys
log = pathlib.Path({log!r})
arguments = sys.argv[1:]
with log.open("a") as file:
    print(json.dumps(arguments), file=file)
if "--build" in arguments:
    configured = json.loads(log.read_text().splitlines()[-2])
    if {works!r} not in configured:
        sys.exit(1)
    words = dict(a[2:].split("=", 1) for a in configured if a.startswith("-D"))
    folder = pathlib.Path(words["MSVQ_OUTPUT_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / words["MSVQ_OUTPUT_NAME"]).write_text("built")
"""


def build(tmp_path: Path, works: str) -> tuple[str, list[str], bool]:
    tools = tmp_path / "tools"
    tools.mkdir()
    log = tmp_path / "log"
    stub = CMAKE.format(python=sys.executable, log=str(log), works=works)
    for name, text in (("cmake", stub), ("ninja", "#!/bin/sh\n"), ("nvcc", "#!/bin/sh\n")):
        path = tools / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "temp")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CUDACXX": "nvcc"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = list((tmp_path / "lib").rglob("_C*"))
    return done.stdout + done.stderr, log.read_text(encoding="utf-8").splitlines(), bool(made)


def test_a_source_distribution_can_be_built(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats", "tar", "--dist-dir", tmp_path],
        capture_output=True,
        cwd=ROOT,
        check=True,
    )
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "msvq_fast"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.split()
    assert {"CMakeLists.txt", "constraints.txt", "setup.py", *tracked} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_a_sound_build_runs_once(tmp_path: Path) -> None:
    said, calls, made = build(tmp_path, "-S")
    assert made and len(calls) == 2 and "CUDA=OFF" not in calls[0]
    assert "was not built" not in said and "CPU only" not in said


def test_failing_cuda_leaves_the_cpu_module(tmp_path: Path) -> None:
    said, calls, made = build(tmp_path, "-DMSVQ_CUDA=OFF")
    assert made and len(calls) == 4
    assert "trying again for the CPU only" in said and "was not built" not in said


def test_failing_everything_leaves_pure_python(tmp_path: Path) -> None:
    said, _, made = build(tmp_path, "never")
    assert not made and "was not built, compilation failed" in said
