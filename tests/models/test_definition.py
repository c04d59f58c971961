"""Both models written out again from their weights: Fig. 2 and Eq. 1-8, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msvq_fast import models
from msvq_fast.ops import gaussian_pyramid

BODY = "RRA"  # two residual blocks and a ReLU


def run(weights: dict[str, Tensor], name: str, layers: str, x: Tensor) -> Tensor:
    """Convolutions (C), halving ones (H), up-sampling (U), residual blocks (R) and ReLUs (A)."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.conv2d(x, w, b, stride, padding=w.shape[-1] // 2)

    for i, layer in enumerate(layers):
        at = f"{name}.{i}"
        if layer == "A":
            x = x.relu()
        elif layer == "R":
            x = x + conv(f"{at}.outer", conv(f"{at}.inner", x.relu()).relu())
        elif layer == "U":
            x = F.conv_transpose2d(x, weights[f"{at}.weight"], weights[f"{at}.bias"], 2, 1)
        else:
            x = conv(at, x, stride=1 + (layer == "H"))
    return x


def blocks(doublings: int, factor: int) -> str:
    """The decoder blocks from a grid to an image; nothing comes after the last up-sampling."""
    if doublings == 0:
        return "C"
    one = f"C{BODY}U"
    return one * doublings if factor == 2 else one * (doublings % 2) + f"{one}AU" * (doublings // 2)


def written_out(model: models.MSVQVAE | models.VQVAE2, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and contributions of images ``x``, differentiable."""
    config, last = model.config, model.num_scales - 1
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    features = [run(weights, "encoder.scales.0", "HA" * config.halvings[last] + BODY, x)]
    for m in range(1, last + 1):
        features.insert(0, run(weights, f"encoder.scales.{m}", f"H{BODY}", features[0]))
    loss, quantized, contributions, z_d = x.new_zeros(()), [], [], None
    for m, feature in enumerate(features):
        joined = feature if z_d is None else torch.cat([feature, z_d], 1)
        z_e = F.conv2d(joined, weights[f"to_latent.{m}.weight"], weights[f"to_latent.{m}.bias"])
        codebook = weights[f"quantizers.{m}.codebook"]  # (K, D)
        codes = (z_e[:, None] - codebook[..., None, None]).square().sum(2).argmin(1)
        e = codebook[codes].movedim(-1, 1)
        loss = loss + 0.25 * (z_e - e).square().mean()
        quantized.append(z_e + (e - z_e).detach())
        if isinstance(model, models.VQVAE2):
            if m < last:
                z_d = run(weights, f"conditional.{m}", f"C{BODY}U", quantized[m])
            continue
        rest = config.halvings[m]
        if m < last:
            z_d, rest = run(weights, f"step_one.{m}", "CRAU", quantized[m]), rest - 1
        steps = blocks(rest, config.block_factor)
        start = z_d if m < last else quantized[m]
        contributions.append(run(weights, f"step_two.{m}", steps, start))
    targets = [x]
    if isinstance(model, models.MSVQVAE):
        kappa = config.kernel_size or 7  # √64 - 1
        third = 1 / 3 if config.sigma_rule == "paper" else 0.3
        sigma = third * ((kappa - 1) / 2 - 1) + 0.8
        targets = gaussian_pyramid(x, last + 1, kernel_size=kappa, sigma=sigma)
    else:
        grids = [z.repeat_interleave(1 << last - m, 2) for m, z in enumerate(quantized)]
        grids = [z.repeat_interleave(1 << last - m, 3) for m, z in enumerate(grids)]
        steps = f"C{BODY}" + "UA" * (config.halvings[last] - 1) + "U"
        contributions.append(run(weights, "decoder", steps, torch.cat(grids, 1)))
    for m, target in enumerate(targets):
        partial = torch.stack(contributions[: m + 1]).sum(0)
        loss = loss + (target - partial).square().mean()
    return loss, contributions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny", {}),
        ("tiny", {"block_factor": 4, "kernel_size": 5, "sigma_rule": "opencv"}),
        ("tiny", {"latents": (8, 16, 32), "block_factor": 4}),
        ("vqvae2-tiny", {}),
        ("vqvae2-tiny", {"latents": (4, 8, 16)}),
    ],
)
def test_values_and_gradients(name: str, options: dict[str, object]) -> None:
    model = models.from_preset(name, width=8, code_dim=4, num_codes=16, **options).double().eval()
    for quantizer in model.quantizers:
        quantizer.codebook.normal_()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    loss, contributions = written_out(model, x)
    out = model(x)
    for mine, theirs in zip(out.contributions, contributions, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=0)
    parameters = dict(model.named_parameters())
    grads = [torch.autograd.grad(of, list(parameters.values())) for of in (out.loss, loss)]
    for key, mine, theirs in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ("tiny", "vqvae2-tiny"))
def test_a_loss_of_ones_own_of_the_parts_of_an_output(name: str) -> None:
    torch.manual_seed(5)
    model = models.from_preset(name).double().eval()
    x, parameters = torch.rand(2, 3, 64, 64).double() * 2 - 1, list(model.parameters())
    want = torch.autograd.grad(model(x).loss, parameters)
    out = model(x)
    targets = gaussian_pyramid(x, len(out.contributions))
    errors = [(out.partial(m) - target).square().mean() for m, target in enumerate(targets)]
    got = torch.autograd.grad(torch.stack(errors).sum() + out.commitment_loss.sum(), parameters)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
