"""Tile sizes of the Triton kernels, and what is compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from msvq_fast.ops.backend import KernelVariant
from msvq_fast.ops.vector_quantize import triton_codes, triton_outputs, triton_search

__all__ = [
    "CODES",
    "DTYPES",
    "STEPS",
    "added_parts",
    "block",
    "block_codes",
    "block_width",
    "filter_rows",
    "filter_stages",
    "filter_warps",
    "gathered_rows",
    "moved_codes",
    "piece_bits",
    "variants",
]

DTYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
CODES = 64  # of a tile of the filter
STEPS = {"BP": 128, "BM": 4, "BK": 256}  # pairs, or rows and codes, of a step in float64
_TYPES = {
    "half_ptr": "*fp16",
    "codes_ptr": "*i64",
    "key_ptr": "*i16",
    "order_ptr": "*i64",
    "bounds_ptr": "*i64",
    "counts_ptr": "*i64",
    "other_ptr": "*i32",
    "pending_ptr": "*i32",
    "counter_ptr": "*i32",
    "finite_ptr": "*i32",
    "part_ptr": "*fp64",
    "factor": "fp32",
    "decay": "fp32",
    "rest": "fp32",
    "eps": "fp32",
    "restart_below": "fp32",
    "start_mass": "fp32",
}


def block_width(width: int) -> int:
    """D rounded up to what a tensor-core product takes."""
    return max(16, 1 << (width - 1).bit_length())


def filter_rows(padded: int) -> int:
    """Rows of a tile of the filter."""
    return 32 if padded > 128 else 64


def filter_warps(padded: int) -> int:
    """Warps that hold a tile of the filter without spilling."""
    return 8 if padded > 64 else 4


def filter_stages(padded: int) -> int:
    """Tiles of codes in flight; wide ones leave no registers for the addresses of more than one."""
    return 1 if padded > 128 else 3


def block_codes(padded: int) -> int:
    """Codes of a step of the kernels that pack a tile, in float64."""
    return min(CODES, 2048 // padded)


def block(padded: int, whole: bool) -> dict[str, int]:
    """Rows and warps of a block of the elementwise kernels.

    Of rows that are ``whole`` in memory the addresses take most registers; of others, values that
    are neighbours in memory belong to neighbouring rows.
    """
    return (
        {"BM": 512 // padded, "num_warps": 4} if whole else {"BM": 4096 // padded, "num_warps": 8}
    )


def moved_codes(padded: int) -> int:
    """Codes of a block of the update."""
    return 512 // padded


def gathered_rows(padded: int) -> int:
    """Rows that a program asks for at a time where they lie apart."""
    return 2048 // padded


def piece_bits(count: int) -> int:
    """Of the number of sorted rows in a piece: up to 2048 pieces keep a large GPU busy."""
    return max(7, ((count - 1) // 2048).bit_length())


def added_parts(padded: int) -> int:
    """Sums of pieces that a program adds at a time, in float64."""
    return 1024 // padded


def variants() -> list[KernelVariant]:
    """What is compiled ahead of time: every dtype and block width, d dense and not."""
    out = []
    for dtype, pointer in DTYPES.items():
        name = str(dtype).removeprefix("torch.")
        for width in (16, 32, 64, 128, 256):
            for dense in (True, False):
                label = f"{name} d{width}" + ("" if dense else " strided")
                out += _variants(label, pointer, width, dense)
    for width in (16, 32, 64, 128, 256):
        flags = {"BN": CODES, "BK": block_codes(width), "BD": width}
        for kernel in (triton_codes.measure_codes, triton_codes.pack_codes):
            out.append(_variant(kernel, f"d{width}", "*fp32", flags, num_warps=8))
        flags = {"BM": added_parts(width), "BD": width}
        out.append(_variant(triton_outputs.add_parts, f"d{width}", "*fp32", flags))
    move = triton_outputs.move_codebook
    for width in (16, 64, 256):
        for smooth in (False, True):
            flags = {"LAPLACE": smooth, "RESTART": smooth, "BK": moved_codes(width), "BD": width}
            label = f"d{width}" + " laplace restart" * smooth
            out.append(_variant(move, label, "*fp32", flags, barrier=True))
    return out


def _variants(label: str, z: str, width: int, dense: bool) -> list[KernelVariant]:
    shape = block(width, dense)
    warps = shape.pop("num_warps")
    filter_sizes = {"BM": filter_rows(width), "BN": CODES, "BD": width, "UNIFORM": True}
    filter_sizes |= {"KEYS": True, "COPY": not dense}
    sizes = {**shape, "BD": width, "UNIFORM": True}
    sum_sizes = {"BM": gathered_rows(width), "BD": width, "FLAT": False, "WRITE": True}
    one = {"stride_d": 1} if dense else {"stride_inner": 1}
    step = {name: 1 for name in (("z_d", "out_d") if dense else ("z_inner", "out_inner"))}
    out_step = {name: 1 for name in step if name.startswith("out")}
    g_step = {("g_d" if dense else "g_inner"): 1}
    search, outputs = triton_search, triton_outputs
    return [
        _variant(
            search.filter_codes,
            label,
            z,
            {**filter_sizes, **one},
            num_warps=filter_warps(width),
            num_stages=filter_stages(width),
            tensor_cores=True,
        ),
        _variant(search.resolve_codes, label, z, {**STEPS, **one, "KEYS": True}, fp_fusion=False),
        _variant(outputs.write_codes, label, z, {**sizes, **out_step}, num_warps=warps),
        _variant(outputs.code_sums, label, z, {**sum_sizes, **step}),
        _variant(
            outputs.grad_latents,
            label,
            z,
            {**sizes, **step, **g_step, "THROUGH": True},
            num_warps=warps,
        ),
    ]


def _variant(
    kernel: Any, label: str, z: str, constants: dict[str, Any], **options: Any
) -> KernelVariant:
    images = ("z_ptr", "z_q_ptr", "grad_z_q_ptr", "grad_z_ptr", "copy_ptr")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in images:
            signature[name] = z
        else:
            signature[name] = _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
    return KernelVariant(f"{kernel.__name__} {label}", kernel, signature, constants, **options)
