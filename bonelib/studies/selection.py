"""Which of a training's snapshots is kept: the one whose samples are nearest to bones of patients set apart.

python -m bonelib.studies.selection MODEL_FOLDER --stacks DIR --grades FILE [--seed N]

measures the candidates that a training left in its model folder, and keeps the best. The pipeline does so by itself.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import read_params
from bonelib.core.files import digest, write_json
from bonelib.core.random import numpy_rng
from bonelib.evaluation.features import random3d
from bonelib.evaluation.metrics import kernel_distance
from bonelib.evaluation.statistics import half_interval, of_rows
from bonelib.latent.models import Model, draw
from bonelib.networks.registry import build_generator
from bonelib.scans.dataset import Stacks, load_stacks, set_apart
from bonelib.scans.tables import as_markdown, read_table, write_table
from bonelib.training.config import training_section

NAME = "kernel distance, random3d"
TABLE = ("seen", "chosen", NAME, "low", "high", "real against real", "N real", "patients", "N samples")


def choose(folder: str | Path, data: Stacks, *, seed: int) -> list[dict]:
    """Make the best of a model folder's candidates its generator.safetensors; returns the table of what each measured.

    The last one stays, unless the nearest one's interval ends below its distance: the kernel distance of samples of the
    same latents to the stacks of validation patients, whom the training did not see, on the grid that the generator
    itself draws. Features are standardised by those of as many training stacks, whose own distance is `real against
    real`. No held-out patient is looked at, so that later notebooks can report on them.

    Leaves candidates.csv, and in config.json the samples that the chosen one had seen; the candidates themselves go.
    Raises `InputError` where there are none.
    """
    folder = Path(folder)
    paths = sorted((folder / "candidates").glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder / 'candidates'}: no candidates; they are left by a training with snapshots")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    params = training_section(config["train"], "train", str(folder / "config.json"))
    how, data = params.snapshots, set_apart(data, params.snapshots.validation)

    generator = build_generator(params.generator, haar=params.haar, precision=params.precision).requires_grad_(False)
    drawn = {}
    for path in paths:
        generator.load_state_dict(load_file(path))
        drawn[int(path.stem)] = draw(Model(generator, None, config), how.samples, seed)
    depth = next(iter(drawn.values())).shape[1]
    rows = data.of("validation")
    real = _pooled(data, rows, depth)
    train = data.of("train")
    picked = numpy_rng(seed, "reference").permutation(len(train))[: how.samples]
    other = _pooled(data, [train[i] for i in picked], depth)

    sets = [random3d(volumes) for volumes in (real, other, *drawn.values())]
    mean, sd = sets[1].mean(axis=0), sets[1].std(axis=0) + 1e-9  # so that no feature rules by its unit
    a, c, *found = [(features - mean) / sd for features in sets]
    patients = [row["patient"] for row in rows]
    table = []
    for seen, b in zip(drawn, found, strict=True):
        distance, rng = of_rows(kernel_distance, a, b), numpy_rng(seed, "interval", "candidates")
        ends = half_interval(distance, patients, range(len(b)), rng=rng, draws=how.draws)[:3]
        values = (seen, False, *ends, kernel_distance(a, c), len(a), len(set(patients)), len(b))
        table.append(dict(zip(TABLE, values, strict=True)))
    # The last one has seen most, and by the rate's fall is the least noisy: it stays unless another is surely nearer
    best, last = min(table, key=lambda row: row[NAME]), table[-1]
    best = last if best["high"] is not None and best["high"] >= last[NAME] else best
    best["chosen"] = True
    write_table(folder / "candidates.csv", table)
    os.replace(paths[table.index(best)], folder / "generator.safetensors")
    config |= {"seen": best["seen"]}
    config["sha256"]["generator"] = digest(folder / "generator.safetensors")
    write_json(folder / "config.json", config)
    shutil.rmtree(folder / "candidates")
    return table


def select(trained: str | Path, folder: str | Path, data: Stacks, *, seed: int) -> list[dict]:
    """Copy a trained model to `folder` and `choose` there among its snapshots; the table, empty where none are kept."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder)
    if (Path(folder) / "candidates").is_dir():
        choose(folder, data, seed=seed)
    return measured(folder)


def measured(folder: str | Path) -> list[dict]:
    """The table that `choose` left in a model folder, as it returned it; empty where nothing was chosen."""
    path = Path(folder) / "candidates.csv"
    rows = read_table(path) if path.is_file() else []
    return [{key: json.loads(value.lower()) if value else None for key, value in row.items()} for row in rows]


def _pooled(data: Stacks, rows: list[dict], depth: int) -> np.ndarray:
    """The stacks of `rows` on the grid of `depth` slices, (n, z, y, x) in [0, 1]."""
    halvings = (data.meta["stack_slices"] // depth).bit_length() - 1
    return data.pooled(rows, halvings)[:, 0].float().numpy()


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("--stacks", type=Path, required=True)
    cli.add_argument("--grades", type=Path, required=True)
    cli.add_argument("--seed", type=int, help="that of params.yaml")
    args = cli.parse_args()
    seed = read_params()["seed"] if args.seed is None else args.seed
    print(as_markdown(choose(args.folder, load_stacks(args.stacks, args.grades), seed=seed)))


if __name__ == "__main__":
    sys.exit(main())
