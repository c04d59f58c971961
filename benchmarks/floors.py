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


def attention_bytes(
    tokens: int, coarse: int, planes: int, d: int, itemsize: int, *, backward: bool
) -> int:
    """Bytes of one call of `local_attention`, each tensor once.

    Forward: Q, K, V of ``tokens`` and K, V of ``coarse`` tokens in, O and a float32 a query out.
    Backward: those and dO in, dQ, dK, dV out.
    """
    own, other = tokens * d * itemsize, coarse * d * itemsize
    if backward:
        return planes * (8 * own + 4 * other + 4 * tokens)
    return planes * (4 * own + 2 * other + 4 * tokens)


def keys_evaluated(side: int, cells: int, kernel: int, tile: int, block: int) -> float:
    """Keys per query that square tiles work out: their halo in whole steps, clipped at the border.

    The mean over ``side x side`` queries whose keys lie on ``cells x cells``.
    """
    radius, total = kernel // 2, 0
    spans = []
    for top in range(0, side, tile):
        bottom = min(top + tile, side) - 1
        low = max((2 * top + 1) * cells // (2 * side) - radius, 0)
        high = min((2 * bottom + 1) * cells // (2 * side) + radius, cells - 1)
        spans.append((bottom - top + 1, high - low + 1))
    for rows, height in spans:
        for columns, width in spans:
            total += rows * columns * -(-height * width // block) * block
    return total / side**2


def keys_seen(side: int, cells: int, kernel: int) -> float:
    """The mean number of keys in the clipped window of a query."""
    radius, total = kernel // 2, 0
    for y in range(side):
        centre = (2 * y + 1) * cells // (2 * side)
        total += min(centre + radius, cells - 1) - max(centre - radius, 0) + 1
    return (total / side) ** 2


def attention_table(tile: int, block: int) -> str:
    """Predicted floors of local attention as a Markdown table, for tiles of the halo kernels."""
    lines = [
        "B = 16, 8 heads, bfloat16, a coarse 32 x 32 scale with 3 x 3 windows, own token excluded. "
        f"Memory: every tensor once at {H200.bytes_per_s / 1e12:g} TB/s, in µs. Keys of a query: "
        f"those in its windows, and those that tiles of {tile} x {tile} queries work out in steps "
        f"of {block}. These are predictions; nothing here was timed.",
        "",
        "| grid | window | d | forward | backward | keys in windows | keys worked out | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in (64, 128):
        for kernel in (5, 7, 9):
            seen = keys_seen(side, side, kernel) - 1 + keys_seen(side, 32, 3)
            evaluated = sum(
                keys_evaluated(side, cells, k, tile, block)
                for cells, k in ((side, kernel), (32, 3))
            )
            for d in (32, 64, 128):
                times = [
                    1e6 * attention_bytes(side**2, 1024, 128, d, 2, backward=b) / H200.bytes_per_s
                    for b in (False, True)
                ]
                lines.append(
                    f"| {side} x {side} | {kernel} x {kernel} | {d} | {times[0]:.0f} | "
                    f"{times[1]:.0f} | {seen:.1f} | {evaluated:.1f} | {evaluated / seen:.1f} |"
                )
    return "\n".join(lines)


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
