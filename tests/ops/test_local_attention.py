"""Local attention against two independent oracles, and the properties of its definition."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from attention_cases import CASES, bias_sizes, check_scores_of_minus_infinity, run
from index_lists import index_list_attention, make_inputs, pairs
from parity import assert_close

from msvq_fast.ops import InputError, local_attention
from msvq_fast.ops.local_attention import op
from msvq_fast.ops.local_attention.reference import window_mask


def why_not(backend):
    return op.OP.missing.get(backend)


BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(why_not("native") is not None, reason=str(why_not("native"))),
    ),
]
NATIVE = BACKENDS[1:]


@pytest.fixture(autouse=True)
def _one_thread():
    """The oracle is thousands of tiny ops: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("grids", "kernels", "options"), CASES)
def test_agrees_with_index_lists(grids, kernels, options, with_bias, backend):
    inputs = make_inputs(grids, bias_sizes=bias_sizes(kernels, options, with_bias))
    want, want_grads = run(index_list_attention, inputs, grids, kernels, options)
    got, grads = run(local_attention, inputs, grids, kernels, options, backend=backend)
    assert_close("value", got, want, ulps=64)
    for i, (grad, want_grad) in enumerate(zip(grads, want_grads, strict=True)):
        assert_close(f"grad of leaf {i}", grad, want_grad, ulps=64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 3)])
def test_grouped_heads_and_scale(heads, kv_heads, backend):
    grids, kernels = [(2, 3), (5, 6)], [3, 3]
    inputs = make_inputs(grids, batch=2, heads=heads, kv_heads=kv_heads)
    for options in ({"scale": 0.7}, {"scale": 0.0}):
        want, want_grads = run(index_list_attention, inputs, grids, kernels, options)
        got, grads = run(local_attention, inputs, grids, kernels, options, backend=backend)
        assert_close("value", got, want, ulps=64)
        for i, (grad, want_grad) in enumerate(zip(grads, want_grads, strict=True)):
            assert_close(f"grad of leaf {i}", grad, want_grad, ulps=64)


def drawn(seed):
    """One setting out of all ratios, windows, borders, orders, scales, head groups and widths."""
    draw = random.Random(seed)
    own = draw.choice([1, 2, 3, 5, 7, 8, 13]), draw.choice([1, 2, 3, 5, 7, 8, 13])
    grids = [own]
    for _ in range(draw.choice([0, 1, 2, 3])):
        ratio = draw.choice([1, 2, 3, 4, 8, 1.3])
        grids.insert(0, tuple(max(1, round(side / ratio)) for side in grids[0]))
    kernels = [draw.choice([1, 3, 5, 7, 15]) for _ in grids]
    options = {"border": draw.choice(["clip", "shift"]), "include_self": draw.random() < 0.5}
    if options["border"] == "clip":
        options["order"] = draw.choice(["bidirectional", "raster"])
    heads, kv_heads = draw.choice([(1, 1), (2, 1), (4, 2), (8, 1)])
    return grids, kernels, options, heads, kv_heads, draw.choice([16, 32, 64, 128])


DRAWS = 600


def test_the_draws_cover_every_pair_of_values():
    rows = []
    for seed in range(DRAWS):
        grids, kernels, options, heads, kv_heads, width = drawn(seed)
        rule = (options["border"], options.get("order"), options["include_self"])
        rows.append((len(grids), grids[-1][0], kernels[-1], rule, (heads, kv_heads), width))
    for i, j in itertools.combinations(range(len(rows[0])), 2):
        possible = itertools.product({row[i] for row in rows}, {row[j] for row in rows})
        assert {(row[i], row[j]) for row in rows} == set(possible)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("seed", range(DRAWS))
def test_any_setting(seed, backend):
    grids, kernels, options, heads, kv_heads, width = drawn(seed)
    inputs = make_inputs(grids, heads=heads, kv_heads=kv_heads, width=width)
    want, want_grads = run(local_attention, inputs, grids, kernels, options, backend="reference")
    got, grads = run(local_attention, inputs, grids, kernels, options, backend=backend)
    assert_close("value", got, want, ulps=64)
    for i, (grad, want_grad) in enumerate(zip(grads, want_grads, strict=True)):
        if want_grad.abs().max() < 1e-12:  # a lone key has weight 1 whatever the query
            assert grad.abs().max() < 1e-12
        else:
            assert_close(f"grad of leaf {i}", grad, want_grad, ulps=64)


