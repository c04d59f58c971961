"""The ahead-of-time check of the GPU kernels passes what is sound and reports what is not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

TRITON = """
import triton
import triton.language as tl

from msvq_fast.ops.backend import KernelVariant


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def product(a, b, out, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def variants():
    copied = {"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    half = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "SIDE": "constexpr"}
    return [
        KernelVariant("clean copy", copy, copied, {"BLOCK": 1024}),
        KernelVariant("clean product", product, half, {"SIDE": 64}, tensor_cores=True),
        KernelVariant("spilling product", product, half, {"SIDE": 128}, num_warps=2),
        KernelVariant("false claim", copy, copied, {"BLOCK": 256}, tensor_cores=True),
        KernelVariant("no wait", copy, copied, {"BLOCK": 256}, barrier=True),
        KernelVariant("wrong type", product, {**half, "a": "*fp32"}, {"SIDE": 64}),
    ]
"""
CUDA = """
__global__ void clean(const float* x, float* out) { out[threadIdx.x] = 2 * x[threadIdx.x]; }
"""
BOUNDED = """
__global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* out) {
  float held[96];
  for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = held[i] * held[(i + 7) % 96];
}
"""


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # with the interpreter of these tests on
        check=False,
    )


def faults(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if " on sm_" in line]


@pytest.fixture
def fixture_module(tmp_path: Path) -> Path:
    path = tmp_path / "fixture_kernels.py"
    path.write_text(TRITON, encoding="utf-8")
    return path


@needs_triton
def test_sound_kernels_pass_on_every_architecture(fixture_module: Path) -> None:
    done = check(fixture_module, "--match", "clean")
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if "clean product" in line)
    assert "0 / 0 / 0" in row
    assert all(name in row for name in (" HMMA /", " HGMMA /", " UTCHMMA"))
    assert "[6/6" in done.stderr


@needs_triton
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("spilling product", "spills registers"),
        ("false claim", "has no tensor-core instruction"),
        ("no wait", "has no barrier"),
        ("wrong type", "does not compile"),
    ],
)
def test_faults_are_reported(fixture_module: Path, name: str, complaint: str) -> None:
    done = check(fixture_module, "--match", name, "--arch", 80)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(f"{name} on sm_80 {complaint}" in line for line in faults(done)), done.stdout


@needs_triton
def test_the_table_names_every_kernel() -> None:
    text = (ROOT / "benchmarks" / "KERNELS.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    for path in (ROOT / "msvq_fast" / "ops").glob("*/triton_kernels.py"):
        module = importlib.import_module(f"msvq_fast.ops.{path.parent.name}.triton_kernels")
        named = re.findall(r"^\| `(.+?)` \|", parts[str(path.relative_to(ROOT))], flags=re.M)
        assert named == [variant.name for variant in module.variants()], "run make kernels-check"
    for path in (ROOT / "csrc").glob("*/*.cu"):
        assert str(path.relative_to(ROOT)) in parts, "run make kernels-check"


@needs_triton
def test_a_module_that_does_not_load_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n", encoding="utf-8")
    done = check(path)
    assert done.returncode == 1 and "broken.py does not load: No module named" in done.stdout


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "complaint"),
    [(CUDA, None), (BOUNDED, "spills registers"), ("int x = nothing;", "does not compile")],
)
def test_cuda_files(tmp_path: Path, code: str, complaint: str | None) -> None:
    path = tmp_path / "fixture_cuda.cu"
    path.write_text(code, encoding="utf-8")
    done = check(path, "--arch", 90)
    assert done.returncode == int(complaint is not None), done.stdout + done.stderr
    if complaint is None:
        assert "| `clean` |" in done.stdout and not faults(done)
    else:
        assert any(complaint in line for line in faults(done)), done.stdout
