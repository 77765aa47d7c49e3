"""The cohort stage: a phantom cohort, or one's own scans brought into the same shape.

python -m bonelib.scans.cohort STAGE FOLDER               as a stage of the pipeline
python -m bonelib.scans.cohort SCANS --dry-run            prints who is who in a folder of scans, and does nothing else
"""

import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import section
from bonelib.core.files import of_file, whole_folder
from bonelib.core.parallel import die_with_run, elapsed
from bonelib.scans import given, plausibility
from bonelib.scans.config import Cohort, Phantom
from bonelib.scans.grids import Calibration
from bonelib.scans.listing import SITES, Listing, listed, summary
from bonelib.scans.tables import write_table
from bonelib.scans.volumes import Volume, convert, mirrored, oriented, read_volume, upside_down, write_volume

PHANTOM = "bonelib/scans/phantom"  # what cohort.source begins with where the scans are to be drawn
LEAST_PATIENTS = 6  # with two of them held out, the rest can still be split for training and choosing
SAY_EVERY = 20
BLOCKS, SAME_MGHA = (8, 16, 16), 0.5  # means over so many blocks of two scans differ by more, if only by their noise


class How(NamedTuple):
    """What `import_scans` was told for all scans."""

    unit: str | None
    calibration: Calibration | None
    mirror_left: bool
    site: str


def list_scans(source: str | Path) -> list[dict[str, str]]:
    """The scans of a folder as rows (file, patient, visit, grade, side ...), see `listing.listed`."""
    return listed(Path(source)).rows


def import_scans(
    source: str | Path,
    folder: str | Path,
    unit: str | None = None,
    participants: str | None = None,
    say=print,
    *,
    calibration: Calibration | None = None,
    mirror_left: bool = False,
    site: str = "radius",
    least: int = 1,
) -> None:
    """Bring the scans of `source` into `folder` as the phantom cohort lies there: scans/, scans.tsv, participants.tsv.

    Scans are converted to mg HA/cm3 and brought to one orientation, x to the right, y forwards, z upwards with the
    distal end first; `unit` and `calibration` are for files that carry none. With `mirror_left`, all bones become right
    ones. Contours and traits of the user's own follow (`given`). Headers are written afresh, so that names and dates
    stay behind. A scan with something wrong (`plausibility.FLAGS`) is kept with the column `flags`, for no training.

    The folder appears whole or not at all. Raises `InputError`, naming the file: a scan that cannot be read or
    converted, whose numbers cannot be densities, whose bone is not `site`, runs along another axis or is upside-down,
    whose side is contradictory, or unknown where it is needed; a scan that is there under two patients; and fewer than
    `least` patients.
    """
    source, folder = Path(source), Path(folder)
    listing = listed(source, participants)
    say(summary(listing), flush=True)
    _check_patients(listing, source, least)
    how = How(unit, calibration, mirror_left, site)
    names: dict[str, str] = {}
    with whole_folder(folder) as part:
        scans = _imported(source, part, listing, how, say, names)
        if least > 1:
            usable = {s["patient"] for s in scans if not s["flags"]}
            _enough(len(usable), least, f"{source}: {len(usable)} patients have a scan without flags")
        write_table(part / "scans.tsv", scans)
        people = [listing.people.get(p, {}) | {"patient": f"sub-{n:03d}"} for p, n in _numbers(listing).items()]
        write_table(part / "participants.tsv", people)
        given.import_traits(source, names, part / given.TRAITS_FILE, say)


def _check_patients(listing: Listing, source: Path, least: int) -> None:
    count = len({row["patient"] for row in listing.rows})
    _enough(count, least, f"{source}: {len(listing.rows)} scans of {count} patients")


def _enough(count: int, least: int, says: str) -> None:
    if count < least:
        tells = "a scans.tsv (file, patient) says who is who"
        raise InputError(f"{says}, but at least {least} patients are needed; {tells}")


def _numbers(listing: Listing) -> dict[str, int]:
    return {patient: i + 1 for i, patient in enumerate(sorted({row["patient"] for row in listing.rows}))}


