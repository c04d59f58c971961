"""The attention module against the op, its positions, and training under autocast."""

from __future__ import annotations

import pytest
import torch

from msvq_fast.nn import LocalAttention, fronts
from msvq_fast.nn.attention import rotate
from msvq_fast.ops import InputError, local_attention

GRIDS = [(2, 3), (4, 6)]


def tokens(batch=2, width=32):
    return [torch.randn(batch, h * w, width) for h, w in GRIDS]


def test_is_the_op_between_projections():
    module = LocalAttention(32, 4, [3, 5], kv_heads=2)
    x = tokens()
    query = module.to_query(x[1]).view(2, 24, 4, 8).transpose(1, 2)
    pairs = [module.to_key_value(t).view(2, -1, 2, 2, 8).permute(2, 0, 3, 1, 4) for t in x]
    attended = local_attention(
        query, [p[0] for p in pairs], [p[1] for p in pairs], grids=GRIDS, kernels=[3, 5]
    )
    want = module.to_out(attended.transpose(1, 2).reshape(2, 24, 32))
    torch.testing.assert_close(module(x, GRIDS), want)


@pytest.mark.parametrize("border", ["clip", "shift"])
def test_relative_bias_learns(border):
    module = LocalAttention(16, 2, ["full", 3], border=border, relative_bias=True)
    plain = LocalAttention(16, 2, ["full", 3], border=border)
    plain.load_state_dict(module.state_dict(), strict=False)
    x = tokens(width=16)
    torch.testing.assert_close(module(x, GRIDS), plain(x, GRIDS))
    module(x, GRIDS).square().sum().backward()
    coarse, own = module.relative_bias
    assert coarse.numel() == 0
    assert own.shape == ((2, 5, 5) if border == "shift" else (2, 3, 3))
    assert own.grad.abs().sum() > 0
    with torch.no_grad():
        own.add_(torch.randn_like(own))
    assert not torch.allclose(module(x, GRIDS), plain(x, GRIDS))


def test_rotation_sees_only_distances():
    """Moving both tokens by one cell of any scale leaves the dot product alone."""
    q, k = torch.randn(2, 8)
    fine, coarse = (6, 8), (3, 4)
    queries = rotate(q.expand(1, 1, 48, 8), fine, fine)[0, 0].view(6, 8, 8)
    keys = rotate(k.expand(1, 1, 48, 8), fine, fine)[0, 0].view(6, 8, 8)
    cells = rotate(k.expand(1, 1, 12, 8), coarse, fine)[0, 0].view(3, 4, 8)
    torch.testing.assert_close(queries[1, 2] @ keys[3, 1], queries[2, 5] @ keys[4, 4])
    torch.testing.assert_close(queries[0, 1] @ cells[1, 1], queries[2, 5] @ cells[2, 3])
    assert not torch.isclose(queries[1, 2] @ keys[3, 1], queries[1, 2] @ keys[3, 2])
    # A cell of 2 x 2 sits between its four fine tokens.
    torch.testing.assert_close(queries[0, 0] @ cells[0, 0], queries[2, 2] @ cells[1, 1])
    torch.testing.assert_close(cells.norm(dim=-1), k.norm().expand(3, 4))


@pytest.mark.parametrize("settings", [{}, {"rotary": True, "relative_bias": True}])
def test_a_float64_module_is_exact(settings):
    module = LocalAttention(8, 2, [3, 3], **settings).double()
    x = [t.double().requires_grad_() for t in tokens(batch=1, width=8)]
    assert torch.autograd.gradcheck(lambda *scales: module(scales, GRIDS), x)


def test_raster_order_is_causal():
    module = LocalAttention(16, 2, [3, 5], order="raster", rotary=True)
    x = tokens(width=16)
    x[1].requires_grad_()
    out = module(x, GRIDS)
    grad = torch.autograd.grad(out[:, 9].sum(), x[1])[0]
    assert (grad[:, 10:] == 0).all() and (grad[:, 9] != 0).any()


