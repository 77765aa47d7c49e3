"""The cohort stage: a phantom cohort, or one's own scans brought into the same shape.

python -m bonelib.scans.cohort STAGE FOLDER
"""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from bonelib import InputError
from bonelib.core.parallel import die_with_parent
from bonelib.params import Cohort, Phantom, section
from bonelib.scans.formats import ENDINGS
from bonelib.scans.tables import read_table, write_table
from bonelib.scans.volumes import (
    Calibration,
    convert,
    is_scan,
    mirrored,
    read_volume,
    right_handed,
    write_volume,
)

SIDES = {"": None, "l": "left", "left": "left", "r": "right", "right": "right"}
GRADES = ("", "1", "2", "3", "4", "5")  # motion grades; empty is not graded


def list_scans(source: Path) -> list[dict[str, str]]:
    """The scans of a folder as rows (file, patient, visit, grade, side).

    A scans.tsv in the folder says which file belongs to whom; without one, names like sub-07_ses-2.nii.gz do, and
    otherwise every file counts as a patient of its own. A folder of .dcm files is one scan, under its own name.
    Raises `InputError` for a folder without scans, a table without the needed columns, a grade or a side that is
    none, and a scan listed twice.
    """
    if (source / "scans.tsv").is_file():
        rows = read_table(source / "scans.tsv")
        missing = {"file", "patient"} - set(rows[0] if rows else {})
        if missing:
            raise InputError(
                f"{source / 'scans.tsv'}: the column {sorted(missing)[0]!r} is missing; needed are file and patient"
            )
    else:
        rows = []
        for path in sorted(p for p in [source, *source.rglob("*")] if is_scan(p) and p.suffix.lower() != ".dcm"):
            name = re.match(r"sub-([^_]+)(?:_ses-([^_.]+))?", path.name)
            patient, visit = name.groups() if name else (path.name.split(".")[0], None)
            rows.append(dict(file=str(path.relative_to(source)), patient=patient, visit=visit or "1"))
    if not rows:
        raise InputError(f"{source}: no scans found; accepted are {', '.join(ENDINGS)}, and folders of .dcm")
    seen = set()
    for row in rows:
        if row["file"] in seen:
            raise InputError(f"{source / 'scans.tsv'}: {row['file']} is listed twice")
        seen.add(row["file"])
        if (row.get("grade") or "") not in GRADES:
            raise InputError(
                f"{source / 'scans.tsv'}: grade {row['grade']!r} of {row['file']}; accepted are 1 to 5 or none"
            )
        if (row.get("side") or "").lower() not in SIDES:
            raise InputError(
                f"{source / 'scans.tsv'}: side {row['side']!r} of {row['file']}; accepted are left, right or none"
            )
    return rows


def import_scans(
    source: str | Path,
    folder: str | Path,
    unit: str | None = None,
    participants: str | None = None,
    say=print,
    *,
    calibration: Calibration | None = None,
    mirror_left: bool = False,
) -> None:
    """Bring the scans of `source` into `folder` as the phantom cohort lies there: scans/, scans.tsv, participants.tsv.

    They are converted to mg HA/cm3; `unit` and `calibration` are for files that carry none. With `mirror_left`, all
    bones become right ones. Headers are written afresh, so that names and dates in them stay behind. The folder
    appears whole or not at all. Raises `InputError`, naming the file, for a scan that cannot be read or converted,
    and one whose side is contradictory, or unknown where it is needed.
    """
    source, folder = Path(source), Path(folder)
    part = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        rows = list_scans(source)
        people = {row["patient"]: row for row in _participants(source, participants)}
        patients = sorted({row["patient"] for row in rows})
        number = {patient: i + 1 for i, patient in enumerate(patients)}
        scans = []
        for i, row in enumerate(rows):
            name = f"sub-{number[row['patient']]:03d}_scan-{i + 1:03d}"
            volume, left = _import(source / row["file"], row, unit, calibration, mirror_left)
            write_volume(volume, part / "scans" / f"{name}.nii.gz")
            scans.append(
                dict(
                    scan=name,
                    patient=f"sub-{number[row['patient']]:03d}",
                    visit=row.get("visit") or "1",
                    file=f"scans/{name}.nii.gz",
                    grade=row.get("grade") or "",
                    side=volume.side or "",
                    mirrored="yes" if left else "no",
                )
            )
            if (i + 1) % 20 == 0 or i + 1 == len(rows):
                say(f"imported {i + 1} of {len(rows)} scans", flush=True)
        write_table(part / "scans.tsv", scans)
        write_table(
            part / "participants.tsv",
            [
                {
                    **{k: v for k, v in people.get(p, {}).items() if k in ("sex", "age")},
                    "patient": f"sub-{number[p]:03d}",
                }
                for p in patients
            ],
        )
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _import(path: Path, row: dict, unit: str | None, calibration: Calibration | None, mirror_left: bool):
    """The scan of a row in mg HA/cm3, and whether it was mirrored."""
    volume = read_volume(path, unit=unit, calibration=calibration, fallback=True)
    side = SIDES[(row.get("side") or "").lower()]
    if side and volume.side and side != volume.side:
        raise InputError(f"{path}: the header says that the side is {volume.side}, but scans.tsv says {side}")
    volume = replace(volume, side=side or volume.side)
    if mirror_left and not volume.side:
        raise InputError(
            f"{path}: mirror_left needs the side of the body; give scans.tsv a column side (left or right), "
            "or set cohort.mirror_left to false"
        )
    try:
        volume = convert(volume, "mgHA")
    except InputError as error:
        raise InputError(f"{path}: {error}; cohort.calibration in params.yaml gives it to scans without") from None
    left = mirror_left and volume.side == "left"
    if mirror_left:
        volume = right_handed(volume)
    return (mirrored(volume) if left else volume), left


def _participants(source: Path, table: str | None) -> list[dict[str, str]]:
    path = Path(table) if table else source / "participants.tsv"
    if not table and not path.is_file():
        return []
    rows = read_table(path)
    if rows and "patient" not in rows[0]:
        raise InputError(f"{path}: the column 'patient' is missing; accepted are patient, sex and age")
    return rows


def main() -> int:
    die_with_parent()
    from bonelib.nb import stage_params

    stage, folder = sys.argv[1:]
    try:
        values = stage_params(stage)
        source = section(Cohort, values["cohort"], "cohort")
        if Path(source.source).is_dir():
            known = Calibration(**source.calibration.model_dump()) if source.calibration else None
            import_scans(
                source.source,
                folder,
                source.unit,
                source.participants,
                calibration=known,
                mirror_left=source.mirror_left,
            )
        else:
            from bonelib.scans.phantom import make_cohort

            size = section(Phantom, values["phantom"], "phantom")
            own = {"seed": values["seed"], "voxel_mm": values["voxel_mm"], "mirror_left": source.mirror_left}
            make_cohort(SimpleNamespace(**own, **size.model_dump()), folder)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
