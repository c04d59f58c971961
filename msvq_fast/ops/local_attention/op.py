"""Cross-scale local attention (§3.3): contract, checks, choice of kernel, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msvq_fast.ops.backend import Op
from msvq_fast.ops.checks import InputError, check_choice, check_float
from msvq_fast.ops.local_attention import reference
from msvq_fast.ops.local_attention.windows import Windows, bias_size

ORDERS = ("bidirectional", "raster")
BORDERS = ("clip", "shift")
OP = Op(__package__)

Kernel = int | str


def local_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    grids: Sequence[tuple[int, int]],
    kernels: Sequence[Kernel],
    order: str = "bidirectional",
    include_self: bool = False,
    border: str = "clip",
    bias: Sequence[Tensor | None] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to small windows of the own grid and of every coarser one, in one softmax (§3.3).

    The query at ``(y, x)`` of the last grid ``(h_m, w_m)`` sees, on scale n with grid
    ``(h_n, w_n)``, the ``k_n x k_n`` window centred on its cell
    ``(((2y + 1) h_n) // (2 h_m), ((2x + 1) w_n) // (2 w_m))``; grids of any ratio will do.

    Args:
        q: ``(B, heads, N_m, d)`` queries in raster order of the last grid; float32, float64,
            bfloat16 or float16.
        keys: One ``(B, kv_heads, N_n, d)`` per scale, coarse to fine; the last lies on the query's
            own grid. ``kv_heads`` divides ``heads``; query head h reads key head
            ``h * kv_heads // heads``.
        values: As ``keys``.
        grids: ``(h, w)`` of every scale.
        kernels: Per scale an odd window size in cells, 0 (scale unused) or ``"full"`` (all of it).
        order: Of the own scale: ``"bidirectional"``, or ``"raster"`` (only tokens before the query
            in raster order).
        include_self: Whether a query sees the own-scale key at its own position.
        border: ``"clip"`` drops the cells outside the grid; ``"shift"`` moves the window inside, so
            that every query sees ``min(k, size)`` cells an axis.
        bias: Added to the scores: per scale None or ``(heads, k, k)``, indexed
            ``[y' - c_y + r, x' - c_x + r]``; ``(heads, 2k - 1, 2k - 1)`` and ``k - 1`` for r with
            ``border="shift"``. -inf leaves a key out. A ``"full"`` scale takes none.
        scale: Factor of the dot products; None takes ``d ** -0.5``; 0.0 is 0.0.
        backend: ``None`` picks; ``"reference"``, ``"native"`` (CPU tensors) or ``"triton"`` (CUDA
            tensors) runs or raises.

    Returns:
        ``(B, heads, N_m, d)``, the dtype of ``q``. A query that sees no key gets 0.

    Gradient:
        To ``q``, ``keys``, ``values`` and ``bias``; once differentiable (the reference: always).
        Kernels keep the output and one float32 per query, and gather every gradient over
        the inverse windows: no atomics, the same bits every time. A query that sees no key neither
        receives nor sends any gradient.

    Raises:
        InputError: For shapes, grids, kernels, dtypes or devices that do not fit together.

    Numerics:
        Scores, softmax and sums in float32 (float64 for float64) and one rounding at the end. The
        kernels multiply a weight of exactly zero with values inside the halo of a tile, so a NaN
        among the values may reach queries nearby that do not see it.
    """
    windows = check_windows(q, keys, values, grids, kernels, order, include_self, border)
    relative = check_bias(bias, q, kernels, windows.shift)
    used = [n for n, kernel in enumerate(kernels) if kernel != 0]
    keys, values = [keys[n] for n in used], [values[n] for n in used]
    relative = [relative[n] for n in used]
    scale = check_scale(scale, q)
    chosen = OP.pick(q, keys, values, relative, windows, backend=backend)
    if chosen == "reference":
        return reference.local_attention(q, keys, values, relative, windows, scale)
    return _LocalAttention.apply(windows, scale, chosen, q, *keys, *values, *relative)


