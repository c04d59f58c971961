"""Local attention beyond the oracle: instruction sets, threads, compile, other libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from index_lists import make_inputs
from parity import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from msvq_fast.ops import local_attention
from msvq_fast.ops.local_attention import op, reference

if op.OP.missing.get("native") is not None:
    pytest.skip(op.OP.missing["native"], allow_module_level=True)

from msvq_fast import _C
from msvq_fast.ops.local_attention import native

# tiles that end in the middle, windows wider than the grid, more scores than one group keeps
LARGE = [
    ([(9, 35), (18, 70)], [3, 5], {}),
    ([(9, 35), (18, 70)], [3, 5], {"order": "raster", "include_self": True}),
    ([(6, 23), (18, 70)], [5, 7], {"border": "shift"}),
    ([(6, 23), (17, 65)], [3, 13], {"order": "raster"}),
    ([(4, 5), (9, 66)], ["full", "full"], {}),
    ([(5, 66), (9, 129)], [1, 3], {}),
]


def leaves(grids, **kwargs):
    q, keys, values, bias = make_inputs(grids, **kwargs)
    flat = [q, *keys, *values, *(b for b in bias or () if b is not None)]
    return (q, keys, values, bias), flat


def values_and_grads(inputs, flat, **kwargs):
    q, keys, values, bias = inputs
    out = local_attention(q, keys, values, bias=bias, **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, flat, upstream)]


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("grids", "kernels", "options"), LARGE)
def test_every_instruction_set_agrees_on_many_tiles(
    grids, kernels, options, dtype, isa, monkeypatch
):
    run = _C.local_attention_cpu

    def on_isa(*args):
        return run(*args, isa)

    monkeypatch.setattr(native._C, "local_attention_cpu", on_isa)
    size = 13 if options.get("border") == "shift" else kernels[1]
    sizes = None if kernels[1] == "full" else [None, size]
    inputs, flat = leaves(grids, kv_heads=1, width=12, dtype=dtype, bias_sizes=sizes)
    kwargs = {"grids": grids, "kernels": kernels, **options}
    exact = [t.detach().double().requires_grad_() for t in flat]
    n = len(grids)
    bias = None if sizes is None else [None, exact[-1]]
    twin = (exact[0], exact[1 : 1 + n], exact[1 + n : 1 + 2 * n], bias)
    want = values_and_grads(twin, exact, backend="reference", **kwargs)
    got = values_and_grads(inputs, flat, backend="native", **kwargs)
    for i, (mine, truth) in enumerate(zip(got, want, strict=True)):
        assert_close(f"output {i}", mine, truth, ulps=32)


def test_results_lie_as_the_queries_do():
    """Heads first or tokens first, so that joining the heads afterwards copies nothing."""
    q, k, v = (torch.randn(2, 12, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    out = local_attention(q, [k], [v], grids=[(3, 4)], kernels=[3], backend="native")
    assert out.stride() == q.stride()
    out = local_attention(q.contiguous(), [k], [v], grids=[(3, 4)], kernels=[3], backend="native")
    assert out.is_contiguous()


def test_bits_do_not_depend_on_threads_or_batch():
    grids, kernels = [(16, 33), (32, 66)], [3, 5]
    inputs, flat = leaves(
        grids, batch=2, heads=4, kv_heads=2, width=16, dtype=torch.float32, bias_sizes=[3, None]
    )
    kwargs = {"grids": grids, "kernels": kernels, "backend": "native"}
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(values_and_grads(inputs, flat, **kwargs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    q, keys, values, bias = inputs
    alone = local_attention(
        q[1:], [k[1:] for k in keys], [v[1:] for v in values], bias=bias, **kwargs
    )
    assert torch.equal(alone[0], results[0][0][1])


def test_memory_is_linear_in_the_tokens():
    """128 x 128 tokens, whose dense scores alone would be 2 GiB, in a fraction of that."""
    grids, kernels = [(32, 32), (128, 128)], [3, 5]
    (q, keys, values, _), flat = leaves(grids, heads=2, width=16, dtype=torch.float32)
    out = local_attention(q, keys, values, grids=grids, kernels=kernels, backend="native")
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in flat) + q.numel() * 17 // 16
    grads = torch.autograd.grad(out.sum(), flat)
    assert all(g.isfinite().all() for g in grads)


def test_second_backward_raises():
    grids, kernels = [(2, 3), (4, 6)], [3, 3]
    (q, keys, values, _), flat = leaves(grids, width=4, dtype=torch.float32)
    out = local_attention(q, keys, values, grids=grids, kernels=kernels, backend="native")
    grad, *_ = torch.autograd.grad(out.sum(), flat, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def call():
    grids, kernels = [(2, 3), (4, 6)], [3, 3]
    q, keys, values, bias = make_inputs(grids, width=4, dtype=torch.float32, bias_sizes=[3, None])
    windows = op.check_windows(q, keys, values, grids, kernels, "raster", False, "clip")
    sizes, rules = native.flatten(windows)
    tensors = [t.detach() for t in (q, *keys, *values)]
    bias = [bias[0].detach(), None]
    return tensors[0], tensors[1:3], tensors[3:5], bias, sizes, rules, 0.5


def test_opcheck():
    q, keys, values, bias, sizes, rules, scale = call()
    forward = torch.ops.msvq_fast.local_attention_native
    torch.library.opcheck(forward, (q, keys, values, bias, sizes, rules, scale))
    out, lse = forward(q, keys, values, bias, sizes, rules, scale)
    torch.library.opcheck(
        torch.ops.msvq_fast.local_attention_backward_native,
        (torch.ones_like(q), q, keys, values, bias, out, lse, sizes, rules, scale),
    )


def test_compiles_once_for_any_grid():
    def step(q, keys, values, height, width):
        grids = [(height, width), (2 * height, 2 * width)]
        out = local_attention(q, keys, values, grids=grids, kernels=[3, 5], backend="native")
        return out.square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # The first sizes are all different: equal ones would be compiled as one number.
    sizes = [(h, w) for h in (5, 3, 6, 7) for w in (7, 4, 3, 9, 8)]
    assert len(sizes) == 20
    for h, w in sizes:
        inputs, flat = leaves([(h, w), (2 * h, 2 * w)], width=11, dtype=torch.float32)
        q, keys, values, _ = inputs
        got = torch.autograd.grad(compiled(q, keys, values, h, w), flat)
        want = torch.autograd.grad(step(q, keys, values, h, w), flat)
        for mine, truth in zip(got, want, strict=True):
            torch.testing.assert_close(mine, truth)
    assert counter.frame_count == 1


def neighbourhood(q, key, value, grid, kernel, dilation):
    """Scores and values of a dilated neighbourhood attention, windows shifted inside the grid.

    NATTEN's definition: a query looks at the tokens of its own residue modulo the dilation, and
    its window of ``kernel`` of them is moved inside.
    """
    height, width = grid

    def axis(size):
        rows = []
        for p in range(size):
            group = list(range(p % dilation, size, dilation))
            start = min(max(p // dilation - kernel // 2, 0), len(group) - kernel)
            rows.append(group[start : start + kernel])
        return torch.tensor(rows)  # (size, kernel)

    rows, columns = axis(height), axis(width)
    index = rows[:, None, :, None] * width + columns[None, :, None, :]  # (h, w, kernel, kernel)
    index = index.reshape(height * width, kernel * kernel)
    scores = (key[:, :, index] * q[:, :, :, None]).sum(-1) * q.shape[-1] ** -0.5
    return scores, value[:, :, index]


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_shifted_windows_are_nattens(ratio, backend):
    """Coarse keys repeated ``ratio`` times under that dilation; branches merged by their LSE."""
    coarse, own = (4, 5), (4 * ratio, 5 * ratio)
    q, keys, values, _ = make_inputs([coarse, own], width=8)

    def repeated(t):
        image = t.reshape(1, 2, *coarse, 8)
        return image.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3).flatten(2, 3)

    branches = [
        neighbourhood(q, repeated(keys[0]), repeated(values[0]), own, 3, ratio),
        neighbourhood(q, keys[1], values[1], own, 3, 1),
    ]
    outs = [(s.softmax(-1)[..., None] * v).sum(-2) for s, v in branches]
    lse = torch.stack([s.logsumexp(-1) for s, _ in branches])
    weights = lse.softmax(0)
    want = sum(w[..., None] * out for w, out in zip(weights, outs, strict=True))
    got = local_attention(
        q,
        keys,
        values,
        grids=[coarse, own],
        kernels=[3, 3],
        border="shift",
        include_self=True,
        backend=backend,
    )
    assert_close("merged NATTEN", got, want.detach(), ulps=64)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("raster", [False, True])
def test_flex_attention_agrees(raster):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    coarse, own, radius = (4, 5), (8, 10), 2
    q, keys, values, _ = make_inputs([coarse, own], width=16, dtype=torch.float32)

    def seen(_batch, _head, i, j):
        y, x = i // own[1], i % own[1]
        fine = j >= coarse[0] * coarse[1]
        k = torch.where(fine, j - coarse[0] * coarse[1], j)
        width = torch.where(fine, own[1], coarse[1])
        centre_y, centre_x = torch.where(fine, y, y // 2), torch.where(fine, x, x // 2)
        reach = torch.where(fine, radius, 1)
        near = ((k // width - centre_y).abs() <= reach) & ((k % width - centre_x).abs() <= reach)
        return near & torch.where(fine, (k < i) if raster else (k != i), True)

    mask = create_block_mask(seen, 1, 1, 80, 100, device="cpu")
    key, value = torch.cat(keys, 2).detach(), torch.cat(values, 2).detach()
    want = flex_attention(q.detach(), key, value, block_mask=mask)  # no backward on a CPU
    got = local_attention(
        q,
        keys,
        values,
        grids=[coarse, own],
        kernels=[3, 5],
        order="raster" if raster else "bidirectional",
        backend="native",
    )
    assert_close("FlexAttention", got, want, ulps=32)


def test_sdpa_bfloat16_is_no_more_exact():
    grids, kernels = [(8, 8), (16, 16)], [3, 5]
    q, keys, values, _ = make_inputs(grids, width=32, dtype=torch.bfloat16)
    exact = [[t.double() for t in group] for group in ([q], keys, values)]
    options = {"grids": grids, "kernels": kernels}
    truth = local_attention(exact[0][0], *exact[1:], **options, backend="reference")
    windows = op.check_windows(q, keys, values, grids, kernels, "bidirectional", False, "clip")
    mask = torch.cat(reference.window_mask(windows), dim=1)
    sdpa = F.scaled_dot_product_attention(
        q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask
    )
    ours = local_attention(q, keys, values, **options, backend="native")
    assert (ours - truth).abs().mean() <= 1.05 * (sdpa - truth).abs().mean()
