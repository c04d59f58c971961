"""Every configuration in which the Triton kernels run: one table for launches and for the check."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from msvq_fast.ops.backend import KernelVariant
from msvq_fast.ops.local_attention.triton_backward import (
    bias_kernel,
    key_kernel,
    query_kernel,
)
from msvq_fast.ops.local_attention.triton_decode import decode_kernel
from msvq_fast.ops.local_attention.triton_forward import forward_kernel
from msvq_fast.ops.local_attention.triton_windows import POINTER

DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
WIDTHS = (16, 32, 64, 128)
_FLOAT32 = ("lse", "before", "delta", "parts")


class Shape(NamedTuple):
    """Tokens of a tile's side, tokens of a step of its loop, warps, registers at most, stages."""

    tile: int
    block: int
    warps: int
    registers: int | None = None
    stages: int = 1


class Launch(NamedTuple):
    """A kernel with all that it is compiled for."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    tensor_cores: bool
    registers: int | None = None
    """At most, from sm_90 on: what it takes for more warps there would spill before. The 255 that
    are no limit hold everywhere: the assembler aims for fewer otherwise and spills a few."""
    stages: int = 1
    """With 2, keys and values of a step travel at once, during the step before it."""


def block_width(width: int) -> int:
    """The least compiled width that holds ``width`` channels."""
    return next(size for size in WIDTHS if width <= size)


def step_rows(width: int) -> int:
    """Queries (or keys) of a step of the elementwise kernels: 16 channels a thread."""
    return 2048 // block_width(width)


def is_small(dtype: torch.dtype, width: int, grid: tuple[int, int], biased: bool) -> bool:
    """Whether few large tiles cover a grid best: one for 8 x 8 tokens, whatever the windows."""
    return dtype != torch.float32 and width <= 64 and grid[0] * grid[1] <= 256 and not biased


# Of half precision without biases: tiles of one warp, the fastest on an H200, and of its registers
# as few as do not spill.
_MEASURED = {
    ("forward_kernel", 16): Shape(4, 16, 1, 80),
    ("forward_kernel", 32): Shape(4, 16, 1, 104, stages=2),
    ("forward_kernel", 64): Shape(4, 16, 1, 144, stages=2),
    ("query_kernel", 16): Shape(4, 16, 1, 96),
    ("query_kernel", 32): Shape(4, 16, 1, 128, stages=2),
    ("query_kernel", 64): Shape(4, 16, 1, 160, stages=2),
    ("key_kernel", 16): Shape(4, 16, 1, 80),
    ("key_kernel", 32): Shape(4, 16, 1, 120, stages=2),
    ("key_kernel", 64): Shape(4, 16, 1, 168, stages=2),
    ("key_kernel", 128): Shape(4, 16, 2),
}


def _shape(name: str, half: bool, width: int, small: bool, biased: bool) -> Shape:
    """The most that fits the registers of every architecture without spilling.

    In half precision one warp owns the 16 rows of a tile of queries, so that no softmax leaves it;
    key tiles keep two sums. A bias takes an address per pair: smaller steps or more warps.
    """
    if half and not small and not biased and (name, width) in _MEASURED:
        return _MEASURED[name, width]
    if name == "key_kernel":
        if not half:
            return Shape(4, 16, 8, 255)
        return Shape(8, 32, 8, 96 if width == 16 else None) if small else Shape(4, 16, 4)
    if half:
        if small:
            return Shape(8, 32, 8 if name == "query_kernel" and width == 64 else 4)
        if width >= 64:
            return Shape(4, 16, 2)
        return Shape(4, 16, 1, 128 if width == 16 else 200 if name == "forward_kernel" else 168)
    if name == "query_kernel":
        return Shape(4, 16, 2 if width == 32 else 8, None if width == 128 else 255)
    return Shape(4, 16, 8 if width == 128 else 4, 255)


def _launches() -> dict[tuple[str, torch.dtype, int, bool, bool], Launch]:
    table = {}
    for dtype in DTYPES:
        half = dtype != torch.float32
        for width in WIDTHS:
            kinds = [(False, False), (False, True)]
            if half and width <= 64:
                kinds.append((True, False))
            for small, biased in kinds:
                for kernel in (forward_kernel, query_kernel, key_kernel):
                    name = kernel.__name__
                    made = _shape(name, half, width, small, biased)
                    tile = {"T": made.tile, "BLOCK": made.block}
                    constants = {"BIAS": biased, "DP": width, **tile}
                    key = (name, dtype, width, small, biased)
                    table[key] = Launch(
                        kernel, constants, made.warps, half, made.registers, made.stages
                    )
            for kernel in (bias_kernel, decode_kernel):
                constants = {"DP": width, "BLOCK": step_rows(width)}
                key = (kernel.__name__, dtype, width, False, False)
                # With four warps, float32 keys of 32 channels spill on sm_100.
                warps = 8 if kernel is decode_kernel and not half else 4
                registers = 128 if kernel is bias_kernel and width >= 64 else None
                if kernel is decode_kernel and not half:
                    registers = 255
                table[key] = Launch(kernel, constants, warps, False, registers)
    return table


LAUNCHES = _launches()


def tile_side(name: str, dtype: torch.dtype, width: int, small: bool) -> int:
    """Tokens of the side of a tile of a kernel."""
    return LAUNCHES[name, dtype, block_width(width), small, False].constants["T"]


def launch(
    name: str,
    programs: int,
    arguments: tuple[Any, ...],
    dtype: torch.dtype,
    width: int,
    small: bool = False,
    biased: bool = False,
) -> None:
    """Run a kernel in the configuration of `LAUNCHES` for tensors of this kind; there is no other.

    Pointers are aligned to 16 bytes, as in the check; the first argument is a tensor.
    """
    made = LAUNCHES[name, dtype, block_width(width), small, biased]
    options = {"num_warps": made.num_warps, "num_stages": made.stages}
    if made.registers is not None and _takes(made.registers, arguments[0].device):
        options["maxnreg"] = made.registers
    with torch.cuda.device_of(arguments[0]):
        made.kernel[(programs,)](*arguments, **made.constants, **options)


@functools.cache
def _takes(registers: int, device: torch.device) -> bool:
    """Whether this limit holds on this device."""
    if device.type != "cuda":
        return False
    return registers == 255 or torch.cuda.get_device_capability(device) >= (9, 0)


def variants() -> list[KernelVariant]:
    """`LAUNCHES` as they are compiled ahead of time."""
    out = []
    for (name, dtype, width, small, biased), made in LAUNCHES.items():
        label = f"{str(dtype).removeprefix('torch.')} d{width}" + " small" * small
        out.append(
            KernelVariant(
                name=f"{name} {label}" + " bias" * biased,
                kernel=made.kernel,
                signature={
                    argument: _type(argument, DTYPES[dtype], made.constants)
                    for argument in made.kernel.arg_names
                },
                constants=made.constants,
                num_warps=made.num_warps,
                num_stages=made.stages,
                tensor_cores=made.tensor_cores,
                max_registers=made.registers,
            )
        )
    return out


def _type(name: str, tokens: str, constants: dict[str, Any]) -> str:
    """The Triton type of an argument of any of the kernels."""
    if name in constants:
        return "constexpr"
    if name == "scale":
        return "fp32"
    if name == "positions":
        return "*i64"
    if POINTER.fullmatch(name):
        return "*fp32" if name in _FLOAT32 else tokens
    return "i64" if name.endswith("_b") else "i32"
