"""The published networks, on weights drawn at random in the layout in which the real ones are published."""

import numpy as np
import pytest
import torch
from torch import nn

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.evaluation import features, pretrained

STEM = {"1a_3x3": (32, 3, 3, 3), "2a_3x3": (32, 32, 3, 3), "2b_3x3": (64, 32, 3, 3), "3b_1x1": (80, 64, 1, 1)}
STEM["4a_3x3"] = (192, 80, 3, 3)


def inception_layout():
    """{name of a convolution: shape of its weights} of the FID's Inception-v3."""
    shapes = {f"Conv2d_{name}": shape for name, shape in STEM.items()}

    def way(block, name, inputs, *steps):
        for i, (outputs, high, wide) in enumerate(steps, 1):
            shapes[f"{block}.{name}" + (f"_{i}" if len(steps) > 1 else "")] = (outputs, inputs, high, wide)
            inputs = outputs

    for block, n, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        way(block, "branch1x1", n, (64, 1, 1))
        way(block, "branch5x5", n, (48, 1, 1), (64, 5, 5))
        way(block, "branch3x3dbl", n, (64, 1, 1), (96, 3, 3), (96, 3, 3))
        way(block, "branch_pool", n, (pool, 1, 1))
    way("Mixed_6a", "branch3x3", 288, (384, 3, 3))
    way("Mixed_6a", "branch3x3dbl", 288, (64, 1, 1), (96, 3, 3), (96, 3, 3))
    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        way(block, "branch1x1", 768, (192, 1, 1))
        way(block, "branch7x7", 768, (c, 1, 1), (c, 1, 7), (192, 7, 1))
        way(block, "branch7x7dbl", 768, (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
        way(block, "branch_pool", 768, (192, 1, 1))
    way("Mixed_7a", "branch3x3", 768, (192, 1, 1), (320, 3, 3))
    way("Mixed_7a", "branch7x7x3", 768, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
    for block, n in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        for name, outputs, inputs, high, wide in (
            ("branch1x1", 320, n, 1, 1),
            ("branch3x3_1", 384, n, 1, 1),
            ("branch3x3_2a", 384, 384, 1, 3),
            ("branch3x3_2b", 384, 384, 3, 1),
            ("branch3x3dbl_1", 448, n, 1, 1),
            ("branch3x3dbl_2", 384, 448, 3, 3),
            ("branch3x3dbl_3a", 384, 384, 1, 3),
            ("branch3x3dbl_3b", 384, 384, 3, 1),
            ("branch_pool", 192, n, 1, 1),
        ):
            way(block, name, inputs, (outputs, high, wide))
    return shapes


def inception_weights():
    rng, weights = torch_rng(0, "test inception"), {}
    for name, shape in inception_layout().items():
        weights[f"{name}.conv.weight"] = torch.randn(shape, generator=rng) * (2 / np.prod(shape[1:])) ** 0.5
        for part, low in (("weight", 0.8), ("bias", -0.2), ("running_mean", -0.2), ("running_var", 0.8)):
            weights[f"{name}.bn.{part}"] = low + 0.4 * torch.rand(shape[0], generator=rng)
    return weights


def pictures(n=2):
    return torch.rand(n, 299, 299, generator=torch_rng(0, "test pictures"))


# Mean, SD, and the features 0, 700, 1400 and 2047 of the first of `pictures` by torch-fidelity 0.4.0
RECORDED = [1.111128, 1.464352, 0.3307097, 2.837622, 0.01301753, 0.01844436]


def test_inception_agrees_with_independent_code():
    found = pretrained.inception_v3(pictures(), inception_weights())
    assert found.shape == (2, 2048)
    values = [float(v) for v in (found[0].mean(), found[0].std(), *found[0, [0, 700, 1400, 2047]])]
    np.testing.assert_allclose(values, RECORDED, rtol=1e-4)


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride, dilation, shortcut):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.downsample, self.stride, self.more = None, stride, outputs - inputs
        if inputs != outputs and shortcut == "B":
            self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.more:
            x = nn.functional.avg_pool3d(x, 1, self.stride)
            x = torch.cat([x, torch.zeros(len(x), self.more, *x.shape[2:])], 1)
        return torch.relu(x + y)


class Bottleneck(nn.Module):
    def __init__(self, inputs, outputs, stride, dilation, shortcut):
        super().__init__()
        narrow = outputs // 4
        self.conv1, self.bn1 = nn.Conv3d(inputs, narrow, 1, bias=False), nn.BatchNorm3d(narrow)
        self.conv2 = nn.Conv3d(narrow, narrow, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(narrow)
        self.conv3, self.bn3 = nn.Conv3d(narrow, outputs, 1, bias=False), nn.BatchNorm3d(outputs)
        self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x):
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(self.downsample(x) + self.bn3(self.conv3(y)))


class Small(nn.Module):
    """MedicalNet's ResNet with narrow stages and two blocks in the second."""

    def __init__(self, block, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, 4, 7, 2, 3, bias=False), nn.BatchNorm3d(4)
        self.pool, before = nn.MaxPool3d(3, 2, 1), 4
        for i, (width, stride, dilation) in enumerate(((8, 1, 1), (16, 2, 1), (24, 1, 2), (32, 1, 4)), 1):
            # a bottleneck always has its 1x1x1 shortcut where a stage begins
            parts = [block(before, width, stride, dilation, shortcut)]
            parts += [Basic(width, width, 1, dilation, shortcut)] if i == 2 and block is Basic else []
            setattr(self, f"layer{i}", nn.Sequential(*parts))
            before = width

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3, 4))


