"""Both models: sizes of the paper, shapes, the two backends, codes and images, saving."""

from __future__ import annotations

import json

import pytest
import torch

import msvq_fast
from msvq_fast import metrics, models
from msvq_fast.ops import InputError

# Trainable parameters; codebooks are buffers. The paper prints two or three digits of each.
PARAMETERS = {
    "celebahq1024-s": 13_563_337,
    "celebahq1024-m": 25_162_793,
    "celebahq1024-l": 53_614_649,
    "imagenet256-s": 9_367_430,
    "imagenet256-l": 37_834_310,
    "ffhq128": 9_645_606,
    "vqvae2-celebahq1024-s": 2_146_275,
    "vqvae2-celebahq1024-m": 2_157_907,
    "vqvae2-celebahq1024-l": 2_164_339,
    "vqvae2-imagenet256-s": 1_326_147,
    "vqvae2-imagenet256-l": 1_375_011,
    "vqvae2-ffhq128": 1_386_643,
}
TINY = ("tiny", "vqvae2-tiny")


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = models.from_preset(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name]
    paper = models.PAPER_PARAMETERS[name]
    if name.startswith("vqvae2"):
        digits = 2 if name == "vqvae2-ffhq128" else 1  # derived from Table 4, not printed
        assert round(count / 1e6, digits) == pytest.approx(paper, abs=0.011 if digits == 2 else 0)
    else:
        limit = 0.09 if name == "ffhq128" else 0.015  # FFHQ's residual is known
        assert abs(count / 1e6 / paper - 1) < limit


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_train_as_the_paper_does(name: str) -> None:
    config = models.PRESETS[name]
    assert (config.code_dim, config.commitment_weight, config.decay) == (64, 0.25, 0.99)
    assert (config.codebook_init, config.restart_below) == ("uniform", 0.0)
    assert config.gradient == "straight-through"
    if isinstance(config, models.MSVQVAEConfig):
        assert (config.kernel_size, config.sigma_rule) == (None, "paper")


@pytest.mark.parametrize("name", TINY)
def test_settings_reach_the_quantizers(name: str) -> None:
    settings = {"commitment_weight": 0.5, "decay": 0.9, "restart_below": 0.2}
    model = models.from_preset(name, **settings, gradient="rotation", num_codes=7, code_dim=5)
    for quantizer in model.quantizers:
        assert {key: getattr(quantizer, key) for key in settings} == settings
        assert quantizer.gradient == "rotation" and quantizer.codebook.shape == (7, 5)


def test_every_preset_runs_on_meta() -> None:
    for name, config in models.PRESETS.items():
        if config.resolution > 256:
            continue  # the grids of 1024 px are checked below without convolutions
        with torch.device("meta"):
            model = models.from_preset(name)
        grids = [torch.empty(1, s, s, dtype=torch.int64, device="meta") for s in config.latents]
        out = model.decode(grids)
        assert out.shape == (1, 3, config.resolution, config.resolution), name


@pytest.mark.parametrize("name", [n for n in PARAMETERS if "1024" in n])
def test_1024_px_shapes_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = models.from_preset(name)
    grids = [torch.empty(1, s, s, dtype=torch.int64, device="meta") for s in model.config.latents]
    assert model.decode(grids).shape == (1, 3, 1024, 1024)


@pytest.mark.parametrize("name", TINY)
def test_forward_shapes_and_gradients(name: str) -> None:
    model = models.from_preset(name)
    out = model(images(2, 64, 128))
    assert [tuple(c.shape) for c in out.codes] == [(2, 8, 16), (2, 16, 32)]
    count = model.num_scales if name == "tiny" else 1
    assert [tuple(c.shape) for c in out.contributions] == [(2, 3, 64, 128)] * count
    assert out.reconstruction_loss.shape == (count,) and out.commitment_loss.shape == (2,)
    expected = out.reconstruction_loss.sum() + out.commitment_loss.sum()
    torch.testing.assert_close(out.loss.detach(), expected)
    assert out.usage.shape == out.perplexity.shape == (2,)
    counts = torch.stack(out.code_counts)
    torch.testing.assert_close(out.usage, metrics.usage(counts).float())
    torch.testing.assert_close(out.perplexity, metrics.perplexity(counts).float())
    out.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        assert bool((parameter.grad != 0).any()), f"no gradient reaches {parameter_name}"


