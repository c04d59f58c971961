"""The least time a device allows: bytes over its bandwidth, operations over its matrix rate."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """What a device reaches on large sizes: a copy, matrix products in half and full precision."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    float32_flops_per_s: float

    def floor(self, moved_bytes: float, flops: float, float32_flops: float = 0.0) -> float:
        """Seconds: the largest of the three."""
        return max(
            moved_bytes / self.bytes_per_s,
            flops / self.flops_per_s,
            float32_flops / self.float32_flops_per_s,
        )


H200 = Device("H200", 4.3e12, 790e12, 60e12)


def search_cost(n: int, k: int, d: int, itemsize: int) -> tuple[float, float]:
    """Bytes and operations of `nearest_code`: latents and codebook in, int64 codes out."""
    return n * d * itemsize + k * d * 4 + n * 8, 2 * n * k * d


def quantize_cost(n: int, k: int, d: int, itemsize: int) -> tuple[float, float]:
    """The same for `vector_quantize`: also z_q, counts and sums out."""
    moved, flops = search_cost(n, k, d, itemsize)
    return moved + n * d * itemsize + k * (d * 4 + 8), flops


def table() -> str:
    """Predicted floors of the quantizer as a Markdown table."""
    lines = [
        f"D = 64, {H200.bytes_per_s / 1e12:g} TB/s, {H200.flops_per_s / 1e12:g} TFLOP/s in half "
        "precision (one pass of the filter); the larger of memory and arithmetic, in µs. These are "
        "predictions; nothing here was timed.",
        "",
        "| N | K | dtype | search | with z_q, loss and statistics |",
        "|---|---|---|---|---|",
    ]
    for n in (1048576, 262144):
        for k in (256, 512, 1024, 8192, 16384):
            for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
                costs = (search_cost(n, k, 64, itemsize), quantize_cost(n, k, 64, itemsize))
                cells = [_cell(*cost) for cost in costs]
                lines.append(f"| {n:,} | {k} | {dtype} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _cell(moved: float, flops: float) -> str:
    by_memory = moved / H200.bytes_per_s > flops / H200.flops_per_s
    return f"{1e6 * H200.floor(moved, flops):.0f} ({'memory' if by_memory else 'matrix'})"
