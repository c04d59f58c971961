"""The byte counter: by hand, against what a process really takes, and pinned for every preset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from msvq_fast import models
from msvq_fast.cli import main
from msvq_fast.training.memory import BatchMemory, LiveBytes, batch_memory, step_memory

# Bytes that another image adds to the peak of a step in bf16: default, sequential, strips.
PER_IMAGE = {
    "celebahq1024-s": (658415616, 306094080, 110833664),
    "celebahq1024-m": (582199296, 265529344, 81428287),
    "celebahq1024-l": (583625216, 263285248, 75013215),
    "imagenet256-s": (91922432, 54173696, 22192128),
    "imagenet256-l": (100083712, 56567808, 19130368),
    "ffhq128": (6550144, 3994240, 1680512),
    "vqvae2-celebahq1024-s": (172400640, 130457600, 72265728),
    "vqvae2-celebahq1024-m": (87140352, 68265984, 39876608),
    "vqvae2-celebahq1024-l": (70019584, 56912384, 32250368),
    "vqvae2-imagenet256-s": (24420352, 18128896, 10404864),
    "vqvae2-imagenet256-l": (10430464, 7809024, 4189184),
    "vqvae2-ffhq128": (1340032, 1045120, 720256),
    "tiny": (1550848, 944640, 601856),
    "vqvae2-tiny": (485888, 387584, 303872),
}


@pytest.mark.parametrize("name", models.PRESETS)
def test_bytes_per_image(name: str) -> None:
    config = models.preset_config(name)
    counted = [batch_memory(config, memory=m, bf16=True).per_image for m in models.MEMORY_MODES]
    assert tuple(counted) == PER_IMAGE[name]


def test_a_half_and_a_fifth_of_the_plain_step() -> None:
    config = models.preset_config("celebahq1024-s")
    fp32 = [step_memory(config, batch=16, memory=mode).peak for mode in models.MEMORY_MODES]
    for default, sequential, strips in (PER_IMAGE["celebahq1024-s"], fp32):
        assert sequential <= 0.5 * default
        assert strips <= 0.2 * default


@pytest.mark.parametrize(
    ("bf16", "total", "percent"), [(False, 1157103616, 53), (True, 591134720, 52)]
)
def test_what_autograd_keeps_at_1024_px(bf16: bool, total: int, percent: int) -> None:
    """Half of it are maps of 256 x 256, nearly all in the three decoders.

    In bf16 it is half as much and the images in float32, which the loss compares with.
    """
    saved: dict[int, tuple[int, torch.Size]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), t.shape
        return t

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model = models.from_preset("celebahq1024-s")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(torch.empty(1, 3, 1024, 1024))
    sides: Counter[int] = Counter()
    for size, shape in saved.values():
        if len(shape) == 4 and shape[0] == 1:  # not the weights
            sides[shape[-1]] += size
    assert out.loss.shape == ()
    assert sum(sides.values()) == total
    assert 100 * sides[256] // sum(sides.values()) == percent


def test_counting_by_hand() -> None:
    with LiveBytes() as bytes_:
        a = torch.zeros(1000)  # 4000 bytes
        b = a[10:].view(-1, 9)  # none: a view
        c = b * 2  # 3960
        assert (bytes_.live, bytes_.peak) == (7960, 7960)
        del c
        assert (bytes_.live, bytes_.peak) == (4000, 7960)
        del a
        assert bytes_.live == 4000  # b has it
        del b
        d = torch.zeros(10, dtype=torch.int64)
        d += 1
        assert (bytes_.live, bytes_.peak) == (80, 7960)


def test_the_parts_of_a_step() -> None:
    config = models.preset_config("tiny")
    model = models.build(config)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    buffers = 4 * sum(b.numel() for b in model.buffers())
    step = step_memory(config, batch=3)
    assert step.state == 3 * parameters + buffers
    assert step.total == step.state + step.peak
    image = 4 * 3 * 3 * 64 * 64
    assert step.kept > image and step.peak > step.kept
    # Four times but for scalars and code statistics.
    larger = step_memory(config, batch=3, size=128)
    assert 3.9 * step.kept < larger.kept < 4 * step.kept


@pytest.mark.parametrize("memory", models.MEMORY_MODES)
def test_the_largest_batch_fits_and_the_next_does_not(memory: str) -> None:
    config = models.preset_config("vqvae2-tiny")
    capacity = 20 << 20
    growth = batch_memory(config, memory=memory, strips=2)
    most = growth.largest_batch(capacity)
    assert step_memory(config, batch=most, memory=memory, strips=2).total <= capacity
    assert step_memory(config, batch=most + 1, memory=memory, strips=2).total > capacity
    assert BatchMemory(10, 100).largest_batch(99) == 0


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from msvq_fast import models
torch.set_num_threads(1)
width, batch, size = map(int, sys.argv[1:])
model = models.from_preset("imagenet256-s", width=width).to(memory_format=torch.channels_last)
model.defer_codebook_updates()
def bytes_of(field):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", text)[1])
def step(batch, size):
    x = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    model(x).loss.backward()
    model.zero_grad()
    model.update_codebooks()
found = {}
for mode in models.MEMORY_MODES:
    model.set_memory(mode)
    step(1, 64)  # what libraries load once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before = bytes_of("VmRSS")
    step(batch, size)
    found[mode] = bytes_of("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_takes_what_is_predicted() -> None:
    """Convolutions of channels-last maps need no copies in another layout, so that peaks compare.

    Every freed block goes back at once, or the size of the process would be the allocator's choice.
    """
    width, batch, size = 64, 3, 256
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    arguments = [str(width), str(batch), str(size)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    config = models.preset_config("imagenet256-s", width=width)
    for mode, measured in json.loads(done.stdout).items():
        predicted = step_memory(config, batch=batch, memory=mode, size=size).peak
        assert measured == pytest.approx(predicted, rel=0.1), mode


def test_info_prints_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--preset=vqvae2-tiny",
        "--batch=2",
        "--precision=fp32",
        "--card_gib=1",
        "--strips=2",
    ]
    assert main(["info", "--memory", *options]) == 0
    printed = capsys.readouterr().out
    assert "vqvae2-tiny, fp32, batch 2" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    config = models.preset_config("vqvae2-tiny")
    for mode in models.MEMORY_MODES:
        step = step_memory(config, batch=2, memory=mode, strips=2)
        growth = batch_memory(config, memory=mode, strips=2)
        sizes = (step.state, step.kept, step.total, growth.per_image)
        assert rows[mode][1::2][:4] == [f"{size / 2**20:.1f}" for size in sizes]
        assert rows[mode][-1] == str(growth.largest_batch(2**30))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch=0", "batch=0, strips=8, card_gib=80.0; all must be positive"),
        ("--card_gib=-1", "card_gib=-1.0; all must be positive"),
        ("--card_gib=.inf", "card_gib=inf; all must be positive and finite"),
        ("--preset=none", "preset 'none' is unknown"),
    ],
)
def test_bad_requests(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--memory", option]) == 2
    assert message in capsys.readouterr().err
