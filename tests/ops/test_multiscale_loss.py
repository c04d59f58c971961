"""The multi-scale loss against Eq. 5-7 written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from parity import assert_close

from msvq_fast.nn import GaussianPyramid, MultiScaleLoss
from msvq_fast.ops import InputError, gaussian_pyramid, multiscale_loss


def blur(x: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Dense depthwise convolution over reflect padding: shares no code with the package."""
    j = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (j / sigma) ** 2)
    taps /= taps.sum()
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, size, size)
    padded = F.pad(x, [size // 2] * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=x.shape[1])


def written_out(contributions, x, size, weights, reduction):  # type: ignore[no-untyped-def]
    """Loss, terms and the gradient of every contribution by the closed form."""
    scales = len(contributions)
    sigma = ((size - 1) / 2 - 1) / 3 + 4 / 5
    targets = [x.double()]
    for _ in range(scales - 1):
        targets.insert(0, blur(targets[0], size, sigma))
    partial, differences, terms = 0.0, [], []
    for contribution, target in zip(contributions, targets, strict=True):
        partial = partial + contribution.double()
        differences.append(partial - target)
        squares = differences[-1].square()
        terms.append(squares.mean() if reduction == "mean" else squares.sum())
    count = x.numel() if reduction == "mean" else 1
    grads = [
        sum(2 * weights[m] * differences[m] for m in range(i, scales)) / count
        for i in range(scales)
    ]
    loss = sum(w * t for w, t in zip(weights, terms, strict=True))
    return loss, torch.stack(terms), grads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_value_and_gradients(scales: int, reduction: str, dtype: torch.dtype, backend) -> None:
    x = (torch.rand(2, 3, 33, 40, dtype=torch.float64) * 2 - 1).to(dtype)
    contributions = [torch.randn(2, 3, 33, 40).to(dtype).requires_grad_() for _ in range(scales)]
    weights = [1.0, 0.5, 2.0, 0.25][:scales]
    loss, terms = multiscale_loss(
        contributions, x, kernel_size=7, weights=weights, reduction=reduction, backend=backend
    )
    exact = [c.detach() for c in contributions]
    want, want_terms, want_grads = written_out(exact, x, 7, weights, reduction)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == terms.dtype == work and not terms.requires_grad
    assert_close("loss", loss.detach(), want, ulps=64)
    assert_close("terms", terms, want_terms, ulps=64)
    (loss * 3).backward()
    for contribution, want_grad in zip(contributions, want_grads, strict=True):
        assert contribution.grad is not None and contribution.grad.dtype == dtype
        assert_close("gradient", contribution.grad, 3 * want_grad)


def test_defaults_are_the_papers() -> None:
    x = torch.rand(1, 3, 64, 80, dtype=torch.float64) * 2 - 1
    contributions = [torch.randn_like(x) for _ in range(2)]
    loss, _ = multiscale_loss(contributions, x)
    want, _, _ = written_out(contributions, x, int(math.sqrt(64) - 1) | 1, [1.0, 1.0], "mean")
    assert_close("loss", loss, want, ulps=64)


def test_a_perfect_sum_has_no_loss() -> None:
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    coarse, fine = GaussianPyramid(2, kernel_size=5)(x)
    loss, terms = MultiScaleLoss(kernel_size=5)([coarse, fine - coarse], x)
    assert float(loss) < 1e-13 and terms.shape == (2,)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 7},
        {"sigma": 0.7},
        {"sigma_rule": "opencv"},
        {"border": "circular"},
        {"kernel_size": 9, "sigma": 2.0, "border": "constant", "backend": "reference"},
    ],
)
def test_modules_pass_their_settings_on(settings: dict[str, object]) -> None:
    x = torch.rand(1, 3, 40, 36)
    contributions = [torch.randn_like(x) for _ in range(3)]
    pyramid, plain = gaussian_pyramid(x, 3, **settings), gaussian_pyramid(x, 3)
    got = GaussianPyramid(3, **settings)(x)
    assert all(torch.equal(a, b) for a, b in zip(got, pyramid, strict=True))
    assert not torch.equal(got[0], plain[0])
    for more in ({}, {"reduction": "sum", "weights": [1.0, 3.0, 0.5], "recompute": True}):
        want = multiscale_loss(contributions, x, **settings, **more)
        assert torch.equal(MultiScaleLoss(**settings, **more)(contributions, x)[0], want[0])
        assert not torch.equal(want[0], multiscale_loss(contributions, x, **more)[0])


