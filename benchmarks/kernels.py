"""Compile every GPU kernel ahead of time, without a GPU, and say what the compiler made of it.

python benchmarks/kernels.py [FILE ...] [--arch 80 90 100] [--match TEXT] [--out FILE]

Without FILE: every ``triton_kernels.py``, ``*_cuda.cu`` and (for sm_90a alone) ``*_hopper.cu`` of
the package, written as a table to ``benchmarks/KERNELS.md``; with FILEs their table is printed.
Exit status 1, and one line each, for a kernel that does not compile, spills, needs more shared
memory than a block can have, or lacks the tensor-core instructions or the barrier it claims. Only
Triton's own cache keeps anything.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined; it would not compile

import floors

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
MAX_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10}  # bytes a block may have; else 227 KiB
TENSOR_CORE = re.compile(r"\b((?:UTC)?[A-Z]{1,2}MMA)\b")  # HMMA, HGMMA, UTCHMMA
CLAIMED_ON = (80, 90, 100)


class Compiled(NamedTuple):
    """One kernel on one architecture; ``error`` if there is none."""

    source: str
    name: str
    arch: int
    order: int
    settings: str = ""
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    tensor_cores: str = ""
    loop: int = 0
    claims_tensor_cores: bool = False
    lacks_barrier: bool = False
    error: str = ""


_variants: list[tuple[str, Any]] = []  # inherited by the forked workers: kernels do not pickle


def source_name(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def load(path: Path) -> Any:
    """Import a kernel module, one of the package under its own name."""
    path = path.resolve()
    if path.is_relative_to(ROOT / "msvq_fast"):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_variant(index: int, arch: int) -> list[Compiled]:
    """Compile one Triton variant and read its resources and instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, variant = _variants[index]
    row = Compiled(
        source,
        variant.name,
        arch,
        index,
        f"{variant.num_warps} warps, {variant.num_stages} stages",
        claims_tensor_cores=variant.tensor_cores,
    )
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(variant.signature.values())
        if kind.startswith("*")
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if "enable_fp_fusion" in _option_names():
        options["enable_fp_fusion"] = variant.fp_fusion  # unset, Triton 3.9 warns of it
    if variant.max_registers is not None and (arch >= 90 or variant.max_registers == 255):
        options["maxnreg"] = variant.max_registers
    try:
        made = triton.compile(
            ASTSource(variant.kernel, variant.signature, variant.constants, aligned),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
    except Exception as error:
        return [row._replace(error=_one_line(error))]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = _sass(file.name)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return [
        row._replace(
            registers=usage["REG"],
            stack=usage["STACK"],
            spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
            shared=made.metadata.shared,
            loop=_inner_loop(text),
            tensor_cores=_tensor_cores(text),
            lacks_barrier=variant.barrier and "BAR.SYNC" not in text,
        )
    ]


def _sass(cubin: str) -> str:
    command = [_cuobjdump(), "--dump-resource-usage", "--dump-sass", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _tensor_cores(sass: str) -> str:
    found = Counter(TENSOR_CORE.findall(sass))
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()))


def _inner_loop(sass: str) -> int:
    """Instructions of the smallest loop with products in it, or 0 if there is none.

    Of a kernel that has products of warpgroups they are those.
    """
    products = "HGMMA" if "HGMMA" in sass else "MMA|FFMA"
    lines = [
        (int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass)
    ]
    sizes = []
    for at, code in lines:
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", code)
        if target and int(target[1], 16) < at:
            body = [code for where, code in lines if int(target[1], 16) <= where <= at]
            if any(re.search(products, code) for code in body):
                sizes.append(len(body))
    return min(sizes, default=0)


def _option_names() -> set[str]:
    from triton.backends.nvidia.compiler import CUDAOptions

    return set(CUDAOptions.__dataclass_fields__)


def _cuobjdump() -> str:
    import triton

    return triton.knobs.nvidia.cuobjdump.path


