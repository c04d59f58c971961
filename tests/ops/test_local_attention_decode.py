"""Local attention of a few queries: rows of the whole, rings of keys, bad input."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, bias_sizes
from index_lists import make_inputs
from parity import assert_close

from msvq_fast.ops import InputError, local_attention, local_attention_at
from msvq_fast.ops.local_attention.op import OP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU in the interpreter
triton = pytest.mark.skipif(
    OP.missing.get("triton") is not None, reason=str(OP.missing.get("triton"))
)


@pytest.mark.parametrize(("grids", "kernels", "options"), CASES)
def test_is_rows_of_the_whole(grids, kernels, options):
    q, keys, values, bias = make_inputs(
        grids, heads=4, kv_heads=2, bias_sizes=bias_sizes(kernels, options, True)
    )
    options = {"order": "bidirectional", "grids": grids, "kernels": kernels, **options}
    want = local_attention(q, keys, values, bias=bias, backend="reference", **options)
    positions = torch.randperm(q.shape[2])[:7]
    got = local_attention_at(q[:, :, positions], keys, values, positions, bias=bias, **options)
    assert_close("value", got, want[:, :, positions].detach(), ulps=64)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=triton)])
def test_keys_of_minus_infinite_bias_do_not_count(backend):
    """Nor does a query of which no other key is left: 0, as in the whole."""
    q, keys, values, _ = make_inputs([(3, 3)], heads=2, kv_heads=2, dtype=torch.float32)
    bias = [torch.randn(2, 3, 3)]
    bias[0][0, 0] = bias[0][1, :, 2] = -torch.inf
    options = {"grids": [(3, 3)], "kernels": [3], "order": "raster", "bias": bias}
    needs = backend == "reference"
    leaves = [t.detach().requires_grad_(needs) for t in (q, keys[0], values[0])]
    want = local_attention(leaves[0], leaves[1:2], leaves[2:], **options)
    positions = torch.arange(9)
    bias[0] = bias[0].to(DEVICE) if backend == "triton" else bias[0]
    there = [t.to(DEVICE) if backend == "triton" else t for t in (*leaves, positions)]
    got = local_attention_at(there[0], there[1:2], there[2:3], there[3], backend=backend, **options)
    assert want[0, 0, 3].abs().max() == 0
    torch.testing.assert_close(got.cpu(), want)
    if needs:
        upstream = torch.randn_like(want)
        for one, other in zip(
            torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(one, other)


def test_a_ring_holds_what_is_read():
    q, keys, values, _ = make_inputs([(6, 4)], dtype=torch.float32)
    options = {"grids": [(6, 4)], "kernels": [3]}
    whole = local_attention(q, keys, values, order="raster", **options)
    positions = torch.tensor([14, 13])  # row 3, which reads row 2
    ring = [torch.full((1, 2, 8, 8), 1e4) for _ in range(2)]
    for store, items in zip(ring, (keys, values), strict=True):
        store[:, :, 4:7] = items[0][:, :, 12:15]
        store[:, :, :4] = items[0][:, :, 8:12]
    got = local_attention_at(q[:, :, positions], ring[:1], ring[1:], positions, **options)
    torch.testing.assert_close(got, whole[:, :, positions])
    more = [torch.zeros(1, 2, 12, 8)]
    with pytest.raises(
        InputError, match=r"values\[0\] has shape \(1, 2, 12, 8\); expected .* 8, d"
    ):
        local_attention_at(q[:, :, :1], ring[:1], more, torch.tensor([0]), **options)
    for rows in (1, 7):
        small = [torch.zeros(1, 2, rows * 4, 8)]
        with pytest.raises(InputError, match=rf"keys\[0\] holds {rows} rows; expected 2 to 6"):
            local_attention_at(q[:, :, :1], small, small, torch.tensor([0]), **options)
    with pytest.raises(InputError, match=r"positions has dtype torch.int32 and shape \(2,\)"):
        local_attention_at(q[:, :, :2], keys, values, torch.arange(2).int(), **options)


def compare(inputs, positions, ulps=32, **options):
    """The Triton kernel against the definition in float64 at ``positions`` of q."""
    q, keys, values, bias = inputs
    bias = bias or [None] * len(keys)
    groups = [[q[:, :, positions]], keys, values, bias]
    exact = [[None if t is None else t.detach().double() for t in group] for group in groups]
    mine = [[None if t is None else t.detach().to(DEVICE) for t in group] for group in groups]
    want, got = (
        local_attention_at(
            query[0], *rest[:2], where, bias=rest[2], backend=backend, **options
        )
        for (query, *rest), where, backend in (
            (exact, positions, "reference"),
            (mine, positions.to(DEVICE), "triton"),
        )
    )  # fmt: skip
    assert got.dtype == q.dtype
    assert_close("value", got.cpu(), want, ulps=ulps)
    return got


# steps that end in the middle, several steps a scale, more scales than one launch takes and the
# last launch with the highest scores
LARGE = [
    ([(5, 6), (9, 40)], [3, 15], {}),
    ([(5, 6), (20, 19)], ["full", "full"], {"order": "raster", "include_self": True}),
    ([(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (5, 6)], ["full", 1, 3, 3, 3, 3], {}),
    ([(1, 2), (2, 2), (2, 3), (3, 3), (4, 3)], [1, 3, 3, 3, 3], {"order": "raster", "scale": 4.0}),
]


def some_positions(tokens):
    return torch.tensor([0, tokens - 1, *torch.randperm(tokens)[:3].tolist()])


@triton
@pytest.mark.parametrize(("grids", "kernels", "options"), CASES + LARGE)
def test_triton_is_the_definition(grids, kernels, options):
    inputs = make_inputs(grids, heads=1, dtype=torch.float32)
    options = {"order": "bidirectional", "grids": grids, "kernels": kernels, **options}
    compare(inputs, some_positions(inputs[0].shape[2]), **options)


@triton
@pytest.mark.parametrize(
    ("grids", "kernels", "options"), [*(CASES[i] for i in (0, 3, 4, 12, 18)), *LARGE[2:]]
)
def test_triton_adds_the_bias(grids, kernels, options):
    sizes = bias_sizes(kernels, options, True)
    inputs = make_inputs(grids, heads=2, kv_heads=1, dtype=torch.float32, bias_sizes=sizes)
    options = {"order": "bidirectional", "grids": grids, "kernels": kernels, **options}
    compare(inputs, some_positions(inputs[0].shape[2]), **options)


@triton
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("scale", [0.7, 0.0])
def test_triton_shares_keys_among_heads(heads, kv_heads, scale):
    inputs = make_inputs(
        [(1, 2), (2, 4)], batch=2, heads=heads, kv_heads=kv_heads, dtype=torch.float32
    )
    compare(inputs, torch.arange(1, 8, 3), grids=[(1, 2), (2, 4)], kernels=[3, 3], scale=scale)


@triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [16, 20, 64, 128])
def test_triton_takes_every_width(dtype, width):
    inputs = make_inputs([(5, 3), (10, 6)], width=width, dtype=dtype)
    options = {"grids": [(5, 3), (10, 6)], "kernels": [3, 7]}
    compare(inputs, torch.tensor([0, 33, 59]), 1 if dtype == torch.float16 else 32, **options)


@triton
def test_triton_reads_a_ring_and_nothing_unseen():
    """A ring of four rows, three of them read; NaN in all that the query does not see."""
    grids, kernels = [(3, 2), (6, 4)], [1, 5]
    q, keys, values, _ = make_inputs(grids, heads=1, dtype=torch.float32)
    options = {"grids": grids, "kernels": kernels, "order": "raster"}
    whole = local_attention(q, keys, values, **options).detach()
    for position in (0, 3, 4, 9, 14, 18, 21, 23):
        y, x = divmod(position, 4)
        stores = []
        for coarse, own in (keys, values):
            cell = y * 3 // 6 * 2 + x * 2 // 4
            first = torch.full_like(coarse.detach(), torch.nan)
            first[:, :, cell] = coarse.detach()[:, :, cell]
            ring = torch.full((1, 1, 4, 4, 8), torch.nan)
            for row in range(max(0, y - 2), y + 1):
                for column in range(max(0, x - 2), min(3, x + 2) + 1):
                    if row * 4 + column < position:
                        ring[:, :, row % 4, column] = own.detach()[:, :, row * 4 + column]
            stores.append([first.to(DEVICE), ring.flatten(2, 3).to(DEVICE)])
        where = torch.tensor([position])
        got = local_attention_at(
            q.detach()[:, :, where].to(DEVICE), *stores, where.to(DEVICE),
            backend="triton", **options,
        )  # fmt: skip
        torch.testing.assert_close(got.cpu(), whole[:, :, where])


@triton
def test_triton_rows_without_keys_strides_and_empty_batches():
    q, keys, values, bias = make_inputs([(4, 5)], heads=3, dtype=torch.float32, bias_sizes=[3])
    positions = torch.tensor([9, 0, 3, 19, 7], device=DEVICE)
    options = {"grids": [(4, 5)], "kernels": [3], "backend": "triton"}

    def strided(t):
        wide = torch.zeros(*t.transpose(1, 2).shape[:3], t.shape[3] + 5, device=DEVICE)
        wide[..., 2:-3] = t.detach().transpose(1, 2)
        return wide[..., 2:-3].transpose(1, 2)

    table = bias[0].detach().to(DEVICE)
    few = q.detach().to(DEVICE)[:, :, positions]
    key, value = keys[0].detach().to(DEVICE), values[0].detach().to(DEVICE)
    want = local_attention_at(few, [key], [value], positions, bias=[table], **options)
    assert (want[:, :, 1] == 0).all() and (want[:, :, [0, 2, 3, 4]] != 0).any(-1).all()
    every_other = torch.stack([positions, positions], -1).flatten()[::2]
    turned = table.transpose(1, 2).contiguous().transpose(1, 2)
    got = local_attention_at(
        strided(few), [strided(key)], [strided(value)], every_other, bias=[turned], **options
    )
    assert torch.equal(got, want)
    heads_last = few.transpose(1, 2).contiguous().transpose(1, 2)
    got = local_attention_at(heads_last, [key], [value], positions, bias=[table], **options)
    assert torch.equal(got, want) and got.stride() == heads_last.stride()
    empty = local_attention_at(few[:0], [key[:0]], [value[:0]], positions, **options)
    assert empty.shape == (0, 3, 5, 8)
    none = local_attention_at(few[:, :, :0], [key], [value], positions[:0], **options)
    assert none.shape == (1, 3, 0, 8)


@triton
def test_nan_of_a_query_is_not_hidden():
    q, keys, values, _ = make_inputs([(4, 4)], dtype=torch.float32)
    few, key, value = (t.detach().clone().to(DEVICE) for t in (q[:, :, 4:7], keys[0], values[0]))
    few[0, 0, 1, 0] = torch.nan
    positions = torch.arange(4, 7, device=DEVICE)
    options = {"grids": [(4, 4)], "kernels": [3], "backend": "triton"}
    out = local_attention_at(few, [key], [value], positions, **options)
    assert out[0, 0, 1].isnan().all() and out[0, 0, ::2].isfinite().all()
    assert out[0, 1].isfinite().all()


def test_says_which_calls_no_kernel_takes():
    q, keys, values, _ = make_inputs([(2, 2)], dtype=torch.float32)
    q, keys, values = (t.detach().to(DEVICE) for t in (q, keys[0], values[0]))
    args = (q[:, :, :1], [keys], [values], torch.tensor([0], device=DEVICE))
    options = {"grids": [(2, 2)], "kernels": [3]}
    with pytest.raises(InputError, match="backend='native' cannot run local_attention: "):
        local_attention_at(*args, backend="native", **options)
    if OP.missing.get("triton") is None:
        keys.requires_grad_()
        with pytest.raises(InputError, match="few queries has no gradient, and an input requires"):
            local_attention_at(*args, backend="triton", **options)
        with torch.no_grad():
            local_attention_at(*args, backend="triton", **options)


@triton
def test_opcheck():
    inputs = make_inputs(
        [(2, 3), (3, 4)], heads=1, width=4, dtype=torch.float32, bias_sizes=[3, None]
    )
    q, keys, values, bias = inputs
    q, bias = q.detach().to(DEVICE)[:, :, 5:7], [bias[0].detach().to(DEVICE), None]
    keys, values = ([t.detach().to(DEVICE) for t in group] for group in (keys, values))
    positions = torch.tensor([5, 6], device=DEVICE)
    rules = [True, True, False, False]  # own, raster, include_self, shift
    torch.library.opcheck(
        torch.ops.msvq_fast.local_attention_at_triton,
        (q, keys, values, bias, positions, [3, 4, 2, 3, 3, 3, 4, 3], rules, 0.5),
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
def test_triton_is_captured_in_a_cuda_graph():
    """A replay reads positions, queries and ring as they are then."""
    q, keys, values, _ = make_inputs([(6, 4)], width=32, dtype=torch.float32)
    q, key, value = (t.detach().to(DEVICE) for t in (q, keys[0], values[0]))
    few, positions = q[:, :, :2].clone(), torch.tensor([0, 1], device=DEVICE)

    def step():
        return local_attention_at(
            few, [key], [value], positions, grids=[(6, 4)], kernels=[3], backend="triton"
        )

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    few.copy_(q[:, :, 13:15])
    positions.copy_(torch.tensor([13, 14]))
    graph.replay()
    assert torch.equal(out, step())
