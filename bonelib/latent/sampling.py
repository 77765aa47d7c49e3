"""New bones from a model folder, as intensities or as calibrated volumes.

python -m bonelib.latent.sampling MODEL_FOLDER -n N --to FOLDER [--truncation T] [--seed S]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.networks import build_critic, build_generator
from bonelib.params import Train, section
from bonelib.randomness import torch_rng
from bonelib.scans.preprocessing import to_density
from bonelib.scans.tables import write_table
from bonelib.scans.volumes import Volume, write_volume


class Model(NamedTuple):
    """A generator, the critic it was trained against, and what config.json says of both."""

    generator: Any
    critic: Any
    config: dict


def load_model(folder: str | Path) -> Model:
    """Open a model folder. Raises `InputError` naming a missing or damaged file."""
    folder = Path(folder)
    for name in ("config.json", "generator.safetensors", "critic.safetensors"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: no such file; a model folder holds config.json and two safetensors files"
            )
    config = json.loads((folder / "config.json").read_text())
    params = section(Train, config["train"], f"{folder / 'config.json'}: train")
    parts = dict(
        generator=build_generator(params.generator, haar=params.haar, precision=params.precision),
        critic=build_critic(params.critic, haar=params.haar, precision=params.precision),
    )
    for name, network in parts.items():
        try:
            network.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=True)
        except (SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{folder / name}.safetensors: not the weights that config.json describes "
                f"({str(error).strip().splitlines()[0]})"
            ) from None
        network.requires_grad_(False).eval()
    return Model(parts["generator"], parts["critic"], config)


def draw(model: Model, n: int, seed: int, truncation: float | None = None) -> np.ndarray:
    """`n` volumes (n, z, y, x), float32 in [0, 1]. Number i is the same for every n: it depends on (seed, i) alone."""
    volumes = []
    for i in range(n):
        latent = model.generator.sample_latent(1, torch_rng(seed, "sample", i))
        styles = model.generator.to_styles(latent, truncation)
        with torch.inference_mode():
            volumes.append(model.generator.synthesize(styles, noise=torch_rng(seed, "sample noise", i))[0, 0])
    return torch.stack(volumes).numpy()


def calibrated(values: np.ndarray, data: dict) -> Volume:
    """Intensities (z, y, x) as a volume in mg HA/cm3; `data` is what the model's config.json says of its data."""
    return Volume(to_density(values, data["intensity"]).astype(np.float32), tuple(data["spacing_mm"]), data["unit"])


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", type=Path)
    cli.add_argument("-n", type=int, default=8)
    cli.add_argument("--to", type=Path, required=True)
    cli.add_argument("--truncation", type=float)
    cli.add_argument("--seed", type=int, default=1)
    args = cli.parse_args()
    from bonelib.evaluation.morphometry import measure

    try:
        model = load_model(args.model)
        rows = []
        for i, values in enumerate(draw(model, args.n, args.seed, args.truncation)):
            name = f"sample-{args.seed}-{i:04d}.nii.gz"
            volume = calibrated(values, model.config["data"])
            write_volume(volume, args.to / name)
            try:
                traits = {key: f"{value:.5g}" for key, value in measure(volume).items()}
            except InputError as error:
                traits = {"not measured": str(error)}
            rows.append({"file": name, "seed": args.seed, "index": i, **traits})
        write_table(args.to / "morphometry.tsv", rows)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.n} volumes and morphometry.tsv are in {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