@pytest.mark.parametrize("name", TINY)
def test_ten_steps_equal_the_reference_backend(name: str) -> None:
    """Each from the same weights: Adam makes whole steps of what rounding leaves of a zero."""
    torch.manual_seed(3)
    fast = models.from_preset(name)
    reference = models.from_preset(name, backend="reference")
    reference.load_state_dict(fast.state_dict())
    optimizer = torch.optim.Adam(fast.parameters(), 3e-4, betas=(0.9, 0.5))
    for step in range(10):
        x = images(2)
        got, want = fast(x), reference(x)
        for m in range(2):
            assert torch.equal(got.codes[m], want.codes[m]), f"step {step} scale {m}"
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
        for model, out in ((fast, got), (reference, want)):
            model.zero_grad()
            out.loss.backward()
        weights = zip(fast.named_parameters(), reference.parameters(), strict=True)
        for (key, mine), theirs in weights:
            error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 1e-5, f"step {step} {key}: {error:.1e}"
        optimizer.step()
        for mine, theirs in zip(fast.parameters(), reference.parameters(), strict=True):
            theirs.data.copy_(mine)
    for (key, mine), theirs in zip(fast.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [*TINY, "imagenet256-s"])
def test_codes_and_images_agree_bit_for_bit(
    name: str, layout: torch.memory_format, precision: torch.dtype
) -> None:
    options: dict[str, int] = {} if name in TINY else {"width": 16}
    model = models.from_preset(name, **options).eval().to(memory_format=layout)
    model = model.to(precision)
    x = (torch.rand(2, 3, model.config.resolution, model.config.resolution) * 2 - 1).to(precision)
    x = x.contiguous(memory_format=layout)
    with torch.no_grad():
        model.initialise_codebooks(x)
        out = model(x)
        codes = model.encode(x)
        assert all(torch.equal(a, b) for a, b in zip(codes, out.codes, strict=True))
        for a, b in zip(model.contributions(codes), out.contributions, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(model.decode(codes), out.partial())
        assert torch.equal(model.reconstruct(x), out.partial())
        if len(out.contributions) > 1:
            assert torch.equal(model.decode(codes, upto=0), out.contributions[0])
            assert torch.equal(model.decode(codes[:1]), out.contributions[0])
            assert torch.equal(model.reconstruct(x, upto=0), out.partial(0))


def test_finer_codes_depend_on_the_coarser_decoder() -> None:
    model = models.from_preset("tiny").eval()
    x = images(1)
    before = model.encode(x)
    with torch.no_grad():
        model.step_one[0][0].bias += 3.0
    after = model.encode(x)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", TINY)
def test_latents_are_what_is_quantized(name: str) -> None:
    model = models.from_preset(name).eval()
    x = images(2)
    with torch.no_grad():
        codes = model.encode(x)
        for m, z in enumerate(model.latents(x, codes)):
            assert torch.equal(model.quantizers[m].encode(z), codes[m])
        other = model.latents(x, [(codes[0] + 1) % 128, codes[1]])
        assert torch.equal(other[0], model.latents(x, codes)[0])
        assert not torch.equal(other[1], model.latents(x, codes)[1])


def test_the_target_blur_is_that_of_the_training_resolution() -> None:
    model = models.from_preset("tiny").eval()
    x = images(1, 128, 128)
    out = model(x)
    target = msvq_fast.ops.gaussian_pyramid(x, 2, kernel_size=7)[0]
    error = (out.contributions[0].detach() - target).square().mean()
    torch.testing.assert_close(out.reconstruction_loss[0], error)


def test_codebooks_move_in_training_only_and_can_wait() -> None:
    model = models.from_preset("tiny")
    start = model.quantizers[0].codebook.clone()
    model.eval()
    model(images())
    assert torch.equal(model.quantizers[0].codebook, start)
    model.train()
    model.defer_codebook_updates()
    first, second = model(images()), model(images())
    assert torch.equal(model.quantizers[0].codebook, start)
    counts = model.code_statistics()[0][0]
    assert torch.equal(counts, first.code_counts[0] + second.code_counts[0])
    model.update_codebooks()
    assert not torch.equal(model.quantizers[0].codebook, start)
    assert int(model.code_statistics()[0][0].sum()) == 0


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name: str, tmp_path) -> None:
    model = models.from_preset(name).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = models.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is type(model) and loaded.config == model.config
    x = images(1)
    assert torch.equal(loaded(x).loss, model(x).loss)