@pytest.mark.parametrize("block, shortcut", [(Basic, "A"), (Basic, "B"), (Bottleneck, "B")])
def test_medicalnet_agrees_with_a_module_of_its_layout(block, shortcut, tmp_path):
    torch.manual_seed(0)
    network = Small(block, shortcut)
    for name, values in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            values.add_(0.3 * torch.rand(values.shape))
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "resnet.pth")
    volumes = torch.rand(3, 20, 36, 28) ** 2
    found = features.medicalnet(volumes, pretrained.load_weights(tmp_path / "resnet.pth"))
    mean, sd = volumes.mean(dim=(1, 2, 3), keepdim=True), volumes.std(dim=(1, 2, 3), keepdim=True)
    with torch.no_grad():
        expected = network.eval()(((volumes - mean) / sd)[:, None]).numpy()
    assert found.shape == (3, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_looked_for_and_missing_or_wrong_ones_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.Path, "home", lambda: tmp_path)
    assert pretrained.find_weights("inception") is None
    assert set(features.families()) == {"random3d", "spectrum"}  # no column bears the name of what is not there
    file = tmp_path / ".cache/huggingface/hub/models--x/snapshots/1/resnet_10_23dataset.pth"
    file.parent.mkdir(parents=True)
    torch.save(Small(Basic, "B").state_dict(), file)
    assert pretrained.find_weights("medicalnet") == file
    found = features.families()
    assert set(found) == {"medicalnet", "random3d", "spectrum"}
    assert found["medicalnet"](torch.rand(2, 8, 18, 14)).shape == (2, 32)
    with pytest.raises(InputError, match="no such file of inception weights"):
        pretrained.find_weights("inception", tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a state dictionary"):
        pretrained.load_weights(tmp_path / "broken.pth")
    with pytest.raises(InputError, match="no tensor 'Conv2d_1a_3x3.conv.weight'"):
        pretrained.inception_v3(pictures(1), {})


def test_inception_sees_random_slices_that_depend_on_seed_and_volume_alone(monkeypatch):
    monkeypatch.setattr(pretrained, "inception_v3", lambda images, weights: images.mean(dim=(1, 2))[:, None])
    volumes = torch.arange(10).div(10).reshape(1, 10, 1, 1).expand(3, 10, 6, 4).contiguous()
    found = features.inception(volumes, {}, seed=3)
    assert found.shape == (6, 1) and all(found[2 * i] < found[2 * i + 1] for i in range(3))
    np.testing.assert_array_equal(found[:4], features.inception(volumes[:2], {}, seed=3))
    assert not np.array_equal(found, features.inception(volumes, {}, seed=4))
