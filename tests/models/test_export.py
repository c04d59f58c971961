"""Tokens of an exported encoder, in ONNX Runtime and under torch.export, are those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ops.test_nearest_code import make_data
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from msvq_fast import models
from msvq_fast.nn import LocalAttention, VectorQuantizer
from msvq_fast.ops import gaussian_blur, multiscale_loss, nearest_code

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's own, in torch
    pytest.mark.skipif(
        TorchVersion(torch.__version__) < "2.8", reason="PyTorch's exporter cannot take our ops"
    ),
]

SMALL = {"resolution": 32, "latents": (4, 8), "width": 8, "code_dim": 6, "num_codes": 16}


class Encoder(nn.Module):
    """What is exported: images in, one grid of codes per scale out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(x))


class Search(nn.Module):
    """The op alone, with a codebook inside."""

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)

    def forward(self, z: Tensor) -> Tensor:
        return nearest_code(z, self.codebook)


class Ops(nn.Module):
    """A network of one's own around the ops; on a CPU all of them have kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = VectorQuantizer(16, 4)
        self.quantizer.codebook.normal_()
        self.attention = LocalAttention(4, 2, [5])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        quantized = self.quantizer(gaussian_blur(x, 5))
        seen = self.attention([quantized.z_q.flatten(2).mT], [x.shape[2:]])
        loss, _ = multiscale_loss([quantized.z_q], x)
        return quantized.codes, seen, loss


def session(module: nn.Module, x: Tensor, path: Path) -> onnxruntime.InferenceSession:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        module.eval(), (x,), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, x: Tensor) -> list[Tensor]:
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(codes) for codes in outputs]


@pytest.mark.parametrize("name", ("tiny", "vqvae2-imagenet256-s"))
def test_tokens_of_an_exported_encoder(name: str, tmp_path: Path) -> None:
    model = models.from_preset(name, **SMALL, codebook_init="uniform", restart_below=1.0)
    for _ in range(5):  # codebooks move to the latents, so that many codes are in use
        model(torch.rand(8, 3, 32, 32) * 2 - 1)
    exported = session(Encoder(model), torch.zeros(2, 3, 32, 32), tmp_path / "encoder.onnx")
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            want = model.encode(x)
        assert all(codes.unique().numel() > 4 for codes in want)
        for got, codes in zip(run(exported, x), want, strict=True):
            assert got.dtype == torch.int64 and torch.equal(got, codes)


@pytest.mark.parametrize("kind", ("normal", "offset1000", "duplicates", "near_ties"))
def test_codes_of_an_exported_search_are_exact(kind: str, tmp_path: Path) -> None:
    z, codebook = make_data(kind, 300, 40, 8)
    codebook[7, 2] = torch.nan
    z[5, 1], z[6, 0] = torch.nan, -torch.inf
    exported = session(Search(codebook), z[:2], tmp_path / "search.onnx")
    for rows in (z, z[:1]):
        want = nearest_code(rows, codebook, backend="reference")
        assert torch.equal(run(exported, rows)[0], want)


def test_networks_of_the_ops_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Ops()
    network.quantizer.backend = "triton"  # nothing runs on it
    exported = session(network, torch.randn(2, 4, 6, 8), tmp_path / "ops.onnx")
    network.quantizer.backend = None
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 8)
        with torch.no_grad():
            want = network(x)
        for got, value in zip(run(exported, x), want, strict=True):
            torch.testing.assert_close(got, value)
