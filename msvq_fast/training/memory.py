"""How many bytes a training step needs, counted without running it.

A step runs on fake tensors, which have sizes but no values. Every storage that an operation makes
is counted while it is alive, so the peak holds what autograd keeps, what operations need between,
and the gradients. It does not hold the workspaces of convolution libraries, nor what an allocator
rounds up or leaves in pieces.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from msvq_fast import models
from msvq_fast.models import MSVQVAEConfig, VQVAE2Config

_ADAM_MOMENTS = 2
_BATCHES = (16, 32)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step.

    Attributes:
        state: Parameters, buffers and Adam's moments; there before and after.
        kept: Made by the forward and alive at its end: activations for the backward, outputs.
        peak: Most that is alive at once beside ``state``: activations, gradients, temporaries.
    """

    state: int
    kept: int
    peak: int

    @property
    def total(self) -> int:
        """The peak with the state."""
        return self.state + self.peak


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that operations inside make, while they are alive.

    Attributes:
        live: Bytes alive now.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, module: nn.Module) -> None:
        """Leave out what a module holds already: views of it are no new bytes."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def step_memory(
    config: MSVQVAEConfig | VQVAE2Config,
    *,
    batch: int = 1,
    memory: str = "default",
    strips: int = models.DEFAULT_STRIPS,
    bf16: bool = False,
    size: int | None = None,
    backend: str | None = None,
) -> StepMemory:
    """Count a training step of a model: forward, backward, one image batch.

    Args:
        config: The model.
        batch: Images.
        memory: As `Autoencoder.set_memory` takes it.
        strips: Likewise.
        bf16: Under autocast to bfloat16.
        size: Side of the images in pixels; None is the config's resolution.
        backend: Of the ops.

    Returns:
        Bytes; images themselves are in ``kept`` and ``peak``.
    """
    side = size or config.resolution
    with FakeTensorMode():
        model = models.build(config, backend=backend)
        model.defer_codebook_updates()
        model.set_memory(memory, strips=strips)
        parameters = sum(p.nbytes for p in model.parameters())
        state = (1 + _ADAM_MOMENTS) * parameters + sum(b.nbytes for b in model.buffers())
        with LiveBytes() as bytes_:
            bytes_.ignore(model)
            x = torch.empty(batch, 3, side, side)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = model(x)
            kept = bytes_.live
            out.loss.backward()
            return StepMemory(state, kept, bytes_.peak)


@dataclass(frozen=True)
class BatchMemory:
    """How the peak grows with the batch.

    Attributes:
        per_image: Bytes that another image adds, where images and not the gradients of the
            parameters make the peak.
        rest: Bytes that do not grow, the state included.
    """

    per_image: int
    rest: int

    def largest_batch(self, capacity: int) -> int:
        """Images that fit ``capacity`` bytes."""
        return max(0, (capacity - self.rest) // self.per_image)


def batch_memory(config: MSVQVAEConfig | VQVAE2Config, **options: Any) -> BatchMemory:
    """Count steps of two batches; ``options`` as `step_memory` takes them."""
    small, large = _BATCHES
    low, high = (step_memory(config, batch=n, **options).total for n in _BATCHES)
    per_image = (high - low) // (large - small)
    return BatchMemory(per_image, high - large * per_image)