def test_loading_says_what_is_wrong(tmp_path) -> None:
    model = models.from_preset("tiny")
    folder = tmp_path / "model"
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        models.from_pretrained(folder)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="expected a VQVAE2"):
        models.VQVAE2.from_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be loaded"):
        models.from_pretrained(folder)
    with pytest.raises(InputError, match=r"expected a folder of a saved model"):
        models.from_pretrained(weights)
    models.from_preset("tiny", num_codes=7).save_pretrained(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"size mismatch for quantizers\.0\.codebook.*\.\.\.$"):
        models.from_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "depth": 3}))
    with pytest.raises(InputError, match="depth"):
        models.from_pretrained(folder)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="run is a run, not a saved model; give one of its check"):
        models.from_pretrained(tmp_path / "run")
    for text in ("{", '{"model": ["MSVQVAE"]}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match="is not the configuration of a model"):
            models.from_pretrained(folder)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 64, 64), "expected 4 dimensions"),
        (torch.zeros(1, 1, 64, 64), "1 channels; expected 3"),
        (torch.zeros(1, 3, 64, 60), "multiples of 8"),
        (torch.zeros(1, 3, 4, 4), "multiples of 8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "x / 127.5 - 1"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "dtype torch.int64"),
        (torch.full((1, 3, 64, 64), 255.0), r"expected values in \[-1, 1\]"),
        (torch.full((1, 3, 64, 64), 1.02), r"expected values in \[-1, 1\]"),
        (torch.full((1, 3, 64, 64), -1.02), r"expected values in \[-1, 1\]"),
        (torch.full((1, 3, 64, 64), torch.nan), r"expected values in \[-1, 1\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), "x has dtype torch.float64; expected the"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "the model is on cpu"),
        (torch.zeros(1, 3, 64, 64).numpy(), r"x is a ndarray; expected a tensor \(B, 3, H, W\)"),
    ],
)
def test_bad_images(x: torch.Tensor, message: str) -> None:
    model = models.from_preset("tiny")
    for call in (model, model.encode):
        with pytest.raises(InputError, match=message):
            call(x)


