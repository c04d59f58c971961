"""The quantizer module: Eq. 3-4 as a moving codebook, in any model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from msvq_fast.nn import VectorQuantizer
from msvq_fast.ops import InputError


def test_one_step_is_the_batch_mean_then_the_moving_average() -> None:
    quantizer = VectorQuantizer(4, 3, dim=-1, decay=0.9)
    z = torch.randn(50, 3)
    codes = quantizer(z).codes
    first = {int(k): z[codes == k].mean(0) for k in codes.unique()}
    for k, mean in first.items():
        torch.testing.assert_close(quantizer.codebook[k], mean)
    z = torch.randn(50, 3)
    start = quantizer.codebook.clone()
    mass, sums = quantizer.cluster_size.clone(), quantizer.code_sums.clone()
    codes = quantizer(z).codes
    for k in range(4):
        mine = z[codes == k]
        if len(mine) == 0:
            assert torch.equal(quantizer.codebook[k], start[k])
            continue
        m = 0.9 * sums[k] + 0.1 * mine.sum(0)
        n = 0.9 * mass[k] + 0.1 * len(mine)
        torch.testing.assert_close(quantizer.codebook[k], m / n)


def test_starts_between_plus_and_minus_one_over_k_without_mass() -> None:
    quantizer = VectorQuantizer(50, 64)
    scaled = quantizer.codebook * 50
    assert scaled.abs().max() <= 1
    assert abs(scaled.mean()) < 0.05 and abs(scaled.std() - 3**-0.5) < 0.05
    assert not quantizer.cluster_size.any() and not quantizer.code_sums.any()


def test_values_are_of_the_codebook_before_the_move() -> None:
    quantizer = VectorQuantizer(8, 4)
    before = quantizer.codebook.clone()
    z = torch.randn(2, 4, 5, 6)
    out = quantizer(z)
    want = before[out.codes].movedim(-1, 1)
    assert torch.equal(out.z_q, want)
    torch.testing.assert_close(out.commitment_loss, 0.25 * (z - want).square().mean())


def test_gradient_after_the_codebook_moved() -> None:
    quantizer = VectorQuantizer(8, 4)
    before = quantizer.codebook.clone()
    z = torch.randn(2, 4, 5, 6, requires_grad=True)
    out = quantizer(z)
    upstream = torch.randn_like(z)
    ((out.z_q * upstream).sum() + out.commitment_loss).backward()
    distance = z.detach() - before[out.codes].movedim(-1, 1)
    torch.testing.assert_close(z.grad, upstream + 2 * 0.25 * distance / z.numel())


def test_encode_lookup_round_trip() -> None:
    quantizer = VectorQuantizer(16, 4).eval()
    codes = torch.randint(0, 16, (2, 3, 5))
    z_q = quantizer.lookup(codes)
    assert z_q.shape == (2, 4, 3, 5)
    assert torch.equal(quantizer.encode(z_q), codes)


def test_waiting_updates_add_up() -> None:
    together, apart = VectorQuantizer(8, 4, dim=-1), VectorQuantizer(8, 4, dim=-1)
    apart.load_state_dict(together.state_dict())
    z = torch.randn(60, 4)
    together(z)
    apart.defer_updates = True
    apart(z[:20])
    apart(z[20:])
    apart.update_codebook()
    for name, value in together.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], value, msg=name)


def test_kmeans_start_finds_the_clusters() -> None:
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
    z = centres.repeat_interleave(25, 0) + 0.1 * torch.randn(100, 2)
    quantizer = VectorQuantizer(4, 2, dim=-1)
    quantizer.initialise(z)
    nearest = torch.cdist(centres, quantizer.codebook).amin(1)
    assert float(nearest.max()) < 0.1
    assert float(quantizer.cluster_size.sum()) == 0
    z = torch.randn(400, 2)
    quantizer.initialise(z, iterations=0)
    start = quantizer.eval()(z).commitment_loss
    quantizer.initialise(z)
    assert quantizer(z).commitment_loss < 0.8 * start


def test_kmeans_start_with_fewer_latents_than_codes() -> None:
    quantizer = VectorQuantizer(8, 2, dim=-1)
    quantizer.initialise(torch.randn(3, 2))
    assert bool(quantizer.codebook.isfinite().all())
    with pytest.raises(InputError, match="at least one finite latent"):
        quantizer.initialise(torch.randn(0, 2))


def test_kmeans_start_leaves_out_what_is_not_finite() -> None:
    z = torch.randn(6, 2)
    plain, other = VectorQuantizer(8, 2, dim=-1), VectorQuantizer(8, 2, dim=-1)
    plain.initialise(z)
    other.initialise(torch.cat([z[:3], torch.tensor([[float("nan"), 0.0]]), z[3:]]))
    assert torch.equal(other.codebook, plain.codebook)
    with pytest.raises(InputError, match="at least one finite latent"):
        plain.initialise(z * float("inf"))


@pytest.mark.parametrize("restart_below", [0.05, 1.0])
def test_kmeans_start_outlives_the_first_step_with_restarts(restart_below: float) -> None:
    centres = 20 * torch.randn(64, 4)
    z = (centres[:, None] + torch.randn(64, 5, 4)).reshape(-1, 4)[torch.randperm(320)]
    quantizer = VectorQuantizer(64, 4, dim=-1, restart_below=restart_below)
    quantizer.initialise(z)
    start = quantizer.codebook.clone()
    assert torch.equal(quantizer.code_sums, start * max(1, restart_below))
    before = quantizer(z).commitment_loss
    assert quantizer(z).commitment_loss <= before
    assert bool(((quantizer.codebook - start).norm(dim=1) < 1).all())


def test_kmeans_start_checks_the_latents() -> None:
    with pytest.raises(InputError, match="width 10 at dim=1; expected the codebook's D=4"):
        VectorQuantizer(8, 4).initialise(torch.randn(4, 10, 10, 4))
    with pytest.raises(InputError, match="width 5 at dim=1; expected the codebook's D=4"):
        VectorQuantizer(4, 4).initialise(torch.randn(2, 5, 2, 2))


def test_what_forward_returns_is_not_what_is_reduced() -> None:
    quantizer = VectorQuantizer(8, 2, dim=-1)
    quantizer.defer_updates = True
    out = quantizer(torch.randn(50, 2))
    counts, sums = out.code_counts.clone(), out.code_sums.clone()
    for statistic in quantizer.code_statistics():
        statistic.mul_(2)
    assert torch.equal(out.code_counts, counts) and torch.equal(out.code_sums, sums)


def test_statistics_move_with_the_module_and_end_with_their_codebook() -> None:
    quantizer = VectorQuantizer(8, 2, dim=-1, restart_below=0.05)
    quantizer.defer_updates = True
    state = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(50, 2))
    quantizer.double().update_codebook()
    assert int(quantizer.cluster_size.gt(0).sum()) == 8
    quantizer(torch.randn(50, 2, dtype=torch.float64))
    quantizer.load_state_dict(state)
    quantizer.update_codebook()
    assert torch.equal(quantizer.codebook, state["codebook"].double())


def test_kmeans_start_forgets_what_was_collected() -> None:
    quantizer = VectorQuantizer(8, 2, dim=-1)
    quantizer.defer_updates = True
    z = torch.randn(50, 2)
    quantizer(z)
    quantizer.initialise(z)
    start = quantizer.codebook.clone()
    quantizer.update_codebook()
    assert torch.equal(quantizer.codebook, start)


def test_dead_codes_restart_at_latents() -> None:
    quantizer = VectorQuantizer(32, 2, dim=-1, restart_below=0.05)
    quantizer.codebook.add_(torch.tensor([100.0, 0.0]))  # far from all latents: collapse
    z = torch.randn(500, 2)
    quantizer(z)
    rows = {tuple(row.tolist()) for row in z}
    used = quantizer.encode(z).unique().numel()
    assert used > 16
    restarted = [k for k in range(32) if tuple(quantizer.codebook[k].tolist()) in rows]
    assert len(restarted) >= 31
    assert bool((quantizer.cluster_size[restarted] == 1).all())
    assert torch.equal(quantizer.code_sums[restarted], quantizer.codebook[restarted])


def test_laplace_smoothing_is_that_of_vqvae2_code() -> None:
    quantizer = VectorQuantizer(4, 3, dim=-1, decay=0.9, laplace_eps=0.5)
    z = torch.randn(50, 3)
    codes = quantizer(z).codes
    mass, sums = 0.1 * codes.bincount(minlength=4), torch.zeros(4, 3)
    sums.index_add_(0, codes, 0.1 * z)
    smoothed = (mass + 0.5) / (mass.sum() + 4 * 0.5) * mass.sum()
    hit = mass > 0
    torch.testing.assert_close(quantizer.codebook[hit], (sums / smoothed[:, None])[hit])
    torch.testing.assert_close(quantizer.cluster_size, mass)


def test_state_stays_finite_whatever_the_latents() -> None:
    quantizer = VectorQuantizer(8, 4, dim=-1, restart_below=0.5)
    for step in range(20):
        z = torch.randn(30, 4)
        z[step % 30 :, step % 4] = torch.tensor([torch.nan, torch.inf, -torch.inf])[step % 3]
        out = quantizer(z)
        assert not out.commitment_loss.isfinite()
        assert int(out.code_counts.sum()) == step
        assert all(bool(t.isfinite().all()) for t in quantizer.state_dict().values())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph_for_any_batch(training: bool) -> None:
    plain = VectorQuantizer(8, 4, laplace_eps=1e-5, restart_below=0.1).train(training)
    other = copy.deepcopy(plain)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (2, 3, 5, 7, 8):
        z = torch.randn(batch, 4, 5, 6)
        for got, want in zip(compiled(z), plain(z), strict=True):
            torch.testing.assert_close(got, want)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, msg=name)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_compiled_gradient_after_the_codebook_moved(gradient: str, backend: str | None) -> None:
    plain = VectorQuantizer(8, 4, gradient=gradient, backend=backend)
    other = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    z = torch.randn(2, 4, 5, 6, requires_grad=True)
    upstream = torch.randn_like(z)
    grads = []
    for quantizer in (plain, compiled):
        out = quantizer(z)
        grads.append(torch.autograd.grad((out.z_q * upstream).sum() + out.commitment_loss, z)[0])
    torch.testing.assert_close(*grads)
    assert torch.equal(plain.codebook, other.codebook)


def test_an_empty_batch_changes_no_code() -> None:
    quantizer = VectorQuantizer(8, 4, dim=-1, restart_below=0.5)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(0, 4))
    quantizer.update_codebook()  # nothing was collected
    assert torch.equal(quantizer.codebook, before)
    quantizer.defer_updates = True
    z = torch.randn(40, 4)
    quantizer(z)
    quantizer(z[:0])
    assert int(quantizer.code_statistics()[0].sum()) == 40
    quantizer.update_codebook()
    assert not torch.equal(quantizer.codebook, before)
    assert bool((quantizer.cluster_size >= 0.4).all())  # those left alone restarted


def test_casts_leave_the_codebook_exact() -> None:
    quantizer = VectorQuantizer(8, 4)
    start = quantizer.codebook.clone()
    quantizer.half().bfloat16().float()
    assert torch.equal(quantizer.codebook, start)
    assert quantizer.double().codebook.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_states_that_are_assigned_leave_exact_averages(dtype: torch.dtype) -> None:
    start = VectorQuantizer(8, 4).state_dict()
    with torch.device("meta"):
        quantizer = VectorQuantizer(8, 4)
    quantizer.load_state_dict({key: value.to(dtype) for key, value in start.items()}, assign=True)
    assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32}
    assert torch.equal(quantizer.codebook, start["codebook"].to(dtype).float())
    quantizer(torch.randn(2, 4, 5, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_rounds_no_codebook(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        quantizer = VectorQuantizer(8, 4)
        loss = quantizer(torch.randn(2, 4, 5, 6)).commitment_loss
    finally:
        torch.set_default_dtype(torch.float32)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (*quantizer.buffers(), loss)} == {exact}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 0, "code_dim": 4}, "num_codes=0"),
        ({"num_codes": 4.5, "code_dim": 4}, "num_codes=4.5; expected an int of at least 1"),
        ({"num_codes": 4, "code_dim": 4, "decay": 1.0}, "decay=1.0"),
        ({"num_codes": 4, "code_dim": 4, "decay": None}, "decay=None"),
        ({"num_codes": 4, "code_dim": 4, "restart_below": float("nan")}, "restart_below=nan"),
        ({"num_codes": 4, "code_dim": 4, "laplace_eps": -1.0}, "laplace_eps=-1.0"),
        ({"num_codes": 4, "code_dim": 4, "commitment_weight": -1.0}, "commitment_weight=-1.0"),
    ],
)
def test_bad_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorQuantizer(**arguments)


def test_bad_latents() -> None:
    with pytest.raises(InputError, match="z"):
        VectorQuantizer(8, 4)(torch.randn(2, 5, 3, 3))


def test_another_codebook_before_the_update_of_the_old() -> None:
    quantizer = VectorQuantizer(8, 4)
    quantizer.defer_updates = True
    z = torch.randn(2, 4, 3, 3)
    quantizer(z)
    for name, buffer in list(quantizer.named_buffers()):
        setattr(quantizer, name, torch.cat([buffer, buffer]))
    with pytest.raises(InputError, match="16 codes, but statistics of 8 wait; expected"):
        quantizer(z)


def test_printed_it_is_the_call_that_makes_it() -> None:
    quantizer = VectorQuantizer(8, 4, dim=-1, restart_below=0.5, gradient="rotation")
    again = eval(repr(quantizer), {"VectorQuantizer": VectorQuantizer})
    assert repr(again) == repr(quantizer) and "restart_below=0.5" in repr(again)