def far_apart(t):
    """The same batch of two as a view of memory that 32 bits cannot address."""
    memory = torch.from_numpy(np.zeros(2**31 + t[0].numel(), np.float16))  # free until touched
    return memory.as_strided(t.shape, (2**31, *t.stride()[1:])).copy_(t)


@pytest.mark.parametrize("backend", NATIVE)
def test_offsets_past_32_bits(backend):
    grids = [(2, 2), (3, 4)]
    q, keys, values, _ = make_inputs(grids, batch=2, dtype=torch.float16)
    options = {"grids": grids, "kernels": [1, 3], "backend": backend}
    with torch.no_grad():
        want = local_attention(q, keys, values, **options)
        moved = [far_apart(q), [keys[0], far_apart(keys[1])], [values[0], far_apart(values[1])]]
        assert torch.equal(local_attention(*moved, **options), want)


def counts(grids, kernels, **options):
    """Keys per query and scale, as ``local_attention`` builds them."""
    q, keys, values, _ = make_inputs(grids, heads=1, width=1)
    settings = {"order": "bidirectional", "include_self": False, "border": "clip"} | options
    windows = op.check_windows(q, keys, values, grids, kernels, *settings.values())
    return [mask.sum(1) for mask in window_mask(windows)]


def test_counts_of_the_paper():
    coarse, own = counts([(4, 4), (8, 8)], [3, 5])
    assert (coarse.sum(), own.sum()) == (400, 1092)
    assert (own.min(), own.max(), coarse.min(), coarse.max()) == (8, 24, 4, 9)
    # Figure 3: token 1 is the corner case, token 10 sees the most.
    first, second = counts([(4, 4), (4, 4)], [1, 3])
    assert second.sum() == 84
    assert (second[0], second[9]) == (3, 8)
    assert (first == 1).all()


def test_counts_in_raster_order():
    (own,) = counts([(8, 8)], [5], order="raster")
    assert own.sum() == 546
    assert (own == 0).nonzero().flatten().tolist() == [0]
    (own,) = counts([(8, 8)], [5], order="raster", include_self=True)
    assert (own.sum(), own.max()) == (546 + 64, 13)


def test_shifted_windows_have_equal_counts():
    coarse, own = counts([(4, 4), (9, 8)], [3, 5], border="shift", include_self=True)
    assert (coarse == 9).all() and (own == 25).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"order": "raster"}, {"border": "shift"}])
def test_no_gradient_leaks_outside_the_windows(options, backend):
    grids, kernels = [(2, 3), (4, 5)], [1, 3]
    q, keys, values, _ = make_inputs(grids, heads=1, width=4)
    out = local_attention(q, keys, values, grids=grids, kernels=kernels, backend=backend, **options)
    allowed = [
        pairs(
            grids[-1],
            grid,
            kernel,
            own=n == 1,
            raster=options.get("order") == "raster",
            border=options.get("border", "clip"),
        )
        for n, (grid, kernel) in enumerate(zip(grids, kernels, strict=True))
    ]
    for i in range(20):
        grads = torch.autograd.grad(out[0, 0, i].sum(), [*keys, *values], retain_graph=True)
        for n in range(2):
            seen = {key for key, _, _ in allowed[n][i]}
            for name, grad in (("key", grads[n]), ("value", grads[2 + n])):
                touched = set(grad[0, 0].abs().sum(1).nonzero().flatten().tolist())
                assert touched <= seen, f"query {i} reaches {name}s {touched - seen} of scale {n}"
            assert set(grads[2 + n][0, 0].abs().sum(1).nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["bidirectional", "raster"])