def compile_cuda(path: Path, order: int, arch: int) -> list[Compiled]:
    """Compile a .cu file and read what ptxas says of each of its kernels."""
    row = Compiled(source_name(path), path.name, arch, order)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["nvcc", "-cubin", f"-arch=sm_{arch}{'a' * _is_hopper(path)}", "-std=c++17", "-O3",
             "-Xptxas", "-v", "-I", str(ROOT / "csrc"), "-o", f"{folder}/out.cubin", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            return [row._replace(error=_one_line("; ".join(lines[:3]) or done.stderr))]
        listing = _sass(f"{folder}/out.cubin") if _is_hopper(path) else ""
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
    rows = []
    for part in done.stderr.split("Compiling entry function '")[1:]:
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        name = re.split(r"'", part, maxsplit=1)[0]
        rows.append(
            row._replace(
                name=name,
                registers=_number(r"Used (\d+) registers", part),
                spills=sum(map(int, spilled[:2])),
                stack=_number(r"(\d+) bytes stack frame", part),
                shared=_number(r"(\d+) bytes smem", part),
                loop=_inner_loop(functions.get(name, "")),
                tensor_cores=_tensor_cores(functions.get(name, "")),
                claims_tensor_cores=_is_hopper(path)
                and any(kernel in name for kernel in ("quantize_kernel", "bands_kernel")),
            )
        )
    names = _demangle([r.name for r in rows])
    return [r._replace(name=name) for r, name in zip(rows, names, strict=True)]


def _is_hopper(path: Path) -> bool:
    return path.name.endswith("_hopper.cu")


def _demangle(names: list[str]) -> list[str]:
    """Kernel names without namespaces, return types and parameters, where c++filt is installed."""
    if shutil.which("c++filt") is None or not names:
        return names
    text = subprocess.run(
        ["c++filt", *names], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [line.replace("(anonymous namespace)::", "").removeprefix("void ") for line in text]
    return [re.sub(r"\b\w+::", "", re.sub(r"\((?![A-Za-z ]+\)\d).*", "", line)) for line in short]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


def faults(row: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, one line each."""
    where = f"{row.source}: {row.name} on sm_{row.arch}"
    if row.error:
        return [f"{where} does not compile: {row.error}"]
    found = []
    if row.spills:
        found.append(f"{where} spills registers ({row.spills}, stack {row.stack} bytes)")
    limit = MAX_SHARED.get(row.arch, 227 << 10)
    if row.shared > limit:
        found.append(f"{where} needs {row.shared} bytes of shared memory; a block has {limit}")
    if row.claims_tensor_cores and row.arch in CLAIMED_ON and not row.tensor_cores:
        found.append(f"{where} has no tensor-core instruction")
    if row.lacks_barrier:
        found.append(f"{where} has no barrier")
    return found


def table(rows: list[Compiled], architectures: list[int]) -> str:
    """One Markdown row per kernel; the architectures beside each other in every cell."""
    names = " / ".join(f"sm_{arch}" for arch in architectures)
    parts = []
    grouped: dict[str, dict[tuple[int, str], dict[int, Compiled]]] = {}
    for row in sorted(rows, key=lambda r: (r.source, r.order, r.name, r.arch)):
        grouped.setdefault(row.source, {}).setdefault((row.order, row.name), {})[row.arch] = row
    for source, kernels in grouped.items():
        parts.append(
            f"## {source}\n\n| kernel | launch | registers, {names} | shared KiB | spills "
            "| tensor cores | loop |\n|---|---|---|---|---|---|---|"
        )
        for (_, name), by_arch in kernels.items():
            made = [by_arch.get(arch) for arch in architectures]
            cells = (
                [str(r.registers) if r and not r.error else "-" for r in made],
                [f"{r.shared / 1024:.3g}" if r and not r.error else "-" for r in made],
                [str(r.spills) if r and not r.error else "-" for r in made],
                [(r.tensor_cores if r else "") or "-" for r in made],
                [str((r.loop if r else 0) or "-") for r in made],
            )
            joined = " | ".join(" / ".join(cell) for cell in cells)
            launch = next(iter(by_arch.values())).settings
            parts[-1] += f"\n| `{name}` | {launch} | {joined} |"
    return "\n\n".join(parts)


def document(rows: list[Compiled], architectures: list[int]) -> str:
    return (
        "# What the compilers make of the GPU kernels\n\n"
        f"Made by `make kernels-check` with {_compilers()}; no GPU was used. Figures are for "
        f"{', '.join(f'sm_{arch}' for arch in architectures)} in that order. Spills are local "
        "loads and stores in the machine code (Triton) or bytes (CUDA); the check fails on any. "
        "Loop is the instructions of the smallest loop with products in it.\n\n"
        f"{table(rows, architectures) or 'There is no GPU kernel yet.'}\n\n"
        f"## Predicted floors of the quantizer on an {floors.H200.name}\n\n{floors.table()}\n\n"
        f"## Predicted floors of local attention on an {floors.H200.name}\n\n"
        f"{floors.attention_table(*_halo_tile())}\n"
    )


def _halo_tile() -> tuple[int, int]:
    """Side of a tile and keys of a step of the attention's forward on a large grid."""
    for variant in load(ROOT / "msvq_fast/ops/local_attention/triton_kernels.py").variants():
        if variant.name == "forward_kernel bfloat16 d32":
            return variant.constants["T"], variant.constants["BLOCK"]
    raise LookupError("no variant of this name: forward_kernel bfloat16 d32")


def _compilers() -> str:
    import triton

    names = [f"Triton {triton.__version__}"]
    if shutil.which("nvcc"):
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
        release = re.search(r"release ([\d.]+)", text.stdout)
        names.append(f"nvcc {release[1] if release else 'of unknown release'}")
    return " and ".join(names)


def main() -> int:
    """Compile, report and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all of the package")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--match", default="", help="only Triton variants whose name has this")
    parser.add_argument("--out", type=Path, help="where the table goes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    files = asked.files or [
        *sorted((ROOT / "msvq_fast" / "ops").glob("*/triton_kernels.py")),
        *sorted((ROOT / "csrc").glob("*/*_cuda.cu")),
        *sorted((ROOT / "csrc").glob("*/*_hopper.cu")),
    ]
    problems, tasks = [], []
    for order, path in enumerate(files):
        if path.suffix == ".cu":
            if shutil.which("nvcc") is None:
                print(f"not compiled, nvcc is missing: {source_name(path)}", file=sys.stderr)
                continue
            there = [arch for arch in asked.arch if arch == 90 or not _is_hopper(path)]
            tasks += [(compile_cuda, path, order, arch) for arch in there]
            continue
        try:
            variants = load(path).variants()
        except Exception as error:
            problems.append(f"{source_name(path)} does not load: {_one_line(error)}")
            continue
        for variant in variants:
            if asked.match in variant.name:
                _variants.append((source_name(path), variant))
                tasks += [(compile_variant, len(_variants) - 1, arch) for arch in asked.arch]
    rows: list[Compiled] = []
    # Forked, so that the workers have the kernels; nothing was compiled in this process before.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max(1, min(asked.jobs, len(tasks))), mp_context=context) as pool:
        start = time.perf_counter()
        waiting = [pool.submit(*task) for task in tasks]
        for count, future in enumerate(as_completed(waiting), 1):
            rows += future.result()
            row = rows[-1] if rows else None
            label = f"{row.source} {row.name} sm_{row.arch}" if row else ""
            seconds = time.perf_counter() - start
            print(f"[{count}/{len(tasks)}, {seconds:.0f} s] {label}", file=sys.stderr, flush=True)
    for row in sorted(rows, key=lambda r: (r.source, r.order, r.name, r.arch)):
        problems += faults(row)
    if not rows and not problems:
        parser.error("nothing to compile: no kernel has this name, or nvcc is missing")
    whole = not (asked.files or asked.match) and set(asked.arch) == set(ARCHITECTURES)
    if asked.out or whole:
        out = asked.out or ROOT / "benchmarks" / "KERNELS.md"
        out.write_text(document(rows, asked.arch), encoding="utf-8")
    else:
        print(table(rows, asked.arch))
    for problem in problems:
        print(problem)
    print(f"{len(rows)} kernels compiled, {len(problems)} faults", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
