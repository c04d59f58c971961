from __future__ import annotations

import math

import pytest
import torch

from msvq_fast.metrics import mse, psnr, psnr_from_mse, ssim, to_unit_range
from msvq_fast.ops import InputError


def pair(batch=3, height=37, width=52, noise=0.1, dtype=torch.float64):
    """Smooth images and noisy copies of them, in [0, 1]; every image has its own noise."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    phase = torch.arange(3 * batch).view(batch, 3, 1, 1)
    clean = (0.5 + 0.4 * torch.sin(x + phase) * torch.cos(y - phase)).double()
    strength = noise * torch.arange(1, batch + 1).view(batch, 1, 1, 1)
    noisy = (clean + strength * torch.randn(clean.shape, dtype=torch.float64)).clamp(0, 1)
    return clean.to(dtype), noisy.to(dtype)


def test_mse_and_psnr_golden_values():
    x = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    y = torch.stack([torch.full_like(x[0], 0.1), torch.full_like(x[0], 0.5)])
    torch.testing.assert_close(
        mse(x, y), torch.tensor([0.01, 0.25], dtype=torch.float64), rtol=1e-12, atol=0
    )
    want = torch.tensor([20.0, 10 * math.log10(4)], dtype=torch.float64)
    torch.testing.assert_close(psnr(x, y), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(psnr(x * 255, y * 255, data_range=255.0), want, rtol=1e-12, atol=0)


def test_psnr_of_a_set_is_that_of_the_mean_error():
    assert float(psnr_from_mse(torch.tensor([0.01, 0.03]).mean())) == pytest.approx(
        16.9897, abs=1e-4
    )


def test_the_gradient_of_ssim_repeats_on_a_gpu():
    """With deterministic algorithms, that of PyTorch's padding by reflection raises there."""
    clean, noisy = pair()
    waiting, seen = [ssim(clean.requires_grad_(), noisy).sum().grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "SliceBackward0" in names
    assert not [name for name in names if "Pad" in name]


def test_ssim_of_constant_images_is_the_luminance_term():
    x, y = torch.full((1, 3, 16, 16), 0.25), torch.full((1, 3, 16, 16), 0.75)
    want = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert float(ssim(x, y)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("border", ["reflect", "crop"])
def test_identical_images(border):
    x, _ = pair(dtype=torch.float32)
    assert mse(x, x).tolist() == [0.0] * 3
    assert psnr(x, x).tolist() == [math.inf] * 3
    torch.testing.assert_close(
        ssim(x, x, border=border), torch.ones(3).double(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_each_image_is_judged_alone(metric):
    x, y = pair()
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    together = metric(x, y)
    assert together.dtype == torch.float64 and together.shape == (3,)
    assert len(set(together.tolist())) == 3
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_symmetric_and_layout_free(metric):
    x, y = pair(dtype=torch.float32)
    want = metric(x, y)
    torch.testing.assert_close(metric(y, x), want, rtol=1e-13, atol=0)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(metric(last, y), want, rtol=1e-13, atol=0)


def test_sums_of_bfloat16_images_are_float64():
    x, y = pair(dtype=torch.bfloat16)
    for metric in (mse, psnr, ssim):
        assert torch.equal(metric(x, y), metric(x.double(), y.double()))


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (37, 52)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_matches_torchmetrics(size, data_range):
    functional = pytest.importorskip("torchmetrics.functional.image")
    x, y = (image * data_range for image in pair(height=size[0], width=size[1]))
    theirs = functional.structural_similarity_index_measure(
        x, y, data_range=data_range, reduction="none"
    )
    torch.testing.assert_close(ssim(x, y, data_range=data_range), theirs, atol=1e-12, rtol=0)
    theirs = functional.peak_signal_noise_ratio(
        x, y, data_range=data_range, dim=(1, 2, 3), reduction="none"
    )
    # Theirs divides by ln 10 rounded to float32: 5e-8.
    torch.testing.assert_close(psnr(x, y, data_range=data_range), theirs, rtol=1e-7, atol=0)
    theirs = functional.peak_signal_noise_ratio(x, y, data_range=data_range)
    whole = psnr_from_mse(mse(x, y).mean(), data_range=data_range)
    torch.testing.assert_close(whole, theirs, rtol=1e-7, atol=0)


def test_matches_torchmetrics_in_float32():
    functional = pytest.importorskip("torchmetrics.functional.image")
    x, y = pair(dtype=torch.float32)
    theirs = functional.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    # Theirs takes differences of nearly equal local moments in float32.
    torch.testing.assert_close(ssim(x, y), theirs.double(), atol=5e-6, rtol=0)


def test_matches_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    x, y = pair()
    for i in range(3):
        a, b = x[i].numpy(), y[i].numpy()
        theirs = skimage.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=0,
        )
        assert float(ssim(x, y, border="crop")[i]) == pytest.approx(theirs, abs=1e-12)
        assert float(mse(x, y)[i]) == pytest.approx(skimage.mean_squared_error(a, b), rel=1e-12)
        theirs = skimage.peak_signal_noise_ratio(a, b, data_range=1.0)
        assert float(psnr(x, y)[i]) == pytest.approx(theirs, abs=1e-10)


def test_borders_differ_where_only_the_edge_differs():
    x, _ = pair()
    y = x.clone()
    y[..., 0, :] = 0.0
    assert (ssim(x, y, border="reflect") < 0.99).all()
    z = x.clone()
    z[..., 18, 26] = 0.0
    assert (ssim(x, z, border="crop") < ssim(x, z, border="reflect")).all()


def test_to_unit_range_maps_and_clips():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 3.0])
    assert to_unit_range(x).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    assert to_unit_range(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"x has shape \(3, 16, 16\); expected 4"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), "y has shape .* but x has"),
        (torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 3, 16, 16), "x has dtype torch.uint8"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, device="meta"), "y is on meta"),
    ],
)
@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_bad_images_are_named(metric, x, y, message):
    with pytest.raises(InputError, match=message):
        metric(x, y)


def test_bad_settings_are_named():
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(InputError, match=r"data_range=0\.0; expected a positive"):
        psnr(x, x, data_range=0.0)
    with pytest.raises(InputError, match="data_range=nan"):
        ssim(x, x, data_range=float("nan"))
    with pytest.raises(InputError, match="border='valid'; expected one of"):
        ssim(x, x, border="valid")
    with pytest.raises(InputError, match="10x16 pixels; SSIM's window needs at least 11x11"):
        ssim(x[..., :10, :], x[..., :10, :])