def test_forbidden_keys_do_not_count(order, backend):
    """Poisoning what query i must not see changes not one bit of its output."""
    grids, kernels = [(2, 3), (4, 6)], [1, 3]
    q, keys, values, _ = make_inputs(grids, heads=1, width=4, dtype=torch.float32)
    options = {"grids": grids, "kernels": kernels, "order": order, "backend": backend}
    want = local_attention(q, keys, values, **options)
    for i in range(0, 24, 5):
        poisoned = []
        for tensors in (keys, values):
            copies = [t.detach().clone() for t in tensors]
            for n in range(2):
                seen = pairs(grids[-1], grids[n], kernels[n], own=n == 1, raster=order == "raster")
                kept = [key for key, _, _ in seen[i]]
                mask = torch.ones(copies[n].shape[2], dtype=torch.bool)
                mask[kept] = False
                copies[n][:, :, mask] = 1e4
            poisoned.append(copies)
        got = local_attention(q, *poisoned, **options)
        assert torch.equal(got[:, :, i], want[:, :, i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero(backend):
    q, keys, values, _ = make_inputs([(4, 4)], dtype=torch.float32)
    options = {"grids": [(4, 4)], "backend": backend}
    out = local_attention(q, keys, values, kernels=[3], order="raster", **options)
    assert (out[:, :, 0] == 0).all() and (out[:, :, 1:] != 0).any(-1).all()
    out.sum().backward()
    assert (q.grad[:, :, 0] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, *keys, *values))
    q.grad = None
    out = local_attention(q, keys, values, kernels=[1], **options)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_minus_infinite_bias_do_not_count(backend):
    check_scores_of_minus_infinity(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    grids, kernels = [(2, 2), (3, 4)], [3, 3]
    q, keys, values, bias = make_inputs(grids, heads=2, kv_heads=1, width=3, bias_sizes=[3, 3])

    def function(q, k0, k1, v0, v1, b0, b1):
        return local_attention(
            q, [k0, k1], [v0, v1], grids=grids, kernels=kernels, bias=[b0, b1], backend=backend
        )

    assert torch.autograd.gradcheck(function, (q, *keys, *values, *bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 20, 32, 64])
def test_precision(dtype, width, backend):
    grids, kernels, options = [(5, 9), (10, 18)], [3, 5], {}
    inputs = make_inputs(grids, width=width, dtype=dtype, bias_sizes=[3, None])
    exact = [
        [t if t is None else t.detach().double().requires_grad_() for t in group]
        for group in ([inputs[0]], *inputs[1:])
    ]
    want, want_grads = run(
        local_attention, (exact[0][0], *exact[1:]), grids, kernels, options, backend="reference"
    )
    got, grads = run(local_attention, inputs, grids, kernels, options, backend=backend)
    assert got.dtype == dtype
    # One rounding of the output; gradients see the rounded output through delta = dO·O.
    assert_close("value", got, want, ulps=1 if dtype != torch.float32 else 16)
    for i, (grad, want_grad) in enumerate(zip(grads, want_grads, strict=True)):
        assert grad.dtype == dtype
        assert_close(f"grad of leaf {i}", grad, want_grad, ulps=2 if dtype != torch.float32 else 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_empty_batch(backend):
    grids, kernels = [(2, 3), (4, 6)], [3, 3]
    q, keys, values, _ = make_inputs(grids, heads=3, width=8, dtype=torch.float32)
    options = {"grids": grids, "kernels": kernels, "backend": backend}
    want = local_attention(q, keys, values, **options)

    def strided(t):
        """The same tensor as a view of ``(B, N, heads, d)`` inside a wider buffer."""
        wide = torch.zeros(*t.transpose(1, 2).shape[:3], t.shape[3] + 5)
        wide[..., 2:-3] = t.detach().transpose(1, 2)
        return wide[..., 2:-3].transpose(1, 2)

    got = local_attention(
        strided(q), [strided(k) for k in keys], [strided(v) for v in values], **options
    )
    assert torch.equal(got, want)
    empty = local_attention(q[:0], [k[:0] for k in keys], [v[:0] for v in values], **options)
    assert empty.shape == (0, 3, 24, 8)


def test_nan_and_infinite_scores_are_not_hidden():
    q, keys, values, _ = make_inputs([(4, 4)], dtype=torch.float32)
    with torch.no_grad():
        q[0, 0, 5, 0] = torch.nan
    for backend in ("reference", None):
        out = local_attention(q, keys, values, grids=[(4, 4)], kernels=[3], backend=backend)
        assert out[0, 0, 5].isnan().all() and out[0, 1].isfinite().all()


def good():
    grids = [(2, 2), (4, 4)]
    q, keys, values, _ = make_inputs(grids, heads=4, kv_heads=2, dtype=torch.float32)
    return {"q": q, "keys": keys, "values": values, "grids": grids, "kernels": [3, 3]}


BAD = [
    ({"kernels": [3, 4]}, "kernels[1]=4; expected an odd int below 2**31, 0 or 'full'"),
    ({"kernels": [3, -1]}, "kernels[1]=-1;"),
    ({"kernels": [3, "all"]}, "kernels[1]='all';"),
    ({"kernels": [3, True]}, "kernels[1]=True;"),
    ({"kernels": [3, 3.0]}, "kernels[1]=3.0;"),
    ({"kernels": [3, torch.tensor(3)]}, "kernels[1]=tensor(3);"),
    ({"kernels": [3, 2**62 - 1]}, "kernels[1]=4611686018427387903;"),
    ({"kernels": [0, 0]}, "kernels are all 0;"),
    ({"kernels": [3]}, "kernels has 1 entries; expected 2, one per grid"),
    ({"grids": []}, "grids is empty;"),
    ({"grids": [(2, 2), (4, 5)]}, "q has 16 tokens; expected 20 for grids[-1]=(4, 5)"),
    ({"grids": [(2, 3), (4, 4)]}, "keys[0] has shape (1, 2, 4, 8); expected (B, kv_heads, 6, d)"),
    ({"grids": [(0, 3), (4, 4)]}, "grids[0]=(0, 3); expected ints (h, w), both at least 1"),
    ({"grids": [(2, 2), (4.0, 4.0)]}, "grids[1]=(4.0, 4.0); expected ints (h, w)"),
    ({"scale": "a"}, "scale='a'; expected a float or None"),
    ({"scale": torch.tensor(0.5)}, "scale=tensor(0.5000);"),
    ({"keys": []}, "keys has 0 entries; expected 2, one per grid"),
    ({"order": "causal"}, "order='causal'; expected one of 'bidirectional', 'raster'"),
    ({"border": "wrap"}, "border='wrap'; expected one of 'clip', 'shift'"),
    ({"order": "raster", "border": "shift"}, "border='shift' with order='raster';"),
    ({"q": torch.zeros(1, 3, 16, 8)}, "keys have 2 heads; expected a divisor of q's 3 heads"),
    ({"q": torch.zeros(16, 8)}, "q has shape (16, 8); expected 4 dimensions (B, heads, N_m, d)"),
    ({"q": torch.zeros(1, 4, 16, 8, dtype=torch.int64)}, "q has dtype torch.int64;"),
    ({"q": torch.zeros(1, 4, 16, 8).half()}, "keys[0] has dtype torch.float32; expected q's"),
    ({"q": torch.zeros(1, 4, 16, 8, device="meta")}, "keys[0] is on cpu; expected q's meta"),
    ({"q": torch.zeros(1, 4, 16, 4)}, "keys[0] has shape (1, 2, 4, 8); expected (1, 2, 4, 4)"),
    ({"bias": [None]}, "bias has 1 entries; expected 2, one per grid"),
    ({"bias": [None, torch.zeros(4, 5, 5)]}, "bias[1] has shape (4, 5, 5); expected (4, 3, 3)"),
    ({"bias": [torch.zeros(4, 3, 3).double(), None]}, "bias[0] has dtype torch.float64;"),
    (
        {"bias": [torch.zeros(4, 3, 3), None], "border": "shift"},
        "bias[0] has shape (4, 3, 3); expected (4, 5, 5)",
    ),
    (
        {"kernels": ["full", 3], "bias": [torch.zeros(4, 3, 3), None]},
        "bias[0] is a tensor; expected None where kernels[0]='full'",
    ),
    ({"backend": "cuda"}, "backend='cuda';"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_says_what_is_wrong(change, message):
    arguments = good() | change
    args = [arguments.pop(name) for name in ("q", "keys", "values")]
    with pytest.raises(InputError) as error:
        local_attention(*args, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_not_rounded_by_autocast(dtype):
    q, keys, values, _ = make_inputs([(4, 4), (8, 8)], dtype=dtype)
    options = {"grids": [(4, 4), (8, 8)], "kernels": [3, 5], "backend": "reference"}
    want = local_attention(q, keys, values, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = local_attention(q, keys, values, **options)
    assert torch.equal(got, want)


def test_reference_under_another_default_device():
    q, keys, values, bias = make_inputs([(4, 4)], bias_sizes=[3])
    options = {"grids": [(4, 4)], "kernels": [3], "order": "raster", "bias": bias}
    want = local_attention(q, keys, values, backend="reference", **options)
    with torch.device("meta"):
        got = local_attention(q, keys, values, backend="reference", **options)
    assert torch.equal(got, want)