def check_windows(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    kernels: Sequence[Kernel],
    order: str,
    include_self: bool,
    border: str,
    *,
    positions: Tensor | None = None,
) -> Windows:
    """Check everything but the bias and return the windows of the scales in use.

    With ``positions``, q holds the queries there alone, and the last keys may be a ring of rows.
    """
    scales = len(grids)
    if scales == 0:
        raise InputError("grids is empty; expected one (h, w) per scale, coarse to fine")
    check_kernels(kernels)
    for name, items in (("keys", keys), ("values", values), ("kernels", kernels)):
        if len(items) != scales:
            raise InputError(f"{name} has {len(items)} entries; expected {scales}, one per grid")
    check_order(order, border)
    for n, grid in enumerate(grids):
        pair = isinstance(grid, Sequence) and len(grid) == 2
        if not pair or any(not isinstance(s, (int, torch.SymInt)) or s < 1 for s in grid):
            raise InputError(f"grids[{n}]={grid}; expected ints (h, w), both at least 1")
    check_float("q", q)
    if q.dim() != 4:
        raise InputError(f"q has shape {tuple(q.shape)}; expected 4 dimensions (B, heads, N_m, d)")
    batch, heads, tokens, width = q.shape
    if heads < 1 or width < 1:
        raise InputError(f"q has shape {tuple(q.shape)}; expected at least one head and d >= 1")
    height_m, width_m = grids[-1]
    if positions is not None:
        if positions.dtype != torch.int64 or positions.shape != (tokens,):
            raise InputError(
                f"positions has dtype {positions.dtype} and shape {tuple(positions.shape)}; "
                f"expected int64 and {(tokens,)} for q's {tokens} queries"
            )
        if positions.device != q.device:
            raise InputError(f"positions is on {positions.device}; expected q's {q.device}")
    elif tokens != height_m * width_m:
        raise InputError(
            f"q has {tokens} tokens; expected {height_m * width_m} for grids[-1]={grids[-1]}"
        )
    kv_heads = keys[0].shape[1] if keys[0].dim() == 4 else 0
    for name, items in (("keys", keys), ("values", values)):
        for n, item in enumerate(items):
            h, w = grids[n]
            if positions is not None and order == "raster" and n == scales - 1 and item.dim() == 4:
                h = _ring_rows(f"keys[{n}]", keys[n], grids[n], kernels[n])
            if item.dim() != 4 or item.shape[2] != h * w:
                raise InputError(
                    f"{name}[{n}] has shape {tuple(item.shape)}; expected (B, kv_heads, "
                    f"{h * w}, d) for grids[{n}]={grids[n]}"
                )
            if item.shape[0] != batch or item.shape[1] != kv_heads or item.shape[3] != width:
                raise InputError(
                    f"{name}[{n}] has shape {tuple(item.shape)}; expected "
                    f"{(batch, kv_heads, h * w, width)} as q and keys[0] have it"
                )
            _check_like(f"{name}[{n}]", item, q)
    if kv_heads < 1 or heads % kv_heads != 0:
        raise InputError(f"keys have {kv_heads} heads; expected a divisor of q's {heads} heads")
    used = [n for n in range(scales) if kernels[n] != 0]
    return Windows(
        query_grid=(height_m, width_m),
        grids=tuple((grids[n][0], grids[n][1]) for n in used),
        kernels=tuple(_kernel_size(kernels[n], grids[n]) for n in used),
        own=used[-1] == scales - 1,
        raster=order == "raster",
        include_self=include_self,
        shift=border == "shift",
    )


def check_kernels(kernels: Sequence[Kernel]) -> None:
    """Raise unless ``kernels`` are windows, at least one of them in use."""
    if not isinstance(kernels, Sequence) or isinstance(kernels, str):
        raise InputError(f"kernels={kernels!r}; expected a list of one per scale")
    for n, kernel in enumerate(kernels):
        if kernel != "full" and (
            not isinstance(kernel, int)
            or isinstance(kernel, bool)
            or not 0 <= kernel < 2**31
            or (kernel != 0 and kernel % 2 == 0)
        ):
            raise InputError(
                f"kernels[{n}]={kernel!r}; expected an odd int below 2**31, 0 or 'full'"
            )
    if all(kernel == 0 for kernel in kernels):
        raise InputError("kernels are all 0; expected at least one scale in use")


