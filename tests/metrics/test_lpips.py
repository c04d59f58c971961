from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from msvq_fast.metrics import LPIPS, load_lpips
from msvq_fast.ops import InputError

# Every layer of the three backbones once more, in words: conv out kernel stride padding, fire,
# pool (c: ceil); a tap where LPIPS reads.
PLANS = {
    "alex": "conv 11 4 2 tap pool 3 conv 5 1 2 tap pool 3 conv 3 1 1 tap conv 3 1 1 tap "
    "conv 3 1 1 tap",
    "vgg": "conv 3 1 1 conv 3 1 1 tap pool 2 conv 3 1 1 conv 3 1 1 tap pool 2 "
    "conv 3 1 1 conv 3 1 1 conv 3 1 1 tap pool 2 conv 3 1 1 conv 3 1 1 conv 3 1 1 tap pool 2 "
    "conv 3 1 1 conv 3 1 1 conv 3 1 1 tap",
    "squeeze": "conv 3 2 0 tap cpool 3 fire fire tap cpool 3 fire fire tap cpool 3 fire tap "
    "fire tap fire tap fire tap",
}


def straightforward(model, x, y):
    """LPIPS of one pair, layer by layer, from the names and shapes of the state_dict alone."""
    state = {k: v.double() for k, v in model.state_dict().items()}
    weights = iter(v for k, v in state.items() if k.startswith("features."))
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    # float32 constants, as the published ones are
    a, b = ((image.double() - shift.double()) / scale.double() for image in (x, y))
    words = iter(PLANS[model.net].split())
    distance, layer = 0.0, 0
    for word in words:
        if word == "conv":
            _kernel, stride, padding = (int(next(words)) for _ in range(3))
            w, bias = next(weights), next(weights)
            a, b = (F.conv2d(v, w, bias, stride, padding).clamp(min=0) for v in (a, b))
        elif word == "fire":
            parts = [(next(weights), next(weights)) for _ in range(3)]
            out = []
            for v in (a, b):
                v = F.conv2d(v, *parts[0]).clamp(min=0)
                wide = [F.conv2d(v, *parts[1]), F.conv2d(v, *parts[2], padding=1)]
                out.append(torch.cat(wide, 1).clamp(min=0))
            a, b = out
        elif word == "tap":
            head = state[f"heads.{layer}"]
            for row in range(a.shape[2]):
                for column in range(a.shape[3]):
                    p, q = a[0, :, row, column], b[0, :, row, column]
                    p, q = (v / (v.norm() + 1e-10) for v in (p, q))
                    distance += float(head @ (p - q) ** 2) / (a.shape[2] * a.shape[3])
            layer += 1
        else:
            size = int(next(words))
            options = {"ceil_mode": word == "cpool"}
            a, b = (F.max_pool2d(v, size, 2, **options) for v in (a, b))
    assert next(weights, None) is None
    return distance


def images(count=2, size=70):
    x = torch.rand(count, 3, size, size) * 2 - 1
    return x, (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)


@pytest.mark.parametrize("net", PLANS)
def test_equals_a_straightforward_implementation(net):
    model = LPIPS(net).double()
    x, y = images()
    got = model(x, y)
    assert got.shape == (2,) and got.dtype == torch.float64
    want = [straightforward(model, x[i : i + 1], y[i : i + 1]) for i in range(2)]
    assert got.tolist() == pytest.approx(want, rel=1e-9)
    single = LPIPS(net)
    single.load_state_dict(model.state_dict())
    assert single(x, y).tolist() == pytest.approx(want, rel=1e-4)


def test_equal_images_are_at_distance_zero_and_gradients_flow():
    model = LPIPS("alex")
    x, y = images()
    assert model(x, x).tolist() == [0.0, 0.0]
    y.requires_grad_()
    model(x, y).sum().backward()
    assert y.grad.isfinite().all() and y.grad.abs().sum() > 0


def published(net, folder):
    """Random weights under the names that torchvision and the lpips package use."""
    model = LPIPS(net)
    state = model.state_dict()
    backbone = {k: v for k, v in state.items() if k.startswith("features.")}
    backbone["classifier.1.weight"] = torch.zeros(3)
    heads = {
        f"lin{k.split('.')[1]}.model.1.weight": v.view(1, -1, 1, 1)
        for k, v in state.items()
        if k.startswith("heads.")
    }
    folder.mkdir()
    torch.save(backbone, folder / "backbone.pth")
    torch.save(heads, folder / "heads.pth")
    return model


@pytest.mark.parametrize("net", PLANS)
def test_reads_published_names(net, tmp_path):
    model = published(net, tmp_path / "weights")
    loaded = load_lpips(tmp_path / "weights")
    assert loaded.net == net and len(loaded.sha256) == 64
    x, y = images()
    assert torch.equal(loaded(x, y), model(x, y).detach())
    assert not any(p.requires_grad for p in loaded.parameters())
    heads = tmp_path / "weights" / "heads.pth"
    tensors = torch.load(heads, weights_only=True)
    torch.save({"state_dict": {name: 2 * w for name, w in tensors.items()}}, heads)
    other = load_lpips(tmp_path / "weights")
    torch.testing.assert_close(other(x, y), 2 * loaded(x, y))
    assert other.sha256 != loaded.sha256  # every file counts


def test_reads_the_state_dict_of_the_lpips_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    torch.save(theirs.state_dict(), tmp_path / "all.pth")
    x, y = images()
    want = theirs(x, y).flatten().detach()
    torch.testing.assert_close(load_lpips(tmp_path / "all.pth")(x, y).float(), want)


def test_bad_weights_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"lpips_weights='.*nowhere.pth' does not exist; expected"):
        load_lpips(tmp_path / "nowhere.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"torn\.pth' is no file of tensors") as raised:
        load_lpips(tmp_path / "torn.pth")
    assert "\n" not in str(raised.value)
    published("alex", tmp_path / "folder")
    with pytest.raises(InputError, match=r"has no linear heads; expected .*lin0\.model"):
        load_lpips(tmp_path / "folder" / "backbone.pth")
    with pytest.raises(InputError, match=r"has no backbone; expected torchvision"):
        load_lpips(tmp_path / "folder" / "heads.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.pth, \.pt or \.safetensors"):
        load_lpips(tmp_path / "empty")
    state = torch.load(tmp_path / "folder" / "backbone.pth", weights_only=True)
    state["features.3.weight"] = state["features.3.weight"][:5]
    torch.save(state, tmp_path / "folder" / "backbone.pth")
    with pytest.raises(InputError, match=r"'features.3.weight' of shape \(5, 64, 5, 5\), expected"):
        load_lpips(tmp_path / "folder")


def test_bad_images_are_named():
    model = LPIPS()
    with pytest.raises(InputError, match="x has 1 channels; expected 3"):
        model(torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64))
    with pytest.raises(InputError, match="y has shape"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 65))
    for net, side in (("alex", 31), ("vgg", 16), ("squeeze", 17)):
        model, x = LPIPS(net), torch.rand(1, 3, side, side + 9)
        assert float(model(x, -x).detach()) > 0
        with pytest.raises(InputError, match=rf"{side - 1}x{side + 9} pixels; .* at least {side}"):
            model(x[..., 1:, :], x[..., 1:, :])
    with pytest.raises(InputError, match="net='resnet'"):
        LPIPS("resnet")
