"""Vector quantization under torch.library and torch.compile, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from msvq_fast.ops import InputError, nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

COMPILED = ["native"] if "native" in OP.kernels else []
BACKENDS = ["reference", *COMPILED]


def test_opcheck_of_the_copy():
    torch.library.opcheck(torch.ops.msvq_fast.codebook_copy, (torch.randn(4, 5).t(),))


@pytest.mark.parametrize(
    "function",
    (
        torch.ops.msvq_fast.nearest_code_reference,
        *(
            getattr(torch.ops.msvq_fast, f"{name}_{b}")
            for b in COMPILED
            for name in ("nearest_code", "vector_quantize")
        ),
    ),
)
def test_opcheck(function):
    z, codebook = torch.randn(10, 4), torch.randn(5, 4)
    args = (z, codebook)
    if "reference" not in str(function):
        args = (*args, 1, 0.25) if "vector_quantize" in str(function) else (*args, 1)
    torch.library.opcheck(function, args)


@pytest.mark.skipif(not COMPILED, reason="the extension is not built")
def test_opcheck_of_the_backward():
    z, codebook = torch.randn(10, 4), torch.randn(5, 4)
    codes = nearest_code(z, codebook)
    backward = torch.ops.msvq_fast.vector_quantize_backward_native
    for grad_z_q in (torch.randn(10, 4), None):
        torch.library.opcheck(backward, (grad_z_q, torch.ones(()), z, codes, codebook, 1, 0.25))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("far", ("rows", "d"))
def test_offsets_beyond_two_to_the_31(backend, far, tmp_path):
    # A sparse file: only the pages that hold the latents exist.
    step = 2**28 + 1
    storage = torch.from_file(
        str(tmp_path / "latents"), shared=True, size=8 * step + 8, dtype=torch.float16
    )
    z = (
        storage.as_strided((9, 8), (step, 1))
        if far == "rows"
        else storage.as_strided((8, 9), (1, step))
    )
    z.copy_(torch.randn(z.shape))
    codebook = torch.randn(6, z.shape[1])
    want = vector_quantize(z.contiguous(), codebook, backend="reference")
    got = vector_quantize(z, codebook, backend=backend)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.z_q, want.z_q)
    assert torch.equal(got.code_counts, want.code_counts)
    torch.testing.assert_close(got.code_sums, want.code_sums)
    assert torch.equal(nearest_code(z, codebook, backend=backend), want.codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_once_for_any_batch(backend):
    codebook = torch.randn(12, 4)

    def step(z):
        out = vector_quantize(z, codebook, dim=1, backend=backend)
        return out.z_q.sum() * 2 + out.commitment_loss, out.codes, out.code_sums

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (6, 7, 8, 9, 13):
        z = torch.randn(batch, 4, 5, 3, requires_grad=True)
        twin = z.detach().clone().requires_grad_()
        loss, codes, sums = compiled(z)
        want_loss, want_codes, want_sums = step(twin)
        loss.backward()
        want_loss.backward()
        assert torch.equal(codes, want_codes)
        assert torch.equal(sums, want_sums)
        torch.testing.assert_close(z.grad, twin.grad)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"codebook": torch.zeros(4)}, "codebook has shape"),
        ({"codebook": torch.zeros(0, 3)}, "codebook has shape"),
        ({"codebook": torch.zeros(4, 3, dtype=torch.bfloat16)}, "codebook has dtype"),
        ({"codebook": torch.zeros(4, 3, requires_grad=True)}, "codebook requires"),
        ({"z": torch.zeros(5, 3, dtype=torch.int64)}, "z has dtype"),
        ({"z": torch.zeros(5, 4)}, "width 4 at dim=-1"),
        ({"z": torch.zeros(5, 3, device="meta")}, "codebook is on cpu"),
        ({"dim": 2}, "dim=2"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1"),
        ({"commitment_weight": math.nan}, "commitment_weight=nan"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ),
)
def test_bad_input(change, message):
    arguments = {"z": torch.zeros(5, 3), "codebook": torch.zeros(4, 3)} | change
    with pytest.raises(InputError, match=message) as error:
        vector_quantize(**arguments)
    assert "\n" not in str(error.value)
