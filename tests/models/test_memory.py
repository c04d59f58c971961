"""Memory modes give the gradients, codes and codebooks of the plain run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from msvq_fast import models
from msvq_fast.nn.blocks import Residual, conv, residual_stack, upsample
from msvq_fast.nn.replay import replay
from msvq_fast.ops import InputError

# Depth, scales and blocks of every preset; widths and codebooks small.
SMALL = {
    "celebahq1024-s": {"resolution": 64, "latents": (2, 4, 8)},
    "celebahq1024-m": {"resolution": 64, "latents": (1, 2, 4)},
    "celebahq1024-l": {"resolution": 128, "latents": (1, 2, 4)},
    "imagenet256-s": {"resolution": 32, "latents": (4, 8)},
    "imagenet256-l": {"resolution": 32, "latents": (2, 4)},
    "ffhq128": {"resolution": 64, "latents": (2, 4)},
    "tiny": {"resolution": 32, "latents": (4, 8)},
}
PRESETS = [*SMALL, *(f"vqvae2-{name}" for name in SMALL)]
MODES = [("sequential", 1), ("strips", 1), ("strips", 2), ("strips", 5), ("strips", 64)]


def small(name: str, **overrides: object) -> nn.Module:
    shape = SMALL[name.removeprefix("vqvae2-")]
    settings = {**shape, "width": 8, "code_dim": 4, "num_codes": 8, **overrides}
    return models.from_preset(name, **settings)


def images(model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    side = model.config.resolution
    x = torch.rand(batch, 3, side, 2 * side, generator=torch.Generator().manual_seed(1))
    return x.to(dtype) * 2 - 1


def step(model: nn.Module, x: Tensor) -> tuple[models.MSVQVAEOutput, dict[str, Tensor]]:
    model.zero_grad()
    out = model(x)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def assert_same(plain: nn.Module, other: nn.Module, x: Tensor) -> None:
    """The same step, up to the order of float64 sums."""
    random_state = torch.get_rng_state()
    want, want_grads = step(plain, x)
    got, got_grads = step(other, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.reconstruction_loss, want.reconstruction_loss)
    assert all(torch.equal(a, b) for a, b in zip(got.codes, want.codes, strict=True))
    for name, grad in want_grads.items():
        error = (got_grads[name] - grad).norm()
        assert error <= 1e-10 * grad.norm(), f"{name}: {error:.2e}"
    for (name, buffer), mine in zip(plain.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, buffer, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_in_every_mode(name: str) -> None:
    plain = small(name).double()
    x = images(plain)
    for mode, strips in MODES:
        other = copy.deepcopy(plain)
        other.set_memory(mode, strips=strips)
        assert_same(copy.deepcopy(plain), other, x)


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["", "vqvae2-"])
def test_any_number_of_scales(scales: int, kind: str) -> None:
    latents = tuple(2**m for m in range(scales))
    plain = small(f"{kind}tiny", latents=latents).double()
    x = images(plain)
    for mode, strips in (("sequential", 1), ("strips", 3)):
        other = copy.deepcopy(plain)
        other.set_memory(mode, strips=strips)
        assert_same(copy.deepcopy(plain), other, x)


@pytest.mark.parametrize("name", PRESETS)
def test_autocast_and_channels_last(name: str) -> None:
    plain = small(name, width=32).to(memory_format=torch.channels_last)
    x = images(plain, dtype=torch.float32).to(memory_format=torch.channels_last)
    runs = []
    for mode, strips in (("default", 1), ("sequential", 1), ("strips", 4)):
        model = copy.deepcopy(plain)
        model.set_memory(mode, strips=strips)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.loss.backward()
        assert out.contributions[0].dtype == torch.bfloat16
        runs.append((model, out))
    (want, want_out), *others = runs
    for got, out in others:
        assert all(torch.equal(a, b) for a, b in zip(out.codes, want_out.codes, strict=True))
        for a, b in zip(got.buffers(), want.buffers(), strict=True):
            assert torch.equal(a, b)
        whole = []
        for (key, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
            a, b = p.grad.double().flatten(), q.grad.double().flatten()
            # What nearly cancels in a bias is rounded to bfloat16 strip by strip.
            assert torch.cosine_similarity(a, b, 0) > 0.9995, key
            assert 0.99 * b.norm() < a.norm() < 1.01 * b.norm(), key
            whole.append((a, b))
        a, b = (torch.cat(parts) for parts in zip(*whole, strict=True))
        assert torch.cosine_similarity(a, b, 0) > 0.9999


def test_backward_inside_autocast_and_accumulation() -> None:
    plain = small("tiny")
    other = copy.deepcopy(plain)
    other.set_memory("strips", strips=3)
    for model in (plain, other):
        model.defer_codebook_updates()
        for seed in range(2):
            x = images(model, dtype=torch.float32).roll(seed, 0)
            with torch.autocast("cpu", torch.bfloat16):
                (model(x).loss / 2).backward()
    for want, got in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.cosine_similarity(got.grad.flatten(), want.grad.flatten(), 0) > 0.999
    for want, got in zip(plain.code_statistics(), other.code_statistics(), strict=True):
        assert torch.equal(want[0], got[0]) and int(got[0].sum()) > 0


@pytest.mark.parametrize("mode", ["sequential", "strips"])
def test_weights_cast_without_a_graph_serve_no_run_with_one(mode: str) -> None:
    model = small("tiny").eval()
    x = images(model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model.set_memory(mode)
        loss = model(x).loss
        with torch.no_grad():
            model.reconstruct(x)
        loss.backward()
        torch.clear_autocast_cache()
        found = [p.grad.clone() for p in model.parameters()]
        model(x)  # its own casts have no graph either
        model.set_memory("default")
        model.zero_grad()
        model(x).loss.backward()
    for p, grad in zip(model.parameters(), found, strict=True):
        assert torch.cosine_similarity(grad.flatten(), p.grad.flatten(), 0) > 0.999


def test_a_second_derivative_is_refused() -> None:
    model = small("tiny")
    x = images(model, dtype=torch.float32).requires_grad_()
    out = replay(model.encoder.scales[0], x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_strips_keep_the_layout() -> None:
    model = small("tiny").to(memory_format=torch.channels_last)
    x = images(model, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    for strips in (1, 3):
        out = replay(model.encoder.scales[0], x, strips=strips)
        assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()


def test_what_is_kept_and_when_it_runs() -> None:
    runs: list[int] = []
    model = small("celebahq1024-s", width=32)
    for m, part in enumerate(model.step_two):
        part.register_forward_hook(lambda *_, m=m: runs.append(m))
    x = images(model, 1, torch.float32)
    kept = {}
    for mode in models.MEMORY_MODES:
        model.set_memory(mode)
        sizes = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        runs.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        kept[mode] = sum(sizes.values())
        out.loss.backward()
        if mode == "sequential":
            assert runs == [0, 1, 2, 2, 1, 0]
    assert kept["strips"] == kept["sequential"] < kept["default"]


def test_gradients_by_autograd_grad_and_frozen_parts() -> None:
    plain = small("tiny").double().eval()
    other = copy.deepcopy(plain)
    other.set_memory("strips", strips=2)
    x = images(plain)
    for model in (plain, other):
        model.step_two[0][0].weight.requires_grad_(False)
    parameters = [[p for p in m.parameters() if p.requires_grad] for m in (plain, other)]
    want = torch.autograd.grad(plain(x).loss, parameters[0])
    got = torch.autograd.grad(other(x).loss, parameters[1])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(other(x).loss, plain(x).loss)
        torch.testing.assert_close(other.reconstruct(x), plain.reconstruct(x))


@pytest.mark.parametrize("mode", ["sequential", "strips"])
def test_a_hook_on_a_parameter_runs_once(mode: str) -> None:
    plain = small("tiny").double().eval()
    other = copy.deepcopy(plain)
    other.set_memory(mode, strips=2)
    calls = []
    for model in (plain, other):
        model.step_two[0][0].weight.register_hook(lambda g: (calls.append(1), 2 * g)[1])
    assert_same(plain, other, images(plain))
    assert len(calls) == 2


@pytest.mark.parametrize("mode", ["sequential", "strips"])
@pytest.mark.parametrize("trained", [False, True])
def test_functional_call_lends_parameters_to_both_runs(mode: str, trained: bool) -> None:
    chain = small("tiny").double().step_two[0]
    lent = {name: torch.randn_like(p) / 9 for name, p in chain.named_parameters()}
    inputs = [torch.randn(1, chain[0].in_channels, 4, 4, dtype=torch.float64)]
    inputs += lent.values() if trained else []
    for tensor in inputs:
        tensor.requires_grad_()

    class Replayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, x: Tensor) -> Tensor:
            return replay(self.chain, x, strips=3 if mode == "strips" else 1)

    want = torch.func.functional_call(chain, lent, inputs[0]).square().sum()
    named = {f"chain.{name}": p for name, p in lent.items()}
    got = torch.func.functional_call(Replayed(), named, inputs[0]).square().sum()
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, inputs)
    for grad, true in zip(grads, torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-10, atol=1e-12)


def test_weights_changed_before_the_backward_are_noticed() -> None:
    model = small("tiny")
    model.set_memory("sequential")
    out = model(images(model, dtype=torch.float32))
    with torch.no_grad():
        model.step_two[0][0].weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_parts() -> None:
    plain = small("celebahq1024-s")  # eight chains, with and without a graph
    other = copy.deepcopy(plain)
    other.set_memory("sequential")
    graphs, numbers = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        numbers.extend(x for x in inputs if not isinstance(x, Tensor))
        return graph.forward

    other.compile_parts(backend=backend)
    x = images(plain, dtype=torch.float32)
    want, want_grads = step(plain, x)
    copied = copy.deepcopy(other)
    for compiled in (other, copied):
        got, got_grads = step(compiled, x)
        torch.testing.assert_close(got.loss, want.loss)
        for name, grad in want_grads.items():
            torch.testing.assert_close(got_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    layers = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in plain.modules())
    assert sum(graphs) > layers  # decoders count twice: without and with a graph
    assert not numbers, "sizes of one chain are constants, whatever another's are"


@pytest.mark.parametrize("strips", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("height", [1, 2, 5, 8])
def test_strips_of_any_chain(height: int, strips: int) -> None:
    chain = nn.Sequential(
        conv(3, 6, 3, stride=2),
        nn.Sequential(nn.ReLU(), conv(6, 4, 1), Residual(4)),
        upsample(4, 4),
        nn.ReLU(),
        upsample(4, 6),
        *residual_stack(6, 2),
        nn.Conv2d(6, 2, 5, padding=2),
    ).double()
    x = torch.randn(2, 3, 2 * height, 6, dtype=torch.float64, requires_grad=True)
    want = chain(x)
    upstream = torch.randn_like(want)
    wanted = [x, *chain.parameters()]
    want_grads = torch.autograd.grad(want, wanted, upstream)
    got = replay(chain, x, strips=strips)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, wanted, upstream), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bad_modes() -> None:
    with pytest.raises(InputError, match="memory='less'; expected one of 'default', 'sequential'"):
        models.MSVQVAE(models.preset_config("tiny"), memory="less")
    with pytest.raises(InputError, match="strips=0; expected at least 1"):
        small("tiny").set_memory("strips", strips=0)


def pruned(layer: nn.Conv2d) -> nn.Conv2d:
    return prune.l1_unstructured(layer, "weight", 0.5)


class Adapted(nn.Module):
    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("change", "message"), [(pruned, "hook before"), (Adapted, "cannot cut a Adapted")]
)
@pytest.mark.parametrize("within", [True, False])
def test_strips_refuse_layers_that_are_more_than_their_weights(change, message, within) -> None:
    model = small("tiny").eval()
    finest = model.step_two[-1]
    first = next(layer for layer in finest if isinstance(layer, Residual))
    if within:
        first.inner = change(first.inner)
    else:
        finest[0] = change(finest[0])
    x = images(model, dtype=torch.float32)
    model.set_memory("sequential")
    model(x).loss.backward()
    model.set_memory("strips")
    with pytest.raises(InputError, match=message):
        model(x)


def test_strips_take_parametrised_layers() -> None:
    plain = small("tiny").double().eval()
    for layer in plain.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.utils.parametrizations.weight_norm(layer)
    lean = copy.deepcopy(plain)
    lean.set_memory("strips", strips=5)
    assert_same(plain, lean, images(plain))


@pytest.mark.parametrize("memory", ["sequential", "strips"])
def test_shapes_alone(memory: str) -> None:
    model = models.from_preset("tiny").to("meta")
    model.set_memory(memory)
    out = model(torch.empty(2, 3, 64, 64, device="meta"))
    out.loss.backward()
    assert out.contributions[1].shape == (2, 3, 64, 64)
    assert all(p.grad is not None for p in model.parameters())
