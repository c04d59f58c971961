"""The Triton local attention: in the interpreter without a GPU, on the GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import CASES, bias_sizes, check_scores_of_minus_infinity, run
from index_lists import make_inputs, pairs
from parity import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from msvq_fast.ops import InputError, local_attention
from msvq_fast.ops.local_attention import op

if op.OP.missing.get("triton") is not None:
    pytest.skip(op.OP.missing["triton"], allow_module_level=True)

from msvq_fast.ops.local_attention import triton_calls, triton_kernels, triton_shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# tiles that end in the middle, grids past one tile, more scales than one launch takes
LARGE = [
    ([(5, 6), (9, 11)], [3, 5], {}),
    ([(5, 6), (9, 11)], [3, 5], {"order": "raster", "include_self": True}),
    ([(4, 3), (9, 10)], [3, 3], {"border": "shift"}),
    ([(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (5, 6)], ["full", 1, 3, 3, 3, 3], {}),
]


def to_device(inputs):
    q, keys, values, bias = inputs

    def leaf(t):
        return None if t is None else t.detach().to(DEVICE).requires_grad_()

    return (
        leaf(q),
        [*map(leaf, keys)],
        [*map(leaf, values)],
        None if bias is None else [*map(leaf, bias)],
    )


def exact(inputs):
    q, keys, values, bias = inputs

    def leaf(t):
        return None if t is None else t.detach().cpu().double().requires_grad_()

    return (
        leaf(q),
        [*map(leaf, keys)],
        [*map(leaf, values)],
        None if bias is None else [*map(leaf, bias)],
    )


def test_keys_of_minus_infinite_bias_do_not_count():
    check_scores_of_minus_infinity("triton", DEVICE)


def compare(inputs, grids, kernels, options, *, ulps=32):
    want, want_grads = run(
        local_attention, exact(inputs), grids, kernels, options, backend="reference"
    )
    got, grads = run(local_attention, to_device(inputs), grids, kernels, options, backend="triton")
    assert_close("value", got.cpu(), want, ulps=ulps)
    for i, (grad, want_grad) in enumerate(zip(grads, want_grads, strict=True)):
        if want_grad.abs().max() == 0:  # a lone key has weight 1 whatever the query
            assert grad.abs().max() < 1e-5
        else:
            assert_close(f"grad of leaf {i}", grad.cpu(), want_grad, ulps=2 * ulps)


@pytest.mark.parametrize(("grids", "kernels", "options"), CASES + LARGE)
def test_agrees_with_the_reference(grids, kernels, options):
    inputs = make_inputs(grids, heads=1, dtype=torch.float32)
    compare(inputs, grids, kernels, options)


@pytest.mark.parametrize(("grids", "kernels", "options"), [CASES[i] for i in (0, 2, 3, 4, 12, 18)])
def test_bias(grids, kernels, options):
    sizes = bias_sizes(kernels, options, True)
    inputs = make_inputs(grids, heads=2, kv_heads=1, dtype=torch.float32, bias_sizes=sizes)
    compare(inputs, grids, kernels, options)


@pytest.mark.parametrize("width", [16, 20, 128])
def test_float16(width):
    inputs = make_inputs([(5, 3), (10, 6)], width=width, dtype=torch.float16)
    compare(inputs, [(5, 3), (10, 6)], [3, 5], {}, ulps=2)


def test_float32_of_128_channels():
    inputs = make_inputs([(2, 3), (4, 5)], heads=1, width=128, dtype=torch.float32)
    compare(inputs, [(2, 3), (4, 5)], [1, 3], {})


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 3)])
def test_grouped_heads_and_scale(heads, kv_heads):
    inputs = make_inputs([(1, 2), (2, 4)], batch=2, heads=heads, kv_heads=kv_heads)
    inputs = tuple(
        t.float() if isinstance(t, torch.Tensor) else t and [x.float() for x in t] for t in inputs
    )
    for options in ({"scale": 0.7}, {"scale": 0.0}):
        compare(inputs, [(1, 2), (2, 4)], [3, 3], options)


def test_sees_the_pairs_of_the_paper():
    """Equal keys and one-hot values: the output counts the keys of each query."""
    grids, kernels = [(4, 4), (8, 8)], [3, 5]
    q = torch.zeros(1, 1, 64, 80, device=DEVICE)
    keys = [torch.zeros(1, 1, n, 80, device=DEVICE) for n in (16, 64)]
    values = [torch.eye(80, device=DEVICE)[None, None, :16].contiguous(),
              torch.eye(80, device=DEVICE)[None, None, 16:].contiguous()]  # fmt: skip
    out = local_attention(q, keys, values, grids=grids, kernels=kernels, backend="triton")[0, 0]
    assert (out[:, :16] > 0).sum() == 400 and (out[:, 16:] > 0).sum() == 1092


@pytest.mark.parametrize("order", ["bidirectional", "raster"])
def test_forbidden_keys_do_not_count(order):
    grids, kernels = [(2, 3), (4, 6)], [1, 3]
    q, keys, values, _ = to_device(make_inputs(grids, heads=1, width=4, dtype=torch.float32))
    options = {"grids": grids, "kernels": kernels, "order": order, "backend": "triton"}
    want = local_attention(q, keys, values, **options)
    for i in range(0, 24, 5):
        poisoned = []
        for tensors in (keys, values):
            copies = [t.detach().clone() for t in tensors]
            for n in range(2):
                seen = pairs(grids[-1], grids[n], kernels[n], own=n == 1, raster=order == "raster")
                mask = torch.ones(copies[n].shape[2], dtype=torch.bool)
                mask[[key for key, _, _ in seen[i]]] = False
                copies[n][:, :, mask.to(DEVICE)] = 1e4
            poisoned.append(copies)
        got = local_attention(q, *poisoned, **options)
        assert torch.equal(got[:, :, i], want[:, :, i])
        grads = torch.autograd.grad(want[0, 0, i].sum(), values, retain_graph=True)
        for n, grad in enumerate(grads):
            seen = pairs(grids[-1], grids[n], kernels[n], own=n == 1, raster=order == "raster")
            touched = set(grad[0, 0].abs().sum(1).nonzero().flatten().tolist())
            assert touched == {key for key, _, _ in seen[i]}


def test_rows_without_keys_are_zero():
    q, keys, values, _ = to_device(make_inputs([(4, 4)], dtype=torch.float32))
    options = {"grids": [(4, 4)], "backend": "triton"}
    out = local_attention(q, keys, values, kernels=[3], order="raster", **options)
    assert (out[:, :, 0] == 0).all() and (out[:, :, 1:] != 0).any(-1).all()
    out.sum().backward()
    assert (q.grad[:, :, 0] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, *keys, *values))
    out = local_attention(q, keys, values, kernels=[1], **options)
    q.grad = None
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


def test_strides_empty_batches_and_repeated_bits():
    grids, kernels = [(2, 3), (4, 6)], [3, 3]
    inputs = make_inputs(grids, heads=3, dtype=torch.float32, bias_sizes=[3, 3])
    q, keys, values, bias = to_device(inputs)
    flat = [q, *keys, *values, *bias]
    options = {"grids": grids, "kernels": kernels, "bias": bias, "backend": "triton"}
    want = local_attention(q, keys, values, **options)
    want_grads = torch.autograd.grad(want.square().sum(), flat)

    def strided(t):
        wide = torch.zeros(*t.transpose(1, 2).shape[:3], t.shape[3] + 5, device=DEVICE)
        wide[..., 2:-3] = t.detach().transpose(1, 2)
        return wide[..., 2:-3].transpose(1, 2).requires_grad_()

    views = [strided(q), [*map(strided, keys)], [*map(strided, values)]]
    got = local_attention(*views, **options)
    grads = torch.autograd.grad(got.square().sum(), [views[0], *views[1], *views[2], *bias])
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))
    empty = local_attention(q[:0], [k[:0] for k in keys], [v[:0] for v in values], **options)
    assert empty.shape == (0, 3, 24, 8)


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory is free only where it is untouched")
def test_offsets_past_32_bits():
    q, keys, values, _ = make_inputs([(3, 4)], heads=1, batch=2, dtype=torch.float16)
    options = {"grids": [(3, 4)], "kernels": [3], "backend": "triton"}

    def far_apart(t):
        memory = torch.from_numpy(np.zeros(2**31 + t[0].numel(), np.float16))
        return memory.as_strided(t.shape, (2**31, *t.stride()[1:])).copy_(t)

    with torch.no_grad():
        want = local_attention(q, keys, values, **options)
        moved = far_apart(q), [far_apart(keys[0])], [far_apart(values[0])]
        assert torch.equal(local_attention(*moved, **options), want)


def test_says_what_it_does_not_take():
    inputs = make_inputs([(2, 2)], width=136, dtype=torch.float32)
    q, keys, values, _ = to_device(inputs)
    with pytest.raises(InputError, match="heads of at most 128, q has 136"):
        local_attention(q, keys, values, grids=[(2, 2)], kernels=[3], backend="triton")
    with pytest.raises(InputError, match=r"float32, bfloat16 or float16, q is torch\.float64"):
        local_attention(
            q.double(), [keys[0].double()], [values[0].double()],
            grids=[(2, 2)], kernels=[3], backend="triton",
        )  # fmt: skip


def test_opcheck():
    inputs = make_inputs(
        [(2, 3), (3, 4)], heads=1, width=4, dtype=torch.float32, bias_sizes=[3, None]
    )
    q, keys, values, bias = to_device(inputs)
    q, keys, values = q.detach(), [k.detach() for k in keys], [v.detach() for v in values]
    bias = [bias[0].detach(), None]
    sizes = [3, 4, 2, 3, 3, 3, 4, 3]
    rules = [True, True, False, False]  # own, raster, include_self, shift
    forward = torch.ops.msvq_fast.local_attention_triton
    torch.library.opcheck(forward, (q, keys, values, bias, sizes, rules, 0.5))
    out, lse = forward(q, keys, values, bias, sizes, rules, 0.5)
    torch.library.opcheck(
        torch.ops.msvq_fast.local_attention_backward_triton,
        (torch.ones_like(q), q, keys, values, bias, out, lse, sizes, rules, 0.5),
    )


def test_compiles_once_for_any_grid(monkeypatch):
    def step(q, keys, values, height, width, backend="triton"):
        grids = [(height, width), (2 * height, width)]
        out = local_attention(q, keys, values, grids=grids, kernels=[1, 3], backend=backend)
        return out.square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # The first sizes are all different: equal ones would be compiled as one number.
    sizes = [(h, w) for h in (1, 2, 4, 3) for w in (5, 3, 2, 7, 8)]
    assert len(sizes) == 20
    for i, (h, w) in enumerate(sizes):
        tensors = make_inputs([(h, w), (2 * h, w)], heads=1, width=11, dtype=torch.float32)
        q, keys, values, _ = to_device(tensors)
        with monkeypatch.context() as patch:
            checked = i in (0, 6, 19)  # the interpreter is slow
            if not checked:
                patch.setattr(triton_calls, "launch", lambda *args: None)
            got = torch.autograd.grad(compiled(q, keys, values, h, w), [q, *keys, *values])
        if checked:
            loss = step(q, keys, values, h, w, "reference")
            want = torch.autograd.grad(loss, [q, *keys, *values])
            for mine, truth in zip(got, want, strict=True):
                torch.testing.assert_close(mine, truth)
    assert counter.frame_count == 1


def test_regions_of_tiles_change_no_bit(monkeypatch):
    grids, kernels = [(5, 9)], [3]
    q, keys, values, _ = to_device(make_inputs(grids, heads=1, dtype=torch.float32))
    options = {"grids": grids, "kernels": kernels, "backend": "triton"}
    results = []
    for full in (10**9, 1):  # programs that fill the GPU: never, always
        monkeypatch.setattr(triton_calls, "_FULL", full)
        out = local_attention(q, keys, values, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, *keys, *values])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_other_configuration_runs_than_the_checked_ones():
    variants = triton_kernels.variants()
    assert len({v.name for v in variants}) == len(variants) == len(triton_shapes.LAUNCHES)
    for variant in variants:
        names = list(variant.kernel.arg_names)
        assert list(variant.signature) == names
        assert {name for name in names if name.isupper()} == set(variant.constants)
    with pytest.raises(KeyError):
        triton_shapes.launch("forward_kernel", 1, (), torch.float64, 32)


def test_grids_of_too_many_cells_a_side_are_refused():
    q = torch.zeros(1, 1, 2**15, 8, device=DEVICE)
    with pytest.raises(InputError, match="grids of less than 32768 a side, not 1 x 32768"):
        local_attention(q, [q], [q], grids=[(1, 2**15)], kernels=[3], backend="triton")
