"""The rules of the house that a machine can hold."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "msvq_fast"
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").exists())
SOURCES = sorted(
    path
    for folder in ("msvq_fast", "csrc", "tests", "benchmarks")
    for pattern in ("*.py", "*.h", "*.cpp", "*.cu")
    for path in (ROOT / folder).rglob(pattern)
)


def run(code: str, *flags: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_reference_and_test(op: str) -> None:
    assert (PACKAGE / "ops" / op / "reference.py").exists()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()


@pytest.mark.parametrize("op", OPS)
def test_references_are_plain(op: str) -> None:
    text = (PACKAGE / "ops" / op / "reference.py").read_text(encoding="utf-8")
    assert not re.search(r"autograd|def backward|native|triton|\b_C\b", text)


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_has_a_benchmark_and_its_results(op: str) -> None:
    folder, benchmarks = PACKAGE / "ops" / op, ROOT / "benchmarks"
    devices = []
    if (folder / "native.py").exists():  # its CUDA kernels' rows are in benchmarks/device
        assert (benchmarks / "ops" / f"bench_{op}.py").exists()
        devices.append("cpu")
    if devices or (folder / "triton_kernels.py").exists():
        devices.append("cuda")
    for device in devices:
        assert list((benchmarks / "results").rglob(f"{op}--*--{device}.json")), device


def test_package_reads_no_environment_of_its_own() -> None:
    torchrun = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"}
    glibc = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    theirs = torchrun | glibc | {"CUBLAS_WORKSPACE_CONFIG", "CI"}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "getenv" not in text, path
        for name in re.findall(r"os\.environ\b.*?[\"']([A-Z_]+)[\"']", text):
            assert name in theirs, (path, name)
        assert text.count("os.environ") == len(re.findall(r"os\.environ\b.*?[\"'][A-Z_]+", text)), (
            path
        )


def test_only_native_kernels_call_the_extension() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("torch._C", "")
        if re.search(r"\b_C\b", text.replace('find_spec("msvq_fast._C")', "")):
            inside = path.relative_to(PACKAGE).as_posix()
            assert re.fullmatch(r"ops/\w+/native(_\w+)?\.py|training/info\.py", inside), inside


def test_the_extension_knows_nothing_of_torch_or_of_the_machine_it_is_built_on() -> None:
    for path in SOURCES:
        if path.suffix != ".py":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text("utf-8")), path
    assert "=native" not in (ROOT / "CMakeLists.txt").read_text("utf-8")


# All of them are in PyTorch 2.7.0, the oldest that pyproject.toml allows, and in 2.14.1.
PRIVATE_IN_TORCH = {
    "torch._C._are_functorch_transforms_active",
    "torch._C._get_tracing_state",
    "torch._C._len_torch_dispatch_stack",
    "torch._dynamo",
    "torch._ops.OpOverload",
    "torch._subclasses.fake_tensor",
    "torch.utils._python_dispatch",
}


def test_what_is_private_in_torch_is_there_in_its_oldest_version() -> None:
    """CI has one version, so that a name which only that one has would be seen by users first."""
    used = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"\btorch(?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*", text))
        assert not re.search(r"from torch\S* import (?:\w+, )*_", text), path
    assert used == PRIVATE_IN_TORCH


def test_works_with_torch_alone() -> None:
    saving = ("safetensors", "huggingface_hub", "PIL", "yaml", "rich", "jsonargparse")
    missing = dict.fromkeys(("triton", "msvq_fast._C", *saving))
    out = run(
        f"import sys; sys.modules.update({missing}); sys.path[:0] = ['tests', 'benchmarks']\n"
        "import torch, msvq_fast\n"
        "model = msvq_fast.MSVQVAE.from_preset('tiny')\n"
        "model(torch.rand(1, 3, 64, 64)).loss.backward()\n"
        "from msvq_fast.ops.gaussian_blur.op import OP\n"
        "print(OP.why_not('native', torch.zeros(1)))\n"
        "import device.suites, tests.gpu.test_training_cuda  # make bench-gpu, make test-gpu\n"
    )
    assert "native is not available" in out


def test_import_is_light() -> None:
    out = run("import sys, msvq_fast; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert out.split() == ["False", "False"]
    times = []
    for _ in range(3):
        start = seconds_of_children()
        subprocess.run(
            [sys.executable, "-m", "msvq_fast", "--help"],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        times.append(seconds_of_children() - start)
    assert min(times) < 0.3


def seconds_of_children() -> float:
    """Processor time, of which other work takes none."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_models_leave_the_compiler_alone() -> None:
    out = run(
        "import sys, torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import msvq_fast.models, msvq_fast.priors\n"
        "print(before, 'torch._dynamo' in sys.modules)\n"
    )
    assert len(set(out.split())) == 1


# lpips and torch-fidelity bring torchvision along, natten is built for one version of PyTorch.
NOT_INSTALLED = {"lpips", "torch_fidelity", "natten", "no_such_peer"}
PACKAGED_AS = {"cv2": "opencv-python-headless", "skimage": "scikit-image"}


def test_make_test_installs_what_tests_would_be_skipped_without() -> None:
    asked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        asked |= set(re.findall(r"importorskip\(\s*[\"'](\w+)", path.read_text(encoding="utf-8")))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = "".join(re.findall(r"^(?:test|export|hf) = \[.*?\](?= #|$)", text, re.M | re.S))
    installed = set(re.findall(r'"([\w-]+)>=', extras))
    ours = {"msvq_fast", *NOT_INSTALLED}
    assert {PACKAGED_AS.get(name, name).replace("_", "-") for name in asked - ours} <= installed


def test_the_licences_of_the_photographs_are_in_the_metadata() -> None:
    table = (PACKAGE / "data" / "photos" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    named = {name.replace(" ", "-") for name in re.findall(r"\[(CC[\w ]* \d\.\d)\]", table)}
    (line,) = re.findall(
        r'^license = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
    )
    assert named and {"Apache-2.0", *named} == set(line.split(" AND "))


def test_public_names_exist() -> None:
    out = run(
        "import msvq_fast\n"
        "for name in msvq_fast.__all__: getattr(msvq_fast, name)\n"
        "for name in msvq_fast.ops.__all__: getattr(msvq_fast.ops, name)\n"
        "for name in msvq_fast.nn.__all__: getattr(msvq_fast.nn, name)\n"
        "try:\n    msvq_fast.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    assert "no attribute 'nothing'" in out


def test_architecture_names_the_folders_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = text.split("```")[3]
    named = set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    there = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert named == there
