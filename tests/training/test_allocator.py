"""A command's steps use the memory of the step before: counted by the page faults of a process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings"),
    pytest.mark.skipif(
        _HUGE.exists() and "[always]" in _HUGE.read_text(), reason="huge pages blur the count"
    ),
]

_BLOCKS = 8
# Faults of a step before and after a command, which fails for want of a checkpoint.
_PROGRAM = f"""
import resource, sys, torch
from msvq_fast.cli import main

def step():
    tensors = [torch.zeros(int(sys.argv[1]) * 2**18) for _ in range({_BLOCKS})]

def faults():
    step(), step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
assert main(["evaluate"]) == 2
print(first, faults())
"""


def _faults(mebibytes: int, **environment: str) -> tuple[float, float]:
    """Shares of a step's pages that the system fills, before and after a command."""
    settings = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    inherited = {name: value for name, value in os.environ.items() if name not in settings}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(mebibytes)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    pages = _BLOCKS * mebibytes * 2**20 / os.sysconf("SC_PAGE_SIZE")
    before, after = done.stdout.split()
    return int(before) / pages, int(after) / pages


@pytest.mark.parametrize("mebibytes", [8, 48])
def test_steps_need_no_new_pages(mebibytes: int) -> None:
    version = tuple(int(part) for part in platform.libc_ver()[1].split("."))
    if mebibytes >= 32 and version < (2, 35):
        pytest.skip("this glibc gives blocks of 32 MiB back at once")
    before, after = _faults(mebibytes)
    if mebibytes >= 32:  # of smaller blocks glibc gives back what lies at the heap's end just then
        assert before > 0.9
    assert after < 0.1


def test_the_users_settings_count_more() -> None:
    _, after = _faults(8, MALLOC_TRIM_THRESHOLD_="131072")
    assert after > 0.9
