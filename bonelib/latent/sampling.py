"""New bones from a model folder, written as calibrated volumes with their morphometry.

python -m bonelib.latent.sampling MODEL_FOLDER -n N --to FOLDER [--truncation T] [--seed S]
python -m bonelib.latent.sampling MODEL_FOLDER --codes FILE --to FOLDER [--seed S]

The second form draws codes that were edited, mixed or found by inversion: a safetensors file with a tensor `codes`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.parallel import workers
from bonelib.evaluation.morphometry import measure
from bonelib.latent.models import Model, calibrated, draw, draw_code, load_model, sampled_code
from bonelib.scans.tables import write_table
from bonelib.scans.volumes import write_volume


def setting(model: str, truncation: float | None) -> str:
    """The name of a setting; without truncation, that of the model."""
    return model if truncation is None else f"{model} {truncation:g}"


def draw_settings(
    folders: dict[str, str], wanted: dict[tuple[str, float | None], int], seed: int
) -> dict[str, np.ndarray]:
    """The first samples of `seed` of every setting: {setting: volumes (n, z, y, x)}, float16 as real stacks are.

    `folders` holds each model's, `wanted` is {(model, truncation): n}. Settings are drawn side by side.
    """
    with workers() as pool:
        by_size = sorted(wanted.items(), key=lambda item: -item[1])  # the longest first
        jobs = {key: pool.submit(_drawn, str(folders[key[0]]), n, seed, key[1]) for key, n in by_size}
        return {setting(*key): jobs[key].result() for key in wanted}


def _drawn(folder, n, seed, truncation):
    return draw(load_model(folder), n, seed, truncation).astype(np.float16)


def write_samples(model: Model, volumes: np.ndarray, folder: str | Path, name: str, seed: int) -> list[Path]:
    """Volumes (n, z, y, x) in [0, 1] as calibrated NIfTI files `name`-0000.nii.gz and so on, and morphometry.tsv."""
    folder, rows = Path(folder), []
    for i, values in enumerate(volumes):
        volume = calibrated(values, model.config["data"])
        file = write_volume(volume, folder / f"{name}-{i:04d}.nii.gz")
        try:
            traits = {key: f"{value:.5g}" for key, value in measure(volume).items()}
        except InputError as error:
            traits = {"not measured": str(error)}
        rows.append({"file": file.name, "seed": seed, "index": i, **traits})
    write_table(folder / "morphometry.tsv", rows)
    return [folder / row["file"] for row in rows]


def read_codes(path: str | Path, shape: tuple[int, ...]) -> Tensor:
    """The codes (n, *shape) of a safetensors file, float32. Raises `InputError` where there are none of this shape."""
    try:
        codes = load_file(path)["codes"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: no codes ({error}); accepted is a safetensors file with a tensor codes") from None
    if not len(codes) or tuple(codes.shape[1:]) != tuple(shape):
        found, wanted = (" x ".join(map(str, s)) for s in (codes.shape, ("n", *shape)))
        raise InputError(f"{path}: the codes are {found} numbers; this model accepts {wanted}")
    if not codes.isfinite().all():
        raise InputError(f"{path}: some codes are NaN or infinite; every one must be a number")
    return codes


def _check(args) -> None:
    if args.n < 1:
        raise InputError(f"-n is {args.n}; accepted are whole numbers from 1")
    if args.truncation is not None and not np.isfinite(args.truncation):
        raise InputError(f"--truncation is {args.truncation}; accepted are numbers")
    if any(part.exists() and not part.is_dir() for part in (args.to, *args.to.parents)):
        raise InputError(f"--to: {args.to} is a file, or lies below one; accepted is a folder")


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", type=Path)
    cli.add_argument("-n", type=int, default=8)
    cli.add_argument("--codes", type=Path)
    cli.add_argument("--to", type=Path, required=True)
    cli.add_argument("--truncation", type=float)
    cli.add_argument("--seed", type=int, default=1)
    args = cli.parse_args()
    _check(args)
    model = load_model(args.model)
    if args.codes:
        codes = read_codes(args.codes, sampled_code(model, args.seed).shape[1:])
        volumes = [draw_code(model, code[None], args.seed) for code in codes]
        files = write_samples(model, volumes, args.to, args.codes.stem, args.seed)
    else:
        volumes = draw(model, args.n, args.seed, args.truncation)
        files = write_samples(model, volumes, args.to, f"sample-{args.seed}", args.seed)
    print(f"{len(files)} volumes and morphometry.tsv are in {args.to}")


if __name__ == "__main__":
    sys.exit(main())