def test_only_the_asked_gradients() -> None:
    x = torch.rand(1, 3, 16, 16)
    frozen, free = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16, requires_grad=True)
    loss, _ = multiscale_loss([frozen, free], x)
    loss.backward()
    assert frozen.grad is None and free.grad is not None


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_pixels(shape: tuple[int, ...], dtype: torch.dtype, backend) -> None:
    c = torch.zeros(shape, dtype=dtype, requires_grad=True)
    for reduction in ("sum", "mean"):
        loss, terms = multiscale_loss([c, c], c.detach(), reduction=reduction, backend=backend)
        assert terms.shape == (2,)
        assert loss == 0 if reduction == "sum" else loss.isnan()
        loss.backward()
        assert c.grad.shape == shape


@pytest.mark.parametrize("scales", [1, 5])
def test_on_meta(scales: int) -> None:
    c = torch.zeros(2, 3, 16, 16, device="meta", requires_grad=True)
    loss, terms = multiscale_loss([c] * scales, torch.zeros(2, 3, 16, 16, device="meta"))
    loss.backward()
    assert loss.shape == () and terms.shape == (scales,) and c.grad.device.type == "meta"


def test_uint8_images() -> None:
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    contributions = [torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)]
    loss, _ = multiscale_loss(contributions, x)
    want, _ = multiscale_loss(contributions, x.float() / 127.5 - 1)
    torch.testing.assert_close(loss, want)


def test_autocast_does_not_round() -> None:
    x = torch.rand(1, 3, 16, 16)
    contributions = [torch.randn(1, 3, 16, 16).bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = multiscale_loss(contributions, x)
    outside, _ = multiscale_loss(contributions, x)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_whole(dtype: torch.dtype, scales: int, trained: bool) -> None:
    x = torch.rand(1, 3, 16, 16, dtype=dtype)
    shape = (scales, 1, 3, 16, 16)
    contributions = [c.requires_grad_(trained) for c in torch.randn(shape, dtype=dtype)]
    torch.compiler.reset()
    compiled = torch.compile(multiscale_loss, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(contributions, x)
    want, _ = multiscale_loss(contributions, x)
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contributions": []}, "contributions is empty"),
        ({"x": torch.zeros(3, 8, 8)}, "expected 4 dimensions"),
        ({"x": torch.zeros(1, 3, 8, 9)}, r"contributions\[0\] has shape \(1, 3, 8, 8\)"),
        ({"x": torch.zeros(1, 3, 8, 8, requires_grad=True)}, "x requires a gradient"),
        ({"x": torch.zeros(1, 3, 8, 8, device="meta")}, "is on"),
        ({"weights": 1.0}, "weights=1.0; expected one number per scale"),
        ({"weights": [1.0]}, "weights has 1 values for 2 scales"),
        ({"weights": torch.ones(2, requires_grad=True)}, "weights require a gradient"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"border": "mirror"}, "border='mirror'"),
        ({"sigma_rule": "mine"}, "sigma_rule='mine'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"backend": "triton"}, "cannot run multiscale_loss"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {
        "contributions": [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)],
        "x": torch.zeros(1, 3, 8, 8),
        **change,
    }
    with pytest.raises(InputError, match=message):
        multiscale_loss(arguments.pop("contributions"), arguments.pop("x"), **arguments)
    mixed = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8).half()]
    with pytest.raises(InputError, match=r"contributions\[1\] has dtype torch.float16"):
        multiscale_loss(mixed, torch.zeros(1, 3, 8, 8))
