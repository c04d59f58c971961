"""Models inside what PyTorch wraps around them: parallel training, export, hooks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, vmap
from torch.nn.parallel import DistributedDataParallel

from msvq_fast import models
from msvq_fast.models.autoencoder import MSVQVAEOutput
from msvq_fast.ops import InputError
from msvq_fast.training.distributed import leave
from tests.training.two_processes import tripled

TINY = ("tiny", "vqvae2-tiny")


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64) * 2 - 1


def train_static_graph(folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    model = models.from_preset("tiny")
    model.defer_codebook_updates()
    wrapped = DistributedDataParallel(model, static_graph=True)
    wrapped.register_comm_hook(None, lambda _, bucket: tripled(bucket.buffer()))
    x = images()
    want = torch.autograd.grad(model(x).loss, list(model.parameters()))
    for _ in range(2):  # the first step of a static graph is reduced at its end
        wrapped(x).loss.backward()
        for parameter, grad in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, 3 * grad)
        model.zero_grad()
    leave()


def save_sharded(folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    model = models.from_preset("tiny")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="is sharded over processes"):
        model.save_pretrained(f"{folder}/model")
    assert not Path(folder, "model").exists()
    whole = models.from_preset("tiny")
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(True)))
    whole.save_pretrained(f"{folder}/model")
    leave()


@pytest.mark.parametrize("work", [train_static_graph, save_sharded])
def test_in_a_process_of_its_own(work: Callable[[str], None], tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=(str(tmp_path),))
    process.start()
    process.join(100)
    process.kill()  # if it hangs
    assert process.exitcode == 0


@pytest.mark.parametrize("name", TINY)
def test_a_whole_model_exports(name: str, tmp_path: Path) -> None:
    model, x = models.from_preset(name).eval(), images()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    out = torch.export.load(tmp_path / "model.pt2").module()(x)
    assert isinstance(out, MSVQVAEOutput)
    torch.testing.assert_close(out.loss, model(x).loss)
    assert all(torch.equal(a, b) for a, b in zip(out.codes, model.encode(x), strict=True))


@pytest.mark.parametrize("name", TINY)
def test_hooks_run_on_every_part(name: str) -> None:
    model, seen = models.from_preset(name), set()
    parts = {key: part for key, part in model.named_modules() if type(part) is not nn.ModuleList}
    for key, part in parts.items():
        part.register_forward_hook(lambda *_, key=key: seen.add(key))
    model(images())
    assert parts.keys() == seen


@pytest.mark.parametrize("memory", ["sequential", "strips"])
@pytest.mark.parametrize("name", TINY)
def test_hooks_run_on_what_a_memory_mode_leaves_whole(name: str, memory: str) -> None:
    model = models.from_preset(name)
    model.set_memory(memory)
    seen: list[list[tuple[int, ...]]] = []

    def note(_: nn.Module, inputs: tuple[torch.Tensor], features: list[torch.Tensor]) -> None:
        assert len(inputs) == 1
        seen.append([tuple(feature.shape[2:]) for feature in features])

    model.encoder.register_forward_hook(note)
    model(images())
    model.encode(images())
    assert seen == [[(8, 8), (16, 16)]] * 2


@pytest.mark.parametrize("memory", ["default", "sequential"])
@pytest.mark.parametrize("name", TINY)
def test_gradients_per_image(name: str, memory: str) -> None:
    model, x = models.from_preset(name).eval(), images()
    model.set_memory(memory)
    weights = {key: weight.detach() for key, weight in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, weights, (image[None],)).loss

    found = vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1]).loss.backward()
        for key, weight in model.named_parameters():
            torch.testing.assert_close(found[key][i], weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_validation_compiles_whole(name: str) -> None:
    model, x = models.from_preset(name).eval(), images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).loss, model(x).loss)
