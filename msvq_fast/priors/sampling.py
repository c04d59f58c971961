"""Random numbers that depend on a counter alone, and drawing codes from logits with them."""

from __future__ import annotations

import torch
from torch import Tensor

from msvq_fast.ops.checks import InputError, check_at_least

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def uniforms(seed: int, *counters: Tensor | int) -> Tensor:
    """Uniform float64 numbers in (0, 1), a function of ``seed`` and the counters alone.

    Args:
        seed: Any 63-bit integer.
        counters: int64 tensors that broadcast against each other, or integers; at least one is a
            tensor. Every combination has a number of its own.

    Returns:
        The broadcast shape, on the tensors' device; the same bits on every device.
    """
    state = _mix(seed)
    for counter in counters:
        state = _mix(state + counter)
    if not isinstance(state, Tensor):
        raise InputError("counters are integers only; expected at least one tensor")
    # The last of 2^53 numbers would be rounded to 1.
    number = ((state >> 11) & (2**53 - 1)).double() + 0.5
    return (number * 2.0**-53).clamp_max(1 - 2.0**-53)


def gumbels(seed: int, *counters: Tensor | int) -> Tensor:
    """Standard Gumbel numbers ``-log(-log(u))`` of `uniforms`, float64."""
    return -torch.log(-torch.log(uniforms(seed, *counters)))


def draw_codes(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw a code per row by inverting the cumulative distribution.

    Args:
        logits: ``(..., K)``.
        uniform: ``(...)`` float64 in (0, 1), from `uniforms`.
        temperature: Divides the logits; 0 takes the most likely code.
        top_k: Only the k most likely codes (and ties with the last of them).
        top_p: Only the fewest most likely codes with this much probability together, (0, 1].

    Returns:
        ``(...)`` int64. Probabilities are summed in float64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # A temperature below this cannot be told from it, but could divide logits to infinity.
    scores = logits.double() / max(temperature, 1e-200)
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probability = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probability.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probability = probability.scatter(-1, index, ordered.masked_fill(beyond, 0.0))
    cumulative = probability.cumsum(-1)
    # Scaled by the sum that was reached, a code without probability can never be drawn.
    target = uniform[..., None] * cumulative[..., -1:]
    return (cumulative <= target).sum(-1).clamp_max(logits.shape[-1] - 1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise `InputError` for settings that `draw_codes` cannot use."""
    check_at_least(0, temperature=temperature)
    if top_k is not None:
        check_at_least(1, top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}; expected 0 < top_p <= 1")


def _mix(x: Tensor | int) -> Tensor | int:
    """A bijection of 64 bits in which every output bit depends on every input bit (SplitMix64).

    Tensors wrap around as signed numbers do; an integer is brought to the signed one that a tensor
    would hold.
    """
    if isinstance(x, Tensor):
        x = x + _GOLDEN
        x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
        x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
        return x ^ ((x >> 31) & (2**33 - 1))
    low = 2**64 - 1
    x = (x + _GOLDEN) & low
    x = ((x ^ (x >> 30)) * _FIRST) & low
    x = ((x ^ (x >> 27)) * _SECOND) & low
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x
