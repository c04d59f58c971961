"""Processes started by ``torchrun``: who we are, and everything that is shared between them.

With one process nothing here talks to anyone, and no process group is made.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: were there a group, its functions' defaults would keep it alive
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msvq_fast.ops.checks import InputError, WorkError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the progress."""
        return self.rank == 0


class LostProcessError(WorkError):
    """Another process cannot be reached; the message is one line for people."""


def loss_of_process(error: RuntimeError, world: World, when: str = "") -> str | None:
    """That another process cannot be reached and why, if that is what ``error`` says."""
    # gloo raises plain errors that name the file of its own that they come from.
    if found := re.search(r"third_party/gloo[^]]*\] ([^.]*(?:\.\S[^.]*)*)", str(error)):
        reason = found[1]
    elif isinstance(error, dist.DistError):
        reason = str(error).partition("\n")[0]
    else:
        return None
    return (
        f"process {world.rank} of {world.size} cannot reach another one{when}: {reason}; if that "
        "one ended, its own output says why"
    )


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Enter the process group that ``torchrun`` describes, if there is one, and leave it after.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; with several processes ``auto`` and
            ``cuda`` take the device of the local rank.

    Raises:
        InputError: If the device is unknown or not there, or the processes cannot meet.
        LostProcessError: In place of what is raised inside when another process is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0")) if size > 1 else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank if size > 1 else None)
    with torch.cuda.device(chosen) if chosen.type == "cuda" else contextlib.nullcontext():
        world = World(rank, size, chosen)
        if size == 1:
            yield world
        else:
            with _group(world):
                yield world


@contextlib.contextmanager
def _group(world: World) -> Iterator[None]:
    # gloo for host tensors too: agreeing on a stop must not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend)
    except (ValueError, dist.DistError) as error:
        said = str(error).partition("\n")[0]
        raise InputError(
            f"WORLD_SIZE={world.size}, but the processes cannot meet: {said}; start them with "
            "torchrun, or unset WORLD_SIZE for one process"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if (reason := loss_of_process(error, world)) is None:
            raise
        raise LostProcessError(reason) from error
    finally:
        leave()


def require_one_process(command: str, instead: str) -> None:
    """Raise `InputError` under ``torchrun`` with several processes, which would all do the same."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{command} runs in one process; {instead}")


def leave() -> None:
    """Leave the process group and wait until its threads are gone."""
    # gloo's threads let go of the last tensors under the interpreter's lock. What destroys the
    # group may hold that lock while it waits for these threads: they go first.
    time.sleep(0.1)
    dist.destroy_process_group()


def choose_device(device: str, local_rank: int | None = None) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: If the device is unknown or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device={device!r}; expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return chosen
    if not torch.cuda.is_available():
        raise InputError(f"device={device!r}, but this torch sees no CUDA device; use device=cpu")
    index = chosen.index if chosen.index is not None else (local_rank or 0)
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device=cuda:{index}, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def determinism(wanted: bool, world: World) -> Iterator[None]:
    """Choose between the quickest convolution kernels and repeatable ones, for this run only."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    if wanted:
        # cuBLAS reads this when it is first used and is not repeatable without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = world.device.type == "cuda" and not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def wrap(model: nn.Module, world: World) -> nn.Module:
    """Average gradients over the processes; weights and codebooks start as rank 0's."""
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    # From here on update_codebooks() changes the codebooks, the same way everywhere, so DDP need
    # not broadcast buffers every step. torch 2.13 gave that option another name.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    # In channels_last kernels of 1 x 1 and their gradients name the same places by other strides.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    wrapped = DistributedDataParallel(model, device_ids=ids, **options)
    _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Give every gradient its final place in the all-reduce, before the first step.

    DDP orders them as they came in its first backward, and from three processes on the place
    decides in which order a gradient is summed: a resumed run would round its first step otherwise
    than one that was never stopped. This backward reaches the last parameters first, as real ones.
    """
    model = wrapped.module
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.forward = lambda _: torch.stack([p.sum() for p in parameters]).sum()
    try:
        wrapped(None).backward()  # with an argument: on a GPU DDP takes the first of them
    finally:
        del model.forward
    model.zero_grad(set_to_none=True)


def gradient_sync(wrapped: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Skip the gradients' all-reduce for all but the last micro-batch."""
    plain = getattr(wrapped, "_orig_mod", wrapped)  # of torch.compile's module
    if wanted or not isinstance(plain, DistributedDataParallel):
        return contextlib.nullcontext()
    return plain.no_sync()


def start_reducing(statistics: Sequence[tuple[Tensor, ...]], world: World) -> Callable[[], None]:
    """Begin to combine all scales' code statistics over the processes, in one call.

    Counts and sums are summed, in float64, so that counts stay exact. Of the vectors at which codes
    would restart, code k takes that of process ``k % size``. Every process gets the same bits.

    Args:
        statistics: Per scale counts ``(K,)``, sums ``(K, D)`` and maybe restart vectors ``(K, D)``.
        world: The processes.

    Returns:
        Waits for the result and writes it into ``statistics``; until then other work may go on.
    """
    if world.size == 1:
        return lambda: None
    for _, _, *restart in statistics:
        for vectors in restart:
            owner = torch.arange(len(vectors), device=vectors.device) % world.size
            vectors[owner != world.rank] = 0
    tensors = [tensor for scale in statistics for tensor in scale]
    packed = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    work = dist.all_reduce(packed, async_op=True)

    def finish() -> None:
        work.wait()
        parts = packed.split([t.numel() for t in tensors])
        for tensor, total in zip(tensors, parts, strict=True):
            tensor.copy_(total.view_as(tensor))

    return finish


def all_reduce_(tensor: Tensor, world: World, *, smallest: bool = False) -> Tensor:
    """Sum ``tensor`` over the processes (or take the smallest), in place."""
    if world.size > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MIN if smallest else dist.ReduceOp.SUM)
    return tensor


def agree(value: int, world: World) -> int:
    """Return the largest ``value`` of all processes, through host memory."""
    if world.size == 1:
        return value
    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gather(value: T, world: World) -> list[T]:
    """Return every process's ``value``, in the order of ranks, on all processes."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def require_same(values: Mapping[str, Any], world: World) -> None:
    """Raise `InputError` on all processes if they do not all have the same ``values``.

    Processes with other data or options would go on to other collectives, and wait for ever.
    """
    first, *others = gather(dict(values), world)
    for rank, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != first[name]:
                raise InputError(
                    f"{name} is {first[name]} in process 0 and {value} in process {rank}; "
                    "expected the same in all"
                )


def first_decides(decide: Callable[[], Path | None], world: World) -> Path | None:
    """Return what ``decide`` gives rank 0, on all processes."""
    if world.size == 1:
        return decide()
    answer: list[Path | None] = [decide() if world.leads else None]
    dist.broadcast_object_list(answer)
    return answer[0]