def check_order(order: str, border: str) -> None:
    """Raise for an unknown order or border, or two that exclude each other."""
    check_choice("order", order, ORDERS)
    check_choice("border", border, BORDERS)
    if order == "raster" and border == "shift":
        raise InputError("border='shift' with order='raster'; expected 'clip', or bidirectional")


def _ring_rows(name: str, item: Tensor, grid: tuple[int, int], kernel: Kernel) -> int:
    """The rows of a ring of keys and values: all that a query reads, at most the grid's."""
    rows = item.shape[2] // grid[1]
    least = min(grid[0], _kernel_size(kernel, grid) // 2 + 1)
    if not least <= rows <= grid[0]:
        raise InputError(f"{name} holds {rows} rows; expected {least} to {grid[0]} of {grid[1]}")
    return rows


def _kernel_size(kernel: Kernel, grid: tuple[int, int]) -> int:
    """``"full"`` as a window that covers the grid from any cell."""
    return kernel if isinstance(kernel, int) else 2 * (grid[0] + grid[1]) + 1


def check_bias(
    bias: Sequence[Tensor | None] | None, q: Tensor, kernels: Sequence[Kernel], shift: bool
) -> list[Tensor | None]:
    """Check the biases and return one entry per scale."""
    if bias is None:
        return [None] * len(kernels)
    if len(bias) != len(kernels):
        raise InputError(f"bias has {len(bias)} entries; expected {len(kernels)}, one per grid")
    for n, (relative, kernel) in enumerate(zip(bias, kernels, strict=True)):
        if relative is None:
            continue
        if not isinstance(kernel, int) or kernel == 0:
            raise InputError(f"bias[{n}] is a tensor; expected None where kernels[{n}]={kernel!r}")
        size = bias_size(kernel, shift)
        if relative.shape != (q.shape[1], size, size):
            raise InputError(
                f"bias[{n}] has shape {tuple(relative.shape)}; expected "
                f"{(q.shape[1], size, size)} (heads and offsets)"
            )
        _check_like(f"bias[{n}]", relative, q)
    return list(bias)


def check_scale(scale: float | None, q: Tensor) -> float:
    """The factor of the dot products."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, (Real, torch.SymFloat)):
        raise InputError(f"scale={scale!r}; expected a float or None")
    return scale


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        raise InputError(f"{name} has dtype {tensor.dtype}; expected q's {q.dtype}")
    if tensor.device != q.device:
        raise InputError(f"{name} is on {tensor.device}; expected q's {q.device}")


class _LocalAttention(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp (float32): O(N) memory."""

    @staticmethod
    def forward(
        ctx: Any,
        windows: Windows,
        scale: float,
        backend: str,
        q: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        keys, values, bias = _split(tensors)
        kernels = OP.kernels[backend]
        out, lse = kernels.local_attention(q, keys, values, bias, windows, scale)
        ctx.windows, ctx.scale, ctx.backend = windows, scale, backend
        ctx.save_for_backward(q, out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _run_backward(ctx, grad_out, *ctx.saved_tensors)


@once_differentiable
def _run_backward(
    ctx: Any, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    keys, values, bias = _split(tensors)
    grad_q, grad_keys, grad_values, grad_bias = OP.kernels[ctx.backend].local_attention_backward(
        grad_out, q, keys, values, bias, out, lse, ctx.windows, ctx.scale
    )
    return None, None, None, grad_q, *grad_keys, *grad_values, *grad_bias


def _split(tensors: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Keys, values and biases: a third of ``tensors`` each."""
    n = len(tensors) // 3
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])
