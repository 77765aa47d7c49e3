"""The two published networks whose features name a metric: the Inception-v3 of the FID, and MedicalNet's 3D ResNet.

Both are functions of a state dictionary in the layout in which it is published; widths and depth follow from its
tensors. No weights come with this package: they are read from a file that is given, or that lies in the usual cache.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bonelib import InputError

PUBLISHED = {  # file names under which the weights are published, newest habit first
    "inception": ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    "medicalnet": ("resnet_10_23dataset.pth", "resnet_10.pth", "resnet_50_23dataset.pth", "resnet_50.pth"),
}
CACHES = (".cache/torch/hub/checkpoints", ".cache/huggingface/hub")  # below the home folder
INPUT = 299  # pixels a side that the Inception network sees
INCEPTION_EPS, RESNET_EPS = 1e-3, 1e-5  # of the batch normalisations
DILATION = (1, 1, 2, 4)  # of the four stages of a MedicalNet ResNet, which strides in the second stage alone


def find_weights(name: str, path: str | Path | None = None) -> Path | None:
    """The file of weights of `name` ("inception" or "medicalnet"): `path`, or one in the cache, or None.

    Raises `InputError` for a path that is given and does not exist.
    """
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file of {name} weights; take the key out to do without")
        return Path(path)
    for cache in CACHES:
        for file in PUBLISHED[name]:
            found = sorted((Path.home() / cache).rglob(file)) if (Path.home() / cache).is_dir() else []
            if found:
                return found[0]
    return None


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dictionary, by the names of its published layout. Raises `InputError` for a file that is none."""
    try:
        content = (
            load_file(path)
            if Path(path).suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        content = content.get("state_dict", content)
        return {name.removeprefix("module."): values.float() for name, values in content.items()}
    except Exception as error:  # torch, zip and safetensors each have their own for a damaged file
        raise InputError(f"{path}: not a state dictionary ({str(error).splitlines()[0]:.80})") from None


def inception_v3(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The pooled features (n, 2048) of grey images (n, y, x) in [0, 1], resized to 299 x 299 as for the FID.

    Szegedy et al. 2016 in the variant of the FID (Heusel et al. 2017): borders are no part of a mean over
    neighbours, and the last block takes their maximum. Raises `InputError` naming a tensor that is missing.
    """
    x = F.interpolate(images[:, None], (INPUT, INPUT), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    x = 2 * x - 1

    def conv(x, name, stride=1, pad=None):
        weight = _tensor(weights, f"{name}.conv.weight")
        pad = tuple(k // 2 for k in weight.shape[2:]) if pad is None else pad
        return F.relu(_norm(F.conv2d(x, weight, None, stride, pad), weights, f"{name}.bn", INCEPTION_EPS))

    def chain(x, block, names, last=None):
        for name in names[:-1]:
            x = conv(x, f"{block}.{name}")
        return conv(x, f"{block}.{names[-1]}", **(last or {}))

    def mean(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    x = conv(x, "Conv2d_1a_3x3", 2, 0)
    x = conv(conv(x, "Conv2d_2a_3x3", 1, 0), "Conv2d_2b_3x3")
    x = conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", 1, 0), 3, 2)
    halving = dict(stride=2, pad=0)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        ways = (["branch1x1"], _numbered("branch5x5", 2), _numbered("branch3x3dbl", 3))
        x = torch.cat([*(chain(x, block, way) for way in ways), conv(mean(x), f"{block}.branch_pool")], 1)
    ways = (["branch3x3"], _numbered("branch3x3dbl", 3))
    x = torch.cat([*(chain(x, "Mixed_6a", way, halving) for way in ways), F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        ways = (["branch1x1"], _numbered("branch7x7", 3), _numbered("branch7x7dbl", 5))
        x = torch.cat([*(chain(x, block, way) for way in ways), conv(mean(x), f"{block}.branch_pool")], 1)
    ways = (_numbered("branch3x3", 2), _numbered("branch7x7x3", 4))
    x = torch.cat([*(chain(x, "Mixed_7a", way, halving) for way in ways), F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        narrow, deep = conv(x, f"{block}.branch3x3_1"), chain(x, block, _numbered("branch3x3dbl", 2))
        forks = [conv(narrow, f"{block}.branch3x3_2{way}") for way in "ab"]
        forks += [conv(deep, f"{block}.branch3x3dbl_3{way}") for way in "ab"]
        near = mean(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(x, f"{block}.branch1x1"), *forks, conv(near, f"{block}.branch_pool")], 1)
    return x.mean(dim=(2, 3))


def medicalnet(volumes: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The pooled features (n, 512 or 2048) of volumes (n, z, y, x), each brought to mean 0 and SD 1.

    Chen et al. 2019: residual blocks of two 3x3x3 convolutions or bottlenecks of three, with dilation instead of
    stride in the last two stages, and shortcuts that are 1x1x1 convolutions or, without weights, zero-padded
    channels. Raises `InputError` naming a tensor that is missing.
    """
    mean, sd = volumes.mean(dim=(1, 2, 3), keepdim=True), volumes.std(dim=(1, 2, 3), keepdim=True)
    x = ((volumes - mean) / (sd + 1e-9))[:, None]

    def conv(x, name, stride=1, dilation=1):
        weight = _tensor(weights, name)
        pad = weight.shape[2] // 2 * dilation
        return F.conv3d(x, weight, None, stride, pad, dilation)

    x = F.relu(_norm(conv(x, "conv1.weight", 2), weights, "bn1", RESNET_EPS))
    x = F.max_pool3d(x, 3, 2, 1)
    for stage, dilation in enumerate(DILATION, 1):
        blocks = 1 + max((int(k.split(".")[1]) for k in weights if k.startswith(f"layer{stage}.")), default=0)
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage == 2 and block == 0 else 1
            bottleneck = f"{name}.conv3.weight" in weights
            steps = [(1, 1), (stride, dilation), (1, 1)] if bottleneck else [(stride, dilation), (1, dilation)]
            y = x
            for i, (step, spread) in enumerate(steps, 1):
                y = _norm(conv(y, f"{name}.conv{i}.weight", step, spread), weights, f"{name}.bn{i}", RESNET_EPS)
                y = F.relu(y) if i < len(steps) else y
            if f"{name}.downsample.0.weight" in weights:
                x = conv(x, f"{name}.downsample.0.weight", stride)
                x = _norm(x, weights, f"{name}.downsample.1", RESNET_EPS)
            elif x.shape != y.shape:
                x = x[:, :, ::stride, ::stride, ::stride]
                x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            x = F.relu(x + y)
    return x.mean(dim=(2, 3, 4))


def _numbered(name, count):
    return [f"{name}_{i}" for i in range(1, count + 1)]


def _tensor(weights, name):
    if name not in weights:
        raise InputError(f"the weights hold no tensor {name!r}; accepted is the layout in which they are published")
    return weights[name]


def _norm(x, weights, name, eps):
    given = [_tensor(weights, f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *given, False, 0.0, eps)
