"""The C++ local attention on CPU tensors (csrc/local_attention)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast import _C
from msvq_fast.ops.backend import kernel_op
from msvq_fast.ops.local_attention.layout import (
    empty_grads,
    empty_lse,
    empty_tokens,
    flatten,
    rows,
    split_grads,
)
from msvq_fast.ops.local_attention.windows import Windows

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unsupported(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    windows: Windows,
    positions: Tensor | None = None,
) -> str | None:
    """Why this call cannot run here, or None; with ``positions`` that of a few queries."""
    if positions is not None:
        return "the C++ kernel takes the queries of a whole grid, not a few at positions"
    if q.device.type != "cpu":
        return f"the C++ kernel runs on CPU tensors, q is on {q.device}"
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


@kernel_op("local_attention_native", "cpu")
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
    _run(q, keys, values, bias, out, lse, sizes, rules, scale)
    return out, lse


torch.library.register_fake(_local_attention, lambda q, *_: (empty_tokens(q), empty_lse(q)))


@kernel_op("local_attention_backward_native", "cpu")
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
    _run(q, keys, values, bias, out, lse, sizes, rules, scale, grad_out, grads)
    return grads


torch.library.register_fake(
    _local_attention_backward,
    lambda grad_out, q, keys, values, bias, *_: empty_grads(q, keys, values, bias),
)


def _tokens(*tensors: Tensor) -> list[tuple[int, int, int, int]]:
    return [(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)) for t in tensors]


def _run(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: list[Tensor | None],
    out: Tensor,
    lse: Tensor,
    sizes: list[int],
    rules: list[bool],
    scale: float,
    grad_out: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> None:
    """Hand the pointers to C++, which writes ``out`` and ``lse``, or ``grads`` where given."""
    # Copies made here live until C++ is done.
    q, out, keys, values = rows(q), rows(out), [*map(rows, keys)], [*map(rows, values)]
    tables = [None if b is None else b.contiguous() for b in bias]
    queries, tokens, grad_tables = [q, out], [*keys, *values], [0] * len(bias)
    if grad_out is not None and grads is not None:
        grad_out = rows(grad_out)
        queries += [grad_out, grads[0]]
        tokens += grads[1 : 1 + 2 * len(keys)]
        rest = iter(grads[1 + 2 * len(keys) :])
        grad_tables = [0 if b is None else next(rest).data_ptr() for b in bias]
    _C.local_attention_cpu(
        _TYPES[q.dtype],
        (q.shape[0], q.shape[1], keys[0].shape[1], q.shape[3]),
        sizes,
        rules,
        scale,
        _tokens(*queries),
        _tokens(*tokens),
        [0 if b is None else b.data_ptr() for b in tables],
        grad_tables,
        lse.data_ptr(),
        torch.get_num_threads(),
    )