def test_bad_codes() -> None:
    model = models.from_preset("tiny")
    good = [torch.zeros(1, 8, 8, dtype=torch.int64), torch.zeros(1, 16, 16, dtype=torch.int64)]
    with pytest.raises(InputError, match="3 grids; expected 1 to 2"):
        model.decode([*good, good[1]])
    with pytest.raises(InputError, match=r"codes\[1\] has shape \(1, 8, 8\)"):
        model.decode([good[0], good[0]])
    with pytest.raises(InputError, match=r"codes\[0\] has shape \(\)"):
        model.decode([good[0][0, 0, 0]])
    with pytest.raises(InputError, match="expected int64"):
        model.decode([g.int() for g in good])
    with pytest.raises(InputError, match=r"codes\[1\] is a ndarray; expected an int64 tensor"):
        model.decode([good[0], good[1].numpy()])
    with pytest.raises(InputError, match="codes span"):
        model.decode([good[0] + 128, good[1]])
    with pytest.raises(InputError, match="upto=2"):
        model.decode(good, upto=2)
    with pytest.raises(InputError, match=r"codes\[0\] has shape .*; expected \(2, 8, 8\) for x"):
        model.latents(images(2), good)
    with pytest.raises(InputError, match="1 grids; expected 2"):
        models.from_preset("vqvae2-tiny").decode(good[:1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"latents": (8, 24)}, "double the one before"),
        ({"latents": (5, 10)}, "power of two"),
        ({"latents": ()}, "at least one"),
        ({"num_codes": 0}, "num_codes=0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"block_factor": 3}, "block_factor=3"),
        ({"kernel_size": 8}, "odd"),
        ({"kernel_size": 129}, "odd int of 1 to 127"),
        ({"resolution": 2**17, "latents": (2**16,)}, "expected at most 65536"),
        ({"sigma_rule": "mine"}, "sigma_rule"),
        ({"codebook_init": "pca"}, "codebook_init"),
        ({"kernel_size": 3.0}, "odd"),
        ({"width": 32.5}, "width=32.5; expected an int"),
        ({"width": 1}, "width=1; expected at least 2"),
        ({"latents": (8.0, 16.0)}, "latents"),
        ({"latents": 8}, "latents=8; expected the sizes of all scales"),
        ({"decay": "9e-1"}, "decay='9e-1'; expected 0 <="),
        ({"commitment_weight": None}, "commitment_weight=None; expected a finite number"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0"),
        ({"restart_below": -1.0}, "restart_below"),
        ({"restart_below": float("nan")}, "restart_below"),
        ({"depth": 3}, "not a field"),
    ],
)
def test_bad_configurations(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.from_preset("tiny", **overrides)
    with pytest.raises(InputError, match="unknown"):
        models.from_preset("tinier")


def test_three_scales_and_one() -> None:
    for latents in ((4, 8, 16), (16,)):
        model = models.from_preset("tiny", latents=latents)
        out = model(images(1))
        assert [c.shape[-1] for c in out.codes] == list(latents)
        out.loss.backward()


def test_half_precision_keeps_the_codebook_exact() -> None:
    model = models.from_preset("tiny").bfloat16()
    assert model.quantizers[0].codebook.dtype == torch.float32
    out = model(images(1).bfloat16())
    assert out.contributions[0].dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    codes = model.eval().encode(images(1).bfloat16())
    assert model.decode(codes).dtype == torch.bfloat16


def test_kmeans_start_uses_every_code_and_every_scale() -> None:
    model = models.from_preset("tiny", codebook_init="kmeans", num_codes=16)
    x = images(2)
    model.initialise_codebooks(x)
    out = model(x)
    assert out.usage.tolist() == [100.0, 100.0]


def test_autocast_and_channels_last() -> None:
    model = models.from_preset("tiny").to(memory_format=torch.channels_last)
    x = images(1).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.loss.dtype == torch.float32
    out.loss.backward()


@pytest.mark.parametrize("name", models.PRESETS)
def test_an_untrained_model_passes_images_and_gradients_on(name: str) -> None:
    config = models.PRESETS[name]
    side = 2 * config.stride  # as deep as the preset, but narrow and of few pixels
    latents = [n * side // config.resolution for n in config.latents]
    model = models.from_preset(name, width=16, resolution=side, latents=latents)
    x = images(2, side, side)
    model.initialise_codebooks(x)
    model.defer_codebook_updates()
    model(x).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.square().mean().sqrt() > 3 * 1e-8, key  # thrice Adam's eps

    codes = model.encode(x)

    def activations() -> list[torch.Tensor]:
        return [*model.latents(x, codes), *model.contributions(codes)]

    with torch.no_grad():
        exact = activations()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = activations()
    for want, got in zip(exact, rounded, strict=True):
        # What differs between the two images, against what rounding does to it.
        signal = want[0] - want[1]
        error = got[0].float() - got[1].float() - signal
        assert error.norm() < 32 * torch.finfo(torch.bfloat16).eps * signal.norm()
