"""Run a chain of convolutions now and again in the backward, keeping only its input."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from msvq_fast.nn.strips import Rows, check_layers, flat_layers, output_height, run_rows, strips_of
from msvq_fast.ops.checks import is_transformed

# `functional_call` lends parameters to the module itself, which other threads may be using.
_LENDING = threading.RLock()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def replay(module: nn.Module, x: Tensor, *, strips: int = 1) -> Tensor:
    """``module(x)`` whose backward runs the module again instead of keeping its activations.

    Parameters are inputs of the graph's node, so their gradients arrive as in the plain run: hooks,
    ``torch.autograd.grad``, gradient accumulation and DistributedDataParallel see no difference.

    Args:
        module: No random numbers, no buffers that it changes. With ``strips`` > 1 nested
            ``nn.Sequential`` of `Residual`, convolutions and ReLU.
        x: ``(B, C, H, W)``.
        strips: With more than one, both runs go strip by strip over the output's rows, each with
            the rows around it that it depends on: less is alive at a time, and those rows are
            computed again.

    Returns:
        ``(B, C', H', W')``: the values of ``module(x)`` up to the order of sums.

    Gradient:
        To ``x`` and to the parameters, once: a second derivative raises. The second run is under
        the autocast of the first.
    """
    if strips > 1:
        check_layers(flat_layers(module))
    if not torch.is_grad_enabled() or is_transformed():
        return _run(module, x, strips)  # without waiting for what another thread runs again
    with _LENDING:
        parameters = list(module.parameters())
    if not any(t.requires_grad for t in (x, *parameters)):
        return _run(module, x, strips)
    return _Replay.apply(module, strips, x, *parameters)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, strips: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module, ctx.strips = module, strips
        ctx.names = [name for name, _ in module.named_parameters()]
        device = x.device.type
        ctx.autocast = None  # the meta device has none
        if device != "meta":
            ctx.autocast = {
                "device_type": device,
                "enabled": torch.is_autocast_enabled(device),
                "dtype": torch.get_autocast_dtype(device),
            }
        ctx.save_for_backward(x, *parameters)
        with _same_autocast(ctx.autocast):
            return _run(module, x, strips)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        # The forward's parameters, which `functional_call` may have lent. Detached: the hooks on a
        # parameter's gradient are to run when this node's outputs reach it, and only then.
        lent = {
            name: p.detach().requires_grad_(p.requires_grad)
            for name, p in zip(ctx.names, parameters, strict=True)
        }
        with _same_autocast(ctx.autocast):
            if ctx.strips > 1:
                grad_x, found = _gradients_in_strips(
                    ctx.module, x, lent, grad, ctx.strips, ctx.needs_input_grad[2]
                )
            else:
                grad_x, found = _gradients(ctx.module, x, lent, grad, ctx.needs_input_grad[2])
        left = iter(found)
        return None, None, grad_x, *(next(left) if p.requires_grad else None for p in parameters)


@contextlib.contextmanager
def _same_autocast(state: dict[str, Any] | None) -> Iterator[None]:
    """Autocast as in ``state``; its copies of weights serve all strips, but no other run.

    A copy made without a graph must not serve a run that needs one.
    """
    torch.clear_autocast_cache()
    with contextlib.nullcontext() if state is None else torch.autocast(**state):
        yield
    torch.clear_autocast_cache()


def _run(module: nn.Module, x: Tensor, strips: int) -> Tensor:
    if strips == 1:
        return module(x)
    layers, height = flat_layers(module), x.shape[2]
    whole: Tensor | None = None
    for chain in strips_of(layers, height, strips):
        piece = run_rows(layers, x[:, :, slice(*chain[0])], height, chain)
        if whole is None:
            batch, channels, _, width = piece.shape
            shape = (batch, channels, output_height(layers, height), width)
            last = channels > 1 and piece.stride(1) == 1
            whole = torch.empty(
                shape,
                dtype=piece.dtype,
                device=piece.device,
                memory_format=torch.channels_last if last else torch.contiguous_format,
            )
        whole[:, :, slice(*chain[-1])] = piece
    assert whole is not None
    return whole


def _gradients(
    module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], grad: Tensor, wants_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of ``x``, if wanted, and of those ``parameters`` that require one."""
    with torch.enable_grad(), _LENDING:
        x = x.detach().requires_grad_(wants_x)
        out = functional_call(module, dict(parameters), (x,))
    inputs = [*([x] if wants_x else []), *_trained(parameters)]
    found = list(torch.autograd.grad(out, inputs, grad))
    return (found.pop(0) if wants_x else None), found


def _gradients_in_strips(
    module: nn.Module,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    grad: Tensor,
    strips: int,
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """As `_gradients`, summed over strips of the output, in order."""
    layers, height = flat_layers(module), x.shape[2]
    rows_of, lent = _Rows(module), {f"chain.{name}": p for name, p in parameters.items()}
    trained = _trained(parameters)
    grad_x = torch.zeros_like(x) if wants_x else None
    total = [torch.zeros_like(p) for p in trained]
    for chain in strips_of(layers, height, strips):
        rows, out_rows = slice(*chain[0]), slice(*chain[-1])
        with torch.enable_grad(), _LENDING:
            piece = x[:, :, rows].detach().requires_grad_(wants_x)
            out = functional_call(rows_of, lent, (piece, height, chain))
        inputs = [*([piece] if wants_x else []), *trained]
        found = list(torch.autograd.grad(out, inputs, grad[:, :, out_rows]))
        del out
        if grad_x is not None:
            grad_x[:, :, rows] += found.pop(0)
        for sum_, part in zip(total, found, strict=True):
            sum_ += part
    return grad_x, total


def _trained(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [p for p in parameters.values() if p.requires_grad]


class _Rows(nn.Module):
    """`run_rows` as a module, to which `functional_call` can lend parameters."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor, height: int, rows: Sequence[Rows]) -> Tensor:
        return run_rows(flat_layers(self.chain), x, height, rows)
