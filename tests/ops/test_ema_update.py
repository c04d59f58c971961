"""ema_update_: Eq. 3-4 against a float64 loop, dead codes, restarts, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from msvq_fast.ops import InputError, ema_update_, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP
from tests.parity import assert_close

BACKENDS = [
    b
    for b in ("reference", "native")
    if OP.why_not(b, torch.zeros(1, 1), torch.zeros(1, 1)) is None
]


def start(k=7, d=3, dtype=torch.float32):
    codebook = torch.randn(k, d, dtype=dtype)
    return codebook, torch.ones(k, dtype=dtype), codebook.clone()


def statistics(counts, d=3, dtype=torch.float32):
    counts = torch.tensor(counts)
    return counts, torch.randn(len(counts), d, dtype=dtype) * counts[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("laplace_eps", (0.0, 1e-5, 0.5))
def test_matches_a_plain_loop(backend, laplace_eps):
    codebook, size, sums = start()
    truth = [[v.double().clone() for v in row] for row in (codebook, size, sums)]
    for step in range(20):
        counts, batch = statistics([step, 0, 5, 1, 0, 100, 3 * (step % 2)])
        ema_update_(
            codebook, size, sums, counts, batch, decay=0.9, laplace_eps=laplace_eps, backend=backend
        )
        for i in range(7):
            truth[1][i] = 0.9 * truth[1][i] + 0.1 * counts[i]
            truth[2][i] = 0.9 * truth[2][i] + 0.1 * batch[i].double()
        total = sum(truth[1])
        for i in range(7):
            mass = truth[1][i]
            if laplace_eps:
                mass = (mass + laplace_eps) / (total + 7 * laplace_eps) * total
            if counts[i]:
                truth[0][i] = truth[2][i] / mass
    for got, want in zip((codebook, size, sums), truth, strict=True):
        assert_close("state", got, torch.stack(want), ulps=32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("laplace_eps", (0.0, 1e-5, 0.5))
def test_dead_codes_beside_live_ones_for_12000_steps(backend, laplace_eps):
    """Codes 0 and 1 live, 2 dies after the first step, 3 comes back in the last, 4 never lives."""
    codebook, size, sums = start(5)
    before = codebook.clone()
    truth = [t.double() for t in (codebook, size, sums)]
    for step in range(12000):
        live = torch.tensor([3, 1 + step % 2, int(step == 0), int(step in (0, 11999)), 0])
        batch = torch.randn(5, 3) * live[:, None]
        ema_update_(codebook, size, sums, live, batch, laplace_eps=laplace_eps, backend=backend)
        truth[1] = 0.99 * truth[1] + 0.01 * live
        truth[2] = 0.99 * truth[2] + 0.01 * batch.double()
        mass = truth[1]
        if laplace_eps:
            total = mass.sum()
            mass = (mass + laplace_eps) / (total + 5 * laplace_eps) * total
        truth[0] = torch.where(live[:, None] > 0, truth[2] / mass[:, None], truth[0])
        if step == 0:
            dead = codebook[2].clone()
    assert torch.equal(codebook[2], dead) and torch.equal(codebook[4], before[4])
    # Every step rounds the state once more, and keeps 0.99 of the error before it.
    for got, want in zip((codebook, size, sums), truth, strict=True):
        for i in (0, 1, 3):
            assert_close(f"code {i}", got[i], want[i], ulps=200)
    assert size.isfinite().all() and sums.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unhit_code_keeps_its_vector_for_12000_steps(backend):
    codebook, size, sums = start()
    before = codebook.clone()
    for step in range(12000):
        counts = torch.tensor([4, 0, 2, 0, 1, step % 2, int(step == 11999)])
        batch = before * counts[:, None]
        ema_update_(codebook, size, sums, counts, batch, backend=backend)
    assert torch.equal(codebook[[1, 3]], before[[1, 3]])
    # Codes whose latents are all equal stay there, also one that comes back from no mass at all.
    assert_close("codebook", codebook, before.double(), ulps=64)
    assert size.isfinite().all() and sums.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_from_nothing(backend):
    codebook, size, sums = torch.randn(2, 3), torch.zeros(2), torch.zeros(2, 3)
    before = codebook.clone()
    z = torch.randn(10, 3)
    counts = torch.tensor([10, 0])
    batch = torch.stack([z.sum(0), torch.zeros(3)])
    ema_update_(codebook, size, sums, counts, batch, backend=backend)
    assert_close("mean", codebook[0], z.double().mean(0))
    assert torch.equal(codebook[1], before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", (0.5, 3.0))
def test_restart(backend, threshold):
    codebook, size, sums = start()
    size.copy_(torch.tensor([10.0, 0.1, 10.0, 0.2, 10.0, 0.0, 10.0]))
    expected = codebook.clone()
    fresh = torch.randn(7, 3)
    fresh[5, 1] = math.nan
    counts, batch = statistics([0, 0, 0, 100, 0, 0, 0])
    ema_update_(
        codebook,
        size,
        sums,
        counts,
        batch,
        restart_below=threshold,
        restart_vectors=fresh,
        backend=backend,
    )
    mass = max(1.0, threshold)
    dead = [1] if threshold == 0.5 else [1, 3]  # 0.99 * 0.2 + 0.01 * 100 = 1.198
    for i in dead:
        assert torch.equal(codebook[i], fresh[i])
        assert size[i] == mass
        assert torch.equal(sums[i], fresh[i] * mass)
    kept = [0, 2, 4, 5, 6]
    assert torch.equal(codebook[kept], expected[kept])
    assert codebook.isfinite().all() and sums.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step_moves_codes_to_their_means(backend):
    centres = torch.randn(4, 8) * 10
    z = centres.repeat(50, 1) + 0.1 * torch.randn(200, 8)
    codebook, size, sums = centres + 1, torch.ones(4), centres + 1
    for _ in range(100):
        out = vector_quantize(z, codebook, backend=backend)
        ema_update_(
            codebook, size, sums, out.code_counts, out.code_sums, decay=0.8, backend=backend
        )
    means = z.view(50, 4, 8).double().mean(0)
    assert_close("codebook", codebook, means, ulps=64)


def test_float64():
    codebook, size, sums = start(dtype=torch.float64)
    counts, batch = statistics([1, 0, 2, 3, 4, 5, 6], dtype=torch.float64)
    want = (0.99 * codebook + 0.01 * batch) / (0.99 + 0.01 * counts[:, None].double())
    want[1] = codebook[1]
    ema_update_(codebook, size, sums, counts, batch)
    assert_close("codebook", codebook, want)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"counts": torch.zeros(7)}, "counts has dtype"),
        ({"counts": torch.zeros(6, dtype=torch.int64)}, "counts has shape"),
        ({"cluster_size": torch.zeros(7, 1)}, "cluster_size has shape"),
        ({"code_sums_ema": torch.zeros(7, 4)}, "code_sums_ema has shape"),
        ({"sums": torch.zeros(7, 3, dtype=torch.float64)}, "sums has dtype"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"laplace_eps": -1.0}, "laplace_eps=-1.0"),
        ({"restart_below": 1.0}, "restart_vectors missing"),
        ({"restart_vectors": torch.zeros(7, 3)}, "restart_vectors given"),
        ({"restart_below": 1.0, "restart_vectors": torch.zeros(7, 2)}, "restart_vectors has shape"),
    ),
)
def test_bad_input(change, message):
    codebook, size, sums = start()
    counts, batch = statistics([1] * 7)
    arguments = {
        "codebook": codebook,
        "cluster_size": size,
        "code_sums_ema": sums,
        "counts": counts,
        "sums": batch,
    } | change
    before = codebook.clone()
    with pytest.raises(InputError, match=message):
        ema_update_(**arguments)
    assert torch.equal(codebook, before)
