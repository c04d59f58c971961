"""One quantizer in several gloo processes: equal codebooks, restarts, uneven and empty batches."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist

from msvq_fast.nn import VectorQuantizer
from msvq_fast.training.distributed import World, leave, start_reducing

STEPS, SIZE = 50, 2
OPTIONS = {"dim": -1, "restart_below": 0.05, "decay": 0.9}


def batch(step: int, rank: int) -> torch.Tensor:
    """Latents of a rank: of another number every step, none now and then."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    count = 0 if step % 10 == 5 * rank else 20 + 7 * ((step + rank) % 3)
    return torch.randn(count, 4, generator=generator)


def quantizer() -> VectorQuantizer:
    torch.manual_seed(3)
    made = VectorQuantizer(24, 4, **OPTIONS)
    made.codebook[20:] += 50  # out of reach: these restart
    made.defer_updates = True
    return made


def threads() -> list[str]:
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=SIZE)
    calls = 0
    reduce = dist.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    mine, world = quantizer(), World(rank, SIZE, torch.device("cpu"))
    restarted = 0
    for step in range(STEPS):
        mine(batch(step, rank))
        before = mine.code_sums.clone()
        start_reducing([mine.code_statistics()], world)()
        mine.update_codebook()
        fresh = (mine.cluster_size == 1) & (mine.code_sums == mine.codebook).all(1)
        restarted += int((fresh & (before != mine.code_sums).any(1)).sum())
    torch.save({**mine.state_dict(), "calls": calls, "restarted": restarted}, f"{folder}/{rank}.pt")
    leave()
    assert not [name for name in threads() if "gloo_runloop" in name]  # they abort a late exit


def test_codebooks_are_equal_on_all_ranks_and_those_of_one_process(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(rank, str(tmp_path))) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()  # one that hangs
    assert [process.exitcode for process in processes] == [0] * SIZE
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]
    for name, value in ranks[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(ranks[1][name])), name
    assert [rank["calls"] for rank in ranks] == [STEPS] * SIZE  # one collective per step
    assert ranks[0]["restarted"] >= 4
    # One process sees the same statistics, and restarts at the vectors that the ranks would offer.
    one = quantizer()
    for step in range(STEPS):
        offers = []
        for rank in range(SIZE):
            alone = quantizer()
            alone(batch(step, rank))
            offers.append(alone.code_statistics()[2])
            one(batch(step, rank))
        owner = torch.arange(len(one.codebook)) % SIZE
        one.code_statistics()[2].copy_(torch.stack(offers)[owner, torch.arange(len(owner))])
        one.update_codebook()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-5, msg=name)