def _imported(source: Path, part: Path, listing: Listing, how: How, say, names: dict[str, str]) -> list[dict]:
    """Read, check and write every scan; the rows of the cohort's scans.tsv. `names` gets {file: scan}."""
    number, visits = _numbers(listing), _visits(listing)
    scans, seen, parts, owners, ends = [], defaultdict(list), defaultdict(list), defaultdict(dict), Counter()
    sided: dict[bool, str] = {}  # a file that tells the side of the body, and one that does not
    for i, row in enumerate(listing.rows):
        file, patient = row["file"], row["patient"]
        name = f"sub-{number[patient]:03d}_scan-{i + 1:03d}"
        volume = read_volume(source / file, unit=how.unit, calibration=how.calibration, fallback=True)
        if plausibility.is_mask(volume):
            say(f"{file}: holds two values, taken for a mask and not for a scan", flush=True)
            continue
        masks = listing.masks.get(file, [])
        volume, left, wrong, end = _import(source / file, volume, row, masks, how, say, part, name)
        names[file] = name
        ends[end] += 1
        sided.setdefault(bool(volume.side), file)
        if how.mirror_left and len(sided) > 1:
            raise InputError(
                f"{source / sided[False]}: mirror_left needs the side of the body, which other scans tell; give "
                "scans.tsv a column side (left or right), or set cohort.mirror_left to false"
            )
        for first in _again(volume, row, seen):
            if first["patient"] != patient:
                says = f"the same voxels as {first['file']}, but of {patient!r} and not of {first['patient']!r}"
                raise InputError(f"{source / file}: {says}; a scan is of one patient")
            say(f"{file}: the same voxels as {first['file']}, of the same patient", flush=True)
        _check_parts(source / file, volume, parts)
        if volume.owner:
            owners[volume.owner].setdefault(patient, file)
        if wrong:
            say(f"{file}: {', '.join(plausibility.FLAGS[w] for w in wrong)}; left out of training", flush=True)
        write_volume(volume, part / "scans" / f"{name}.nii.gz")
        known = dict(scan=name, patient=f"sub-{number[patient]:03d}", visit=visits[patient, row["visit"]])
        known |= dict(file=f"scans/{name}.nii.gz", grade=row["grade"], side=volume.side or "", site=volume.site or "")
        scans.append(known | dict(mirrored="yes" if left else "no", flags=" ".join(wrong)))
        if (i + 1) % SAY_EVERY == 0 or i + 1 == len(listing.rows):
            say(f"imported {i + 1} of {len(listing.rows)} scans", flush=True)
    if not scans:
        raise InputError(f"{source}: all of its {len(listing.rows)} scans hold two values, as masks do")
    _check_owners(owners, listing.people)
    if how.mirror_left and True not in sided:
        say(f"none of {len(scans)} scans tells the side of the body; none is mirrored", flush=True)
    if ends["unknown"]:
        says = "the shape of the bone does not tell which end of z is distal; it is taken to be the first"
        say(f"{ends['unknown']} of {len(scans)} scans: {says}", flush=True)
    return scans


def _visits(listing: Listing) -> dict[tuple[str, str], str]:
    """{(patient, visit): its name}: numbers are kept, and others, which may be dates, are numbered in their order."""
    named = defaultdict(set)
    for row in listing.rows:
        named[row["patient"]].add(row["visit"])
    plain = {p: all(v.isdecimal() and len(v) < 4 for v in visits) for p, visits in named.items()}
    return {(p, v): v if plain[p] else str(i) for p, visits in named.items() for i, v in enumerate(sorted(visits), 1)}


def _again(volume: Volume, row: dict, seen: dict[tuple, list]) -> list[dict]:
    """The earlier rows of `seen` with the same voxels, whatever the format, unit and orientation they came in.

    Means over blocks are compared, so that numbers that another unit has rounded differently are the same, too.
    """
    blocks = [np.array_split(np.arange(n), min(n, most)) for n, most in zip(volume.shape, BLOCKS, strict=True)]
    edges = [[int(part[0]) for part in axis] for axis in blocks]
    means = np.stack([volume.voxels[part].mean(axis=0, dtype=np.float64) for part in blocks[0]])
    for axis in (1, 2):
        means = np.add.reduceat(means, edges[axis], axis) / np.expand_dims([len(b) for b in blocks[axis]], 2 - axis)
    before = [first for other, first in seen[volume.shape] if np.abs(other - means).max() < SAME_MGHA]
    seen[volume.shape].append((means.astype(np.float32), row))
    return before


def _check_parts(path: Path, volume: Volume, seen: dict[str, list]) -> None:
    """Refuse a DICOM series whose slices go on where those of another folder end."""
    first, step = float(volume.affine[2, 3]), volume.spacing[0]
    last = first + step * len(volume.voxels)
    for other, low, high in seen[volume.series] if volume.series else ():
        if min(abs(first - high), abs(last - low)) < step / 2:
            raise InputError(f"{path}: goes on the series of {other}; put the slices of a series into one folder")
    seen[volume.series].append((path, first, last))


