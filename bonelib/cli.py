"""The command `bonelib` (or `python -m bonelib.cli`): sample, measure, import and train."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bonelib import InputError
from bonelib.core.cli import command

USAGE = """bonelib: three-dimensional bone image synthesis

commands
  sample    draw new bones from a model folder, as calibrated NIfTI files with their morphometry
  measure   morphometry of scans: densities in mg HA/cm3, thickness in mm, areas in mm2
  import    bring a folder of scans into one form: mg HA/cm3, one orientation, patients known, headers afresh
  train     train a model of params.yaml on the stacks that the pipeline prepared

`bonelib COMMAND --help` shows examples. The whole pipeline is `make repro` in the repository."""

EXAMPLES = {
    "sample": """examples
  bonelib sample published/progan -n 4 --to my-bones --truncation 1.8
  bonelib sample out/laptop/models/stylegan -n 16 --to my-bones --seed 7
  bonelib sample out/laptop/models/progan --codes edited.safetensors --to edited
""",
    "measure": """examples
  bonelib measure my-bones/sample-1-0000.nii.gz --unit mgHA
  bonelib measure scans/*.AIM --to morphometry.tsv
""",
    "import": """examples
  bonelib import ../my-scans --dry-run
  bonelib import ../my-scans --to cohort --mirror-left
  bonelib import ../my-scans --to cohort --unit mgHA --site tibia
""",
    "train": """examples
  bonelib train laptop progan
  bonelib train laptop stylegan --to my-model --seed 3
  torchrun --standalone --nproc-per-node 2 -m bonelib.training.loop laptop progan
""",
}


def _parser(name: str, says: str) -> argparse.ArgumentParser:
    how = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"bonelib {name}", description=says, epilog=EXAMPLES[name], formatter_class=how)


def sample() -> int:
    from bonelib.latent import sampling

    return sampling.main()


def train() -> int:
    from bonelib.training import loop

    return loop.main()


def measure() -> int:
    """Morphometry of files; what a file lacks is said in its row, and a table of several files goes on without it."""
    from bonelib.evaluation import morphometry
    from bonelib.scans.tables import as_markdown, write_table
    from bonelib.scans.volumes import UNITS, convert, read_volume

    cli = _parser("measure", "Morphometry of scans: areas in mm2, densities in mg HA/cm3, lengths in mm.")
    cli.add_argument("scans", nargs="+", type=Path, help="NIfTI, MetaImage, NRRD, AIM, ISQ, or DICOM")
    cli.add_argument("--unit", choices=UNITS, help="of files whose header says none")
    cli.add_argument("--to", type=Path, help="a table, .tsv or .csv; shown if left out")
    args = cli.parse_args()
    rows, failed = [], 0
    for path in args.scans:
        try:
            volume = convert(read_volume(path, unit=args.unit), "mgHA")
            rows.append({"file": path.name, **morphometry.measure(volume)})
        except InputError as error:
            print(error, file=sys.stderr)
            failed += 1
    if rows and args.to:
        write_table(args.to, rows)
        print(f"{len(rows)} scans are measured in {args.to}")
    elif rows:
        print(as_markdown(rows))
    return 2 if failed else 0


def bring_in() -> int:
    from bonelib.scans import cohort
    from bonelib.scans.listing import SITES, listed, summary
    from bonelib.scans.volumes import UNITS

    cli = _parser("import", "Bring a folder of scans into one form, for the pipeline or for other programs.")
    cli.add_argument("scans", type=Path)
    cli.add_argument("--to", type=Path, help="the folder to be made")
    cli.add_argument("--dry-run", action="store_true", help="say who is who and what is left out, and stop")
    cli.add_argument("--unit", choices=UNITS, help="of files whose header says none")
    cli.add_argument("--participants", help="a table of the patients elsewhere than in the folder")
    cli.add_argument("--site", choices=SITES[1:], default="radius")
    cli.add_argument("--mirror-left", action="store_true", help="make right bones of left ones")
    args = cli.parse_args()
    if args.dry_run:
        print(summary(listed(args.scans, args.participants), most=None))
        return 0
    if args.to is None:
        raise InputError("bonelib import: --to is missing; accepted is a folder to be made, or --dry-run")
    how = dict(mirror_left=args.mirror_left, site=args.site)
    cohort.import_scans(args.scans, args.to, args.unit, args.participants, **how)
    return 0


COMMANDS: dict[str, Callable[[], int]] = {"sample": sample, "measure": measure, "import": bring_in, "train": train}


@command
def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return 0 if len(sys.argv) > 1 else 2
    name = sys.argv[1]
    if name not in COMMANDS:
        print(f"bonelib: {name!r} is no command; accepted are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"bonelib {name}", *sys.argv[2:]]
    if name in ("sample", "train") and {"-h", "--help"} & set(sys.argv):
        print(EXAMPLES[name])  # the module's own help follows
    return COMMANDS[name]()


if __name__ == "__main__":
    sys.exit(main())