def test_autocast_trains():
    module = LocalAttention(16, 2, [3, 5], rotary=True, relative_bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(tokens(width=16), GRIDS)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


SETTINGS = [
    ({}, [3, 5]),
    ({"include_self": True, "rotary": True, "kv_heads": 2}, ["full", 3]),
    ({"relative_bias": True}, [3, 3]),
    ({"rotary": True}, [0, "full"]),
]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("settings", "kernels"), SETTINGS)
def test_steps_with_a_cache_are_the_forward(settings, kernels, together):
    """Token by token through a ring of rows, or front by front."""
    grids = [(2, 3), (7, 6)]
    module = LocalAttention(32, 4, kernels, order="raster", **settings)
    for parameter in module.relative_bias or ():
        torch.nn.init.normal_(parameter)
    x = [torch.randn(2, h * w, 32) for h, w in grids]
    radius = kernels[-1] // 2 if isinstance(kernels[-1], int) else 7
    skew = radius + 1 if together else None
    order = fronts(grids[-1], skew) if together else torch.arange(42)[:, None].unbind(0)
    assert torch.cat(list(order)).sort().values.equal(torch.arange(42))
    cache = module.start(2, grids, coarse=x[:1], skew=skew)
    if not together and isinstance(kernels[-1], int):
        assert cache.keys[-1].shape[2] == (radius + 1) * 6
    got = torch.full_like(x[1], torch.nan)
    for positions in order:
        got[:, positions] = module.step(x[1][:, positions], positions, cache)
    torch.testing.assert_close(got, module(x, grids))


def test_fronts_of_a_full_window_are_as_far_apart_as_the_grid_is_wide():
    module = LocalAttention(16, 2, ["full"], order="raster")
    x = torch.randn(1, 12, 16)
    with pytest.raises(InputError, match="skew=5; expected more than the radius 5"):
        module.start(1, [(2, 6)], skew=5)
    cache = module.start(1, [(2, 6)], skew=6)
    got = torch.full_like(x, torch.nan)
    for positions in fronts((2, 6), 6):
        got[:, positions] = module.step(x[:, positions], positions, cache)
    torch.testing.assert_close(got, module([x], [(2, 6)]))


@pytest.mark.parametrize("unused", ["full", 0])
def test_every_parameter_that_wants_a_gradient_gets_one(unused):
    """DistributedDataParallel waits for all of them."""
    module = LocalAttention(32, 4, [unused, 3], relative_bias=True)
    module(tokens(), GRIDS).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert module.relative_bias[1].requires_grad


def test_fronts_are_few():
    assert len(fronts((8, 8), 3)) == 29
    assert max(front.numel() for front in fronts((128, 128), 4)) == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalAttention(30, 4, [3]), "width=30 with heads=4;"),
        (lambda: LocalAttention(32, 4, [3], kv_heads=3), "kv_heads=3; expected a divisor"),
        (lambda: LocalAttention(32, 4, 3), "kernels=3; expected a list of one per scale"),
        (lambda: LocalAttention(32, 4, [3, 4]), "kernels[1]=4; expected an odd int"),
        (lambda: LocalAttention(32, 4, [3], order="causal"), "order='causal'; expected one of"),
        (lambda: LocalAttention(32, 4, [3, 3])(tokens(), [4, 8]), "grids[0]=4; expected ints (h"),
        (lambda: LocalAttention(8, 4, [3], rotary=True), "rotary with heads of width 2;"),
        (
            lambda: LocalAttention(32, 4, [3])(tokens(), GRIDS),
            "tokens has 2 and grids 2 entries; expected 1, one per kernel",
        ),
        (lambda: LocalAttention(32, 4, [3]).start(1, [(4, 4)]), "start with order='bidirect"),
        (
            lambda: LocalAttention(32, 4, [3], order="raster").start(1, GRIDS),
            "coarse has 0 and grids 2 entries; expected 0 and 1",
        ),
        (
            lambda: LocalAttention(32, 4, [5], order="raster").start(1, [(4, 4)], skew=2),
            "skew=2; expected more than the radius 2",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)
