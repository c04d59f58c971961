"""Vector quantization needs its outputs and little else: the peak, and what autograd keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msvq_fast.ops import nearest_code, vector_quantize
from msvq_fast.ops.vector_quantize.op import OP

if "native" not in OP.kernels:
    pytest.skip("the extension is not built", allow_module_level=True)

N, K, D = 65536, 8192, 64  # distances alone would be 2 GiB
LIMIT = 4_000_000

# A process of its own, in which every block above 64 KiB is mapped and unmapped by itself, in small
# pages. Everything runs once on fewer latents: code is loaded and threads are there before the
# peak starts anew. Bytes beyond the outputs, and of the outputs, per kind of call.
MEASURE = """
import ctypes, json, re, sys
from pathlib import Path
import torch
from msvq_fast.ops import ema_update_, nearest_code, vector_quantize

def status(field):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", text)[1])

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
torch.set_num_threads(2)
n, k, d, dim = map(int, sys.argv[1:5])
dtype = getattr(torch, sys.argv[5])
shape = (16, n // 16, d) if dim == -1 else (16, d, n // 16)
z, upstream = torch.randn(2, *shape).to(dtype)
codebook, size, one = torch.randn(k, d), torch.ones(k), torch.ones(())
sums = codebook.clone()

def search(z, upstream):
    return [nearest_code(z, codebook, dim=dim, backend="native")]

def forward(z, upstream):
    return [*vector_quantize(z, codebook, dim=dim, backend="native")]

def training_step(z, upstream):
    z = z.detach().requires_grad_()
    out = vector_quantize(z, codebook, dim=dim, backend="native")
    torch.autograd.backward([out.z_q, out.commitment_loss], [upstream, one])
    ema_update_(codebook, size, sums, out.code_counts, out.code_sums, backend="native")
    return [*out, z.grad]

found = {}
for call in (search, forward, training_step):
    call(z[:1], upstream[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before = status("VmRSS")
    out = call(z, upstream)
    outputs = sum(t.untyped_storage().nbytes() for t in out)
    found[call.__name__] = status("VmHWM") - before - outputs, outputs
    del out
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize(("dim", "dtype"), ((-1, "float32"), (1, "float32"), (1, "bfloat16")))
def test_peak_beyond_the_outputs(dim, dtype):
    """Outputs: z_q, codes, loss, counts, the (K, D) sums, and the gradient of z from the backward.

    What is beyond them: the packed codes of a search (in a quantizer they lie where the sums will
    be), the copy of the codebook that the backward reads, the means of the moving average, and a
    block of latents per thread.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (N, K, D, dim)), dtype],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    z_bytes = N * D * getattr(torch, dtype).itemsize
    codes, per_code = 8 * N, K * (4 * D + 8) + 4
    want = {
        "search": codes,
        "forward": z_bytes + codes + per_code,
        "training_step": 2 * z_bytes + codes + per_code,
    }
    assert {name: outputs for name, (_, outputs) in found.items()} == want
    for name, (beyond, _) in found.items():
        assert beyond <= LIMIT, f"{name}: {beyond} bytes beyond the outputs"
        # Unless the packed codes were seen, the measurement itself does not work.
        assert name == "forward" or beyond > K * D * 4 // 2, f"{name}: {beyond}"


def kept(function):
    """What ``function`` returns, and the storages that autograd keeps for its backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return out, storages


@pytest.mark.parametrize("dim", (1, -1))
def test_kept_for_the_backward(dim):
    z, codebook = torch.randn(16, D, D, requires_grad=True), torch.randn(128, D)
    out, storages = kept(lambda: vector_quantize(z, codebook, dim=dim, backend="native"))
    assert storages.pop(z.untyped_storage().data_ptr()) == z.nbytes
    assert storages.pop(out.codes.untyped_storage().data_ptr()) == out.codes.nbytes
    assert list(storages.values()) == [codebook.nbytes]  # a copy: the codebook moves before
    assert codebook.data_ptr() not in storages


def test_nothing_is_kept_without_a_gradient():
    z, codebook = torch.randn(64, D, requires_grad=True), torch.randn(8, D)
    assert kept(lambda: vector_quantize(z.detach(), codebook, backend="native"))[1] == {}
    assert kept(lambda: nearest_code(z, codebook, backend="native"))[1] == {}
    with torch.no_grad():
        assert kept(lambda: vector_quantize(z, codebook, backend="native"))[1] == {}
