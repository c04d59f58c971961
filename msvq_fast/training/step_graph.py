"""The kernels of a training step as one CUDA graph, which the host launches at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from msvq_fast.ops.checks import InputError, WorkError
from msvq_fast.training.config import TrainConfig
from msvq_fast.training.distributed import World

T = TypeVar("T")
WARM_UPS = 3  # steps that choose algorithms, compile kernels and set workspaces up


class StepGraph(Generic[T]):
    """``step(x)``, forward and backward, recorded once and then replayed.

    Where one step's kernels take the GPU less time than Python takes to launch them, the host is
    what training waits for; a replay takes it next to none. The same kernels run on the same
    numbers, so the results are those of ``step`` itself. The first calls are ``step`` itself.

    Args:
        step: Works on images of one shape, calls ``backward`` and never waits for the device.
        parameters: Those that get gradients. Every call gives them new ones. They lie on one
            device, where all runs whichever is the current one.

    Memory:
        What a step allocates is held from one to the next, besides what runs between steps.
    """

    def __init__(self, step: Callable[[Tensor], T], parameters: Iterable[nn.Parameter]) -> None:
        self.step, self.parameters = step, list(parameters)
        # One stream for all: autograd adds a gradient on the stream of the first use. Theirs may be
        # another device than the current one.
        self.stream = torch.cuda.Stream(next((p.device for p in self.parameters), None))
        self.graph = torch.cuda.CUDAGraph()
        self.calls = 0
        self.like: tuple[tuple[int, ...], torch.dtype] | None = None
        self.grads: list[tuple[nn.Parameter, Tensor | None]] | None = None

    def __call__(self, x: Tensor) -> T:
        """Run a step.

        Args:
            x: Of the first call's shape and dtype.

        Returns:
            What ``step`` returns. The next call overwrites it.

        Raises:
            InputError: If ``x`` is another kind of tensor than that of the first call.
            RuntimeError: In the first recorded call, if ``step`` does what cannot be recorded.
            WorkError: After that.
        """
        like = (tuple(x.shape), x.dtype)
        self.like = self.like or like
        if like != self.like:
            raise InputError(f"x has shape and dtype {like}; expected the first call's {self.like}")
        self.calls += 1
        if self.calls <= WARM_UPS:
            return self._run(x)
        if self.grads is None:
            with torch.cuda.device(self.stream.device):
                self.grads = self._record(x)
        self.x.copy_(x.detach())
        self.graph.replay()
        for parameter, grad in self.grads:
            parameter.grad = grad
        return self.out

    def _run(self, x: Tensor) -> T:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._forget_gradients()
            out = self.step(x)
        current.wait_stream(self.stream)
        return out

    def _record(self, x: Tensor) -> list[tuple[nn.Parameter, Tensor | None]]:
        if self.calls > WARM_UPS + 1:
            raise WorkError("this step could not be recorded as a CUDA graph")
        self.x = x.detach().clone(memory_format=torch.preserve_format)
        self._forget_gradients()
        # Other threads may go on, as those that load images do.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.out = self.step(self.x)
        return [(p, p.grad) for p in self.parameters]

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def check_graph(config: TrainConfig, world: World) -> None:
    """Raise InputError where ``config.cuda_graph`` cannot be."""
    if not config.cuda_graph:
        return
    if world.device.type != "cuda":
        raise InputError(f"cuda_graph=True needs a CUDA device; the run is on {world.device}")
    if world.size > 1:
        raise InputError(f"cuda_graph=True takes one process; there are {world.size}")
    others: dict[str, object] = {
        "compile": config.compile,
        "gan": config.gan,
        "perceptual_weight": config.perceptual_weight,
    }
    if config.backend == "reference":  # its blur has the device wait for indices from the host
        others["backend"] = config.backend
    for name, value in others.items():
        if value:
            raise InputError(f"cuda_graph=True cannot run with {name}={value}")
    if config.accumulate > 1:
        raise InputError(f"cuda_graph=True takes accumulate=1, it is {config.accumulate}")
