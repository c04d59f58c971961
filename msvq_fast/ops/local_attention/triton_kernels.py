"""Local attention in Triton: the custom ops over triton_{forward,backward,decode}.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from msvq_fast.ops.backend import kernel_op
from msvq_fast.ops.local_attention.layout import (
    empty_grads,
    empty_lse,
    empty_tokens,
    flatten,
    split_grads,
)
from msvq_fast.ops.local_attention.triton_calls import (
    MOST_SIDE,
    Call,
    aligned,
    finished,
    room_for,
    tokens_of,
    vectors,
)
from msvq_fast.ops.local_attention.triton_shapes import DTYPES, WIDTHS, variants
from msvq_fast.ops.local_attention.triton_windows import reciprocal
from msvq_fast.ops.local_attention.windows import Windows

__all__ = [
    "local_attention",
    "local_attention_at",
    "local_attention_backward",
    "unsupported",
    "variants",
]

# By what triton.jit made of the kernels: Triton 3.3, of PyTorch 2.7, has no triton.knobs.
_INTERPRETED = not isinstance(reciprocal, triton.JITFunction)


def unsupported(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    positions: Tensor | None = None,
) -> str | None:
    """Why this call cannot run here, or None; with ``positions`` that of a few queries."""
    if q.device.type != "cuda" and not (_INTERPRETED and q.device.type == "cpu"):
        return f"the Triton kernel runs on CUDA tensors, q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"the Triton kernel takes float32, bfloat16 or float16, q is {q.dtype}"
    if _INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 products"
    if q.shape[3] > WIDTHS[-1]:
        return f"the Triton kernel takes heads of at most {WIDTHS[-1]}, q has {q.shape[3]}"
    # One comparison a side: torch.compile would compile again for another order of the sides.
    for h, w in (windows.query_grid, *windows.grids):
        if h >= MOST_SIDE or w >= MOST_SIDE:
            return f"the Triton kernel takes grids of less than {MOST_SIDE} a side, not {h} x {w}"
    wanted = any(t is not None and t.requires_grad for t in (q, *keys, *values, *bias))
    if positions is not None and wanted and torch.is_grad_enabled():
        return "the Triton kernel of few queries has no gradient, and an input requires one"
    return None


def local_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, strided like ``q``, and the log-sum-exp ``(B, heads, N_m)`` of its scores."""
    sizes, rules = flatten(windows)
    out, lse = _local_attention(q, list(keys), list(values), list(bias), sizes, rules, scale)
    return out, lse


def local_attention_at(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    scale: float,
    positions: Tensor,
) -> Tensor:
    """The output of the queries at ``positions``, strided like ``q``."""
    sizes, rules = flatten(windows)
    return _local_attention_at(
        q, list(keys), list(values), list(bias), positions, sizes, rules, scale
    )


def local_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    windows: Windows,
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """The gradients of ``q``, ``keys``, ``values`` and ``bias``."""
    sizes, rules = flatten(windows)
    grads = _local_attention_backward(
        grad_out, q, list(keys), list(values), list(bias), out, lse, sizes, rules, scale
    )
    return split_grads(grads, bias)


@kernel_op("local_attention_triton")
def _local_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_tokens(q), empty_lse(q)
    if q.numel() == 0:
        return out, lse
    call = Call(q, keys, values, bias, sizes, rules, scale)
    result = room_for(out)
    for part in call.parts:
        call.over_queries("forward_kernel", (*tokens_of(call.q), *tokens_of(result), lse), part)
    return finished(out, result), lse


torch.library.register_fake(_local_attention, lambda q, *_: (empty_tokens(q), empty_lse(q)))


@kernel_op("local_attention_at_triton")
def _local_attention_at(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    positions: Tensor,
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> Tensor:
    out, lse = empty_tokens(q), empty_lse(q)
    if q.numel() == 0:
        return out
    call = Call(q, keys, values, bias, sizes, rules, scale)
    result, positions = room_for(out), aligned(positions)
    for part in call.parts:
        call.over_positions((*tokens_of(call.q), *tokens_of(result), lse), positions, part)
    return finished(out, result)


torch.library.register_fake(_local_attention_at, lambda q, *_: empty_tokens(q))


@kernel_op("local_attention_backward_triton")
def _local_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    out: Tensor,
    lse: Tensor,
    sizes: list[int],
    rules: list[bool],
    scale: float,
) -> list[Tensor]:
    grads = empty_grads(q, keys, values, bias)
    if q.numel() == 0:
        return [g.zero_() for g in grads]
    call = Call(q, keys, values, bias, sizes, rules, scale)
    grad_out, out = vectors(grad_out), vectors(out)
    delta = torch.empty_like(lse)
    inputs = (*tokens_of(call.q), *tokens_of(grad_out))
    results = [*map(room_for, grads[: 1 + 2 * len(keys)])]
    outputs = (*tokens_of(out), *tokens_of(grad_out), *tokens_of(results[0]))
    for part in call.parts:
        call.over_queries("query_kernel", (*tokens_of(call.q), *outputs, lse, delta), part)
    tables = iter(grads[1 + 2 * len(keys) :])
    for n, table in enumerate(call.tables):
        rooms = (results[1 + n], results[1 + len(keys) + n])
        call.over_keys(n, inputs, (lse, delta), rooms)
        if table is not None:
            next(tables).copy_(call.over_offsets(n, inputs, (lse, delta)))
    for grad, result in zip(grads, results, strict=False):
        finished(grad, result)
    return grads


torch.library.register_fake(
    _local_attention_backward,
    lambda grad_out, q, keys, values, bias, *_: empty_grads(q, keys, values, bias),
)