def _check_owners(owners: dict[str, dict[str, str]], people: dict) -> None:
    """Refuse files of one patient by their headers that were taken for two; one number for all is a placeholder."""
    for files in owners.values() if len(owners) > 1 else ():
        if len(files) > 1 and not set(files) <= set(people):
            (one, first), (other, second), *_ = files.items()
            says = f"{first} and {second} have one patient's number in their headers, but are of {one!r} and {other!r}"
            raise InputError(f"{says}; say in a scans.tsv who is who, or list both in participants.tsv if they are two")


def _import(path: Path, volume: Volume, row: dict, masks: list[Path], how: How, say, part: Path, name: str):
    """The scan of a row in mg HA/cm3, whether it was mirrored, its flags, and which end was found distal."""
    volume = replace(volume, **{key: _agreed(path, key, getattr(volume, key), row[key]) for key in ("side", "site")})
    if volume.site and volume.site != how.site:
        mend = f"take it out, or set cohort.site to {volume.site}" if volume.site in SITES else "take it out"
        raise InputError(f"{path}: the bone is {volume.site}, but the cohort is of the {how.site}; {mend}")
    try:
        volume = convert(oriented(volume), "mgHA")
    except InputError as error:
        raise InputError(f"{path}: {error}; cohort.calibration in params.yaml gives it to scans without") from None
    seen = plausibility.picture(volume)
    with of_file(path):
        plausibility.check_densities(volume, seen)
        plausibility.check_axis(seen)
        end = plausibility.distal_end(seen)
        if end == "last" and not row["distal"]:
            raise InputError(
                "the bone is wider and its cortex thinner at the last slice, so that z does not run from distal to "
                "proximal; give scans.tsv a column distal (first or last: the slice at the distal end)"
            )
    wrong = plausibility.flags(seen.density, seen.bone, seen.spacing)
    labels = given.contour_labels(volume, masks, say)
    turns = [upside_down] if row["distal"] == "last" else []
    left = how.mirror_left and volume.side == "left"
    turns += [mirrored] if left else []
    for turn in turns:
        volume, labels = turn(volume), labels and turn(labels)
    if labels:
        write_volume(labels, part / given.contours_file(name))
    return volume, left, wrong, row["distal"] or end or "unknown"


def _agreed(path: Path, what: str, header: str | None, said: str) -> str | None:
    """What the header or the table says of the `what` of a scan; raises `InputError` where they contradict."""
    if header and said and header != said:
        raise InputError(f"{path}: the header says that the {what} is {header}, but its name or scans.tsv says {said}")
    return header or said or None


def check_source(source: str) -> bool:
    """Whether cohort.source names a folder of scans, and not the phantom generator; raises `InputError` for else."""
    if source.startswith(PHANTOM):
        return False
    if not Path(source).is_dir():
        kind = "a file" if Path(source).exists() else "not there"
        raise InputError(f"cohort.source: {source} is {kind}; accepted are a folder of scans, unpacked, and {PHANTOM}")
    return True


def check_own_scans(cohort: Cohort) -> None:
    """Refuse at once a cohort that cannot be imported, by the names of its files; raises `InputError`."""
    if check_source(cohort.source):
        _check_patients(listed(Path(cohort.source), cohort.participants), Path(cohort.source), LEAST_PATIENTS)


@command
def main() -> None:
    die_with_run()
    if "--dry-run" in sys.argv:
        folders = [a for a in sys.argv[1:] if a != "--dry-run"]
        if len(folders) != 1:
            raise InputError("--dry-run takes one folder of scans: python -m bonelib.scans.cohort SCANS --dry-run")
        print(summary(listed(Path(folders[0])), most=None))
        return
    from bonelib.nb import stage_params

    stage, folder = sys.argv[1:]
    _make(stage_params(stage), folder)
    print(f"{stage}: took {elapsed():.0f} s", flush=True)


def _make(values: dict, folder: str) -> None:
    how = section(Cohort, values["cohort"], "cohort")
    if check_source(how.source):
        known = Calibration(**how.calibration.model_dump()) if how.calibration else None
        own = dict(calibration=known, mirror_left=how.mirror_left, site=how.site, least=LEAST_PATIENTS)
        import_scans(how.source, folder, how.unit, how.participants, **own)
    else:
        from bonelib.scans.phantom import make_cohort

        size = section(Phantom, values["phantom"], "phantom")
        own = {"seed": values["seed"], "voxel_mm": values["voxel_mm"], "mirror_left": how.mirror_left}
        make_cohort(SimpleNamespace(**own, **size.model_dump()), folder)


if __name__ == "__main__":
    sys.exit(main())
