from __future__ import annotations

import pytest
import torch

from msvq_fast.ops import nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.portable import decompositions, nearest_rows


def test_the_portable_search_finds_the_same_codes() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, codes, width in ((1, 1, 1), (63, 17, 5), (300, 512, 64)):
        z = torch.randn(rows, width, generator=generator)
        codebook = torch.randn(codes, width, generator=generator)
        assert torch.equal(nearest_rows(z, codebook), nearest_code(z, codebook))


def test_the_lowest_of_equal_codes_wins() -> None:
    generator = torch.Generator().manual_seed(2)
    codebook = torch.randn(100, 64, generator=generator)
    codebook = torch.cat([codebook, codebook.flip(0), codebook])
    z = codebook[:100] + 1e-3 * torch.randn(100, 64, generator=generator)
    assert torch.equal(nearest_rows(z, codebook), torch.arange(100))


def test_a_small_difference_of_large_vectors_counts() -> None:
    codebook = torch.full((2, 8), 1000.0)
    codebook[1, 3] += 2**-10  # in float32 the products would hide it
    assert nearest_rows(codebook, codebook).tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
def test_a_graph_of_the_whole_step_is_portable() -> None:
    class Step(torch.nn.Module):
        def forward(self, z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return vector_quantize(z, codebook, backend="reference")

    inputs = torch.randn(30, 4), torch.randn(8, 4)
    program = torch.export.export(Step(), inputs).run_decompositions(decompositions())
    assert "msvq_fast" not in "".join(str(node.target) for node in program.graph.nodes)
    for got, want in zip(program.module()(*inputs), vector_quantize(*inputs), strict=True):
        torch.testing.assert_close(got, want)
