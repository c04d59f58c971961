"""What the documents say runs: their Python, their command lines, the site that is made of them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from msvq_fast import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_in_the_documents_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks(path, "python"))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_is_python_in_the_documents() -> None:
    assert sum(len(blocks(path, "python")) for path in PAGES) > 10


LINES = [
    (path.name, line)
    for path in PAGES
    for block in blocks(path, "bash")
    for line in block.splitlines()
    if line.startswith("msvq ")
]


@pytest.mark.parametrize(("name", "line"), LINES)
def test_command_lines_in_the_documents_are_commands(name: str, line: str) -> None:
    _, *arguments = shlex.split(line, comments=True)
    cli.parse(arguments)


def test_the_pages_are_up_to_date() -> None:
    import pages

    for path in pages.PAGES:
        text = path.read_text(encoding="utf-8")
        assert pages.render(text) == text, f"{path.name}: run python benchmarks/pages.py"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}" in menu, path.name


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "https://fonts" not in page and "MS-VQVAE" in page
