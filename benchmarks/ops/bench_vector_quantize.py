"""Nearest code and the quantizer's training step on the CPU, beside the peers.

`pytest benchmarks/ops/bench_vector_quantize.py --benchmark-only --benchmark-group-by=group`: one
group per shape, so that its ratios come from one run. Every row's `extra_info` holds how many codes
differ from the float64 definition.
"""

from __future__ import annotations

import pytest
import torch

from msvq_fast.ops import ema_update_, nearest_code, vector_quantize

D = 64
SHAPES = ((65536, 256), (65536, 512), (65536, 1024), (16384, 8192))
DATA = ("normal", "init", "trained")


def make(data, n, k):
    torch.manual_seed(0)
    z, codebook = torch.randn(n, D), torch.randn(k, D)
    if data == "init":
        codebook = (torch.rand(k, D) * 2 - 1) / k
    elif data == "trained":
        z = codebook[torch.randint(k, (n,))] + 0.3 * z
    return z, codebook


def search_ours(z, codebook):
    return lambda: nearest_code(z, codebook)


def search_ours_nchw(z, codebook):
    image = z.view(16, -1, D).transpose(1, 2).contiguous()
    return lambda: nearest_code(image, codebook, dim=1).reshape(-1)


def search_faiss(z, codebook):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(D)
    index.add(codebook.numpy())
    rows = z.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def search_cdist(z, codebook):
    return lambda: torch.cdist(z, codebook).argmin(1)


def search_addmm(z, codebook):
    def run():
        half = codebook.square().sum(1) / 2
        columns = codebook.t().contiguous()
        scores = (torch.addmm(half, part, columns, alpha=-1) for part in z.split(4096))
        return torch.cat([score.argmin(1) for score in scores])

    return run


SEARCHES = {
    "msvq_fast": search_ours,
    "msvq_fast nchw": search_ours_nchw,
    "faiss IndexFlatL2": search_faiss,
    "torch cdist": search_cdist,
    "torch addmm": search_addmm,
}


@pytest.mark.parametrize("who", SEARCHES)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_search(benchmark, n, k, data, who):
    benchmark.group = f"search {n}x{k} {data}"
    z, codebook = make(data, n, k)
    run = SEARCHES[who](z, codebook)
    part = 2**22 // k
    want = nearest_code(z[:part], codebook, backend="reference")
    wrong = int((run()[:part] != want).sum())
    benchmark.extra_info |= {"wrong_codes": wrong, "of": part}
    assert wrong == 0 or not who.startswith("msvq_fast")
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)


def step_of(backend):
    def make_step(z, codebook):
        codebook = codebook.clone()
        size, sums = torch.ones(len(codebook)), codebook.clone()
        upstream = torch.randn_like(z)

        def run():
            z.grad = None
            out = vector_quantize(z, codebook, backend=backend)
            torch.autograd.backward([out.z_q, out.commitment_loss], [upstream, torch.ones(())])
            ema_update_(codebook, size, sums, out.code_counts, out.code_sums, backend=backend)

        return run

    return make_step


def step_vector_quantize_pytorch(z, codebook):
    package = pytest.importorskip("vector_quantize_pytorch")
    module = package.VectorQuantize(
        dim=D, codebook_size=len(codebook), decay=0.99, commitment_weight=0.25
    )
    upstream = torch.randn_like(z)

    def run():
        z.grad = None
        z_q, _, loss = module(z[None])
        torch.autograd.backward([z_q[0], loss.sum()], [upstream, torch.ones(())])

    return run


STEPS = {
    "msvq_fast": step_of("native"),
    "msvq_fast reference": step_of("reference"),
    "vector-quantize-pytorch": step_vector_quantize_pytorch,
}


@pytest.mark.parametrize("who", STEPS)
@pytest.mark.parametrize(("n", "k"), ((65536, 256), (65536, 512), (16384, 1024)))
def test_training_step(benchmark, n, k, who):
    benchmark.group = f"training step {n}x{k}"
    z, codebook = make("normal", n, k)
    run = STEPS[who](z.requires_grad_(), codebook)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
