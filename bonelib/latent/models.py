"""Models from their folders, and the volumes they draw, as intensities or calibrated."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.random import torch_rng
from bonelib.networks.config import SuperRes
from bonelib.networks.encoder import trunk
from bonelib.networks.registry import build_critic, build_generator, build_superres
from bonelib.networks.superres import Cascaded, SuperResolution
from bonelib.scans.preprocessing import to_density
from bonelib.scans.volumes import Volume
from bonelib.training.config import HierarchicalTrain, Train, training_section

SUPERRES = ("superres", "finer")  # networks behind a generator, in order


class Model(NamedTuple):
    """A generator, the critic it was trained against, and what config.json says of both."""

    generator: Any
    critic: Any
    config: dict

    @property
    def how(self) -> Train | HierarchicalTrain:
        """How it was trained."""
        return training_section(self.config["train"], "train", "config.json")


def load_model(folder: str | Path) -> Model:
    """Open a model folder. Raises `InputError` naming a missing or damaged file."""
    folder, files = Path(folder), ("config.json", "generator.safetensors", "critic.safetensors")
    _require(folder, files, "a model folder holds config.json and two safetensors files")
    config = read_config(folder, "train", "data")
    params = training_section(config["train"], "train", str(folder / "config.json"))
    how = dict(haar=params.haar, precision=params.precision)
    generator = build_generator(params.generator, **how)
    critic = build_critic(params.critic, generator=params.generator, **how)
    for network, name in zip((generator, critic), files[1:], strict=True):
        _fill(network, folder / name)
    if "superres" in config:
        networks = [load_superres(folder, name) for name in SUPERRES if name in config]
        generator = Cascaded(generator, *networks).requires_grad_(False).eval()
    return Model(generator, critic, config)


def _require(folder: Path, names: tuple[str, ...], says: str) -> None:
    if missing := [folder / name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{missing[0]}: no such file; {says}")


def read_config(folder: Path, *sections: str) -> dict:
    """config.json of a model folder; raises `InputError` where it is torn, or a section is missing."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{file}: not readable as JSON; it is damaged or was not written to its end") from None
    if not isinstance(config, dict) or (missing := [s for s in sections if s not in config]):
        lacking = missing[0] if isinstance(config, dict) else "everything"
        raise InputError(f"{file}: {lacking} is missing; needed are {', '.join(sections)}")
    return config


def load_superres(folder: str | Path, name: str = SUPERRES[0]) -> SuperResolution:
    """The network of `name`.safetensors in a folder. Raises `InputError` naming what is missing."""
    folder = Path(folder)
    _require(folder, ("config.json", f"{name}.safetensors"), "a super-resolution network is both")
    config = read_config(folder, name)
    network = build_superres(section(SuperRes, config[name], f"{folder / 'config.json'}: {name}"))
    _fill(network, folder / f"{name}.safetensors")
    return network


def _fill(network: torch.nn.Module, file: Path) -> None:
    """Load weights into a network, for use and not for training."""
    try:
        network.load_state_dict(load_file(file), strict=True)
    except (SafetensorError, RuntimeError) as error:
        says = str(error).strip().splitlines()[0]
        raise InputError(f"{file}: not the weights that config.json describes ({says})") from None
    network.requires_grad_(False).eval()


def sampled_code(model: Model, seed: int, truncation: float | None = None, number: int = 0) -> Tensor:
    """The code (1, *style shape) of a sample of a seed."""
    return model.generator.to_styles(model.generator.sample_latent(1, torch_rng(seed, "sample", number)), truncation)


def styles_of(model: Model, wanted: list[int], seed: int) -> Tensor:
    """Styles (n, d) of samples of these classes of a conditional HA-GAN, of its truncation; number i depends on (seed,
    i) alone."""
    own = trunk(model.generator)
    drawn = torch.cat([model.generator.sample_latent(1, torch_rng(seed, "sample", i)) for i in range(len(wanted))])
    texture = drawn[:, own.latent + own.classes :]  # of super-resolution, behind the class
    asked = torch.cat([own.of_class(drawn, torch.tensor(wanted)), texture], 1)
    return model.generator.to_styles(asked, model.how.generator.truncation)


def draw_code(model: Model, code: Tensor, seed: int, stage: int | None = None, number: int = 0) -> np.ndarray:
    """The volume (z, y, x) in [0, 1] of a code (1, *style shape), with the noise of a sample of a seed.

    At a `stage` below the last it is a preview on a coarser grid.
    """
    with torch.inference_mode():
        return model.generator.synthesize(code, stage, noise=torch_rng(seed, "sample noise", number))[0, 0].numpy()


def draw(model: Model, n: int, seed: int, truncation: float | None = None) -> np.ndarray:
    """`n` volumes (n, z, y, x), float32 in [0, 1]. Number i is the same for every n: it depends on (seed, i) alone."""
    codes = (sampled_code(model, seed, truncation, i) for i in range(n))
    return np.stack([draw_code(model, code, seed, number=i) for i, code in enumerate(codes)])


def growth_strip(folder: str | Path, seed: int) -> list[tuple[str, np.ndarray]]:
    """The fixed latents of a training: (what it is, volumes (n, z, y, x)) of every grid, coarsest first: the last that
    was kept of each stage, and the middle of the final ones, drawn by super-resolution with the average texture."""
    stages = {}
    for seen, values in sorted(load_file(Path(folder) / "growth.safetensors").items()):
        stages[values.shape[1]] = (f"after {int(seen)} samples", values.numpy())
    strip = [stages[depth] for depth in sorted(stages)]
    if "superres" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")):
        depth = strip[-1][1].shape[1]
        middle = strip[-1][1][:, (3 * depth) // 8 : -(-5 * depth // 8)]
        strip.append(("middle, super-resolution", enlarge(load_superres(folder), middle, seed)))
    return strip


def enlarge(superres: SuperResolution, given: np.ndarray, seed: int, codes: np.ndarray | None = None) -> np.ndarray:
    """Volumes (n, z, y, x) in [0, 1] drawn finer by the network, with texture codes (n, 5), else the average one."""
    drawn = []
    for i, volume in enumerate(given):
        x = torch.from_numpy(np.asarray(volume, np.float32))[None, None]
        code = None if codes is None else torch.from_numpy(np.asarray(codes[i], np.float32))[None]
        with torch.inference_mode():
            drawn.append(superres.whole(x, code, torch_rng(seed, "enlarge", i))[0, 0].numpy())
    return np.stack(drawn)


def calibrated(values: np.ndarray, data: dict) -> Volume:
    """Intensities (z, y, x) as a volume in mg HA/cm3; `data` is what the model's config.json says of its data."""
    return Volume(to_density(values, data["intensity"]).astype(np.float32), tuple(data["spacing_mm"]), data["unit"])
