"""New bones from a model folder, written as calibrated volumes with their morphometry.

python -m bonelib.latent.sampling MODEL_FOLDER -n N --to FOLDER [--truncation T] [--seed S]
"""

import argparse
import sys
from pathlib import Path

from bonelib import InputError
from bonelib.evaluation.morphometry import measure
from bonelib.latent.models import calibrated, draw, load_model
from bonelib.scans.tables import write_table
from bonelib.scans.volumes import write_volume


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", type=Path)
    cli.add_argument("-n", type=int, default=8)
    cli.add_argument("--to", type=Path, required=True)
    cli.add_argument("--truncation", type=float)
    cli.add_argument("--seed", type=int, default=1)
    args = cli.parse_args()
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
