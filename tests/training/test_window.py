from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from msvq_fast.models import MSVQVAEOutput
from msvq_fast.training import window
from msvq_fast.training.distributed import World
from msvq_fast.training.window import TrainingError, Window, check_weights

ONE = World(0, 1, torch.device("cpu"))


def output(loss: float, image: list[float], codes: list[float], counts: list[int]) -> MSVQVAEOutput:
    """What a step of one scale or more returns, without its images."""
    return MSVQVAEOutput(
        loss=torch.tensor(loss),
        reconstruction_loss=torch.tensor(image),
        commitment_loss=torch.tensor(codes),
        contributions=[],
        codes=[],
        code_counts=[torch.tensor(counts)] * len(codes),
    )


def test_a_summary_holds_means_and_counts_of_its_steps_alone() -> None:
    sums = Window(2, 2, 4, ONE)
    sums.add(output(9.0, [8.0, 7.0], [6.0, 5.0], [0, 0, 0, 9]), 1)
    assert sums.read().loss == 9
    sums.add(output(1.0, [0.5, 0.02], [0.1, 0.2], [3, 0, 0, 0]), 2)
    sums.add(output(2.0, [0.7, 0.06], [0.3, 0.6], [0, 3, 0, 0]), 3)
    found = sums.read()
    assert found.loss == pytest.approx(1.5)
    assert found.reconstruction_loss == pytest.approx([0.6, 0.04])
    assert found.commitment_loss == pytest.approx([0.2, 0.4])
    assert found.psnr == pytest.approx(20)  # a hundredth of the peak's square
    assert found.usage == [50, 50] and found.perplexity == pytest.approx([2, 2])


def test_scales_that_use_few_codes_are_named() -> None:
    sums = Window(1, 1, 200, ONE)
    for used, warned in ((19, True), (20, False)):
        sums.add(output(1.0, [1.0], [0.0], [1] * used + [0] * (200 - used)), 1)
        summary = sums.read()
        for restarts in (False, True):
            found = summary.describe_unused(restarts=restarts)
            assert (found is not None) == warned
            assert found is None or "less than 10 % of the codes of scale 0" in found
            assert found is None or ("restart_below" in found) != restarts


def test_the_first_bad_step_and_its_parts_are_named() -> None:
    sums = Window(2, 2, 4, ONE)
    sums.add(output(1.0, [1.0, 1.0], [1.0, 1.0], [1] * 4), 3)
    sums.check()
    sums.add(output(math.nan, [1.0, 1.0], [1.0, math.inf], [1] * 4), 4)
    sums.add(output(math.nan, [math.nan] * 2, [math.nan] * 2, [1] * 4), 5)
    with pytest.raises(TrainingError, match=r"at step 4: commitment loss of scale 1$"):
        sums.check()
    sums = Window(1, 1, 4, ONE)
    sums.add(output(math.inf, [1e38], [1.0], [1] * 4), 1)
    with pytest.raises(TrainingError, match=r"at step 1: its sum$"):
        sums.check()


def test_sums_of_processes_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [Window(1, 1, 2, World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    for rank, sums in enumerate(windows):
        sums.add(output(1.0 + rank, [1.0], [0.0], [1, rank]), 1)
    total = {name: sum(w.state_dict()[name] for w in windows) for name in ("totals", "counts")}
    total["additions"] = torch.tensor(2)
    by_kind = {t.dtype if t.dim() else None: t for t in total.values()}

    def all_reduce(tensor: torch.Tensor, world: World) -> torch.Tensor:
        return tensor.copy_(by_kind[tensor.dtype if tensor.dim() else None])

    monkeypatch.setattr(window, "all_reduce_", all_reduce)
    for sums in windows:
        sums.reduce()
    state = windows[0].state_dict()
    assert all(torch.equal(state[name], total[name]) for name in total)
    assert not any(t.any() for t in windows[1].state_dict().values())
    # Saved sums are one process's: each of them would count them again.
    fresh = [Window(1, 1, 2, w.world) for w in windows]
    for sums in fresh:
        sums.load_state_dict(state)
    assert torch.equal(fresh[0].totals, total["totals"]) and not fresh[1].totals.any()


def test_what_a_gradient_left_behind_is_not_saved() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_weights(model, optimizer, 7)
    optimizer.state[model.bias]["exp_avg_sq"].fill_(math.inf)
    with pytest.raises(TrainingError, match="gradient of bias had no finite square by step 7"):
        check_weights(model, optimizer, 7)
    model.weight.data[0, 1] = math.nan
    with pytest.raises(TrainingError, match="weight is not finite after step 7"):
        check_weights(model, optimizer, 7)
