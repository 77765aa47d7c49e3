"""A phantom cohort of HR-pQCT scans of the distal radius whose truth is known."""

import time
from concurrent.futures import as_completed
from pathlib import Path

import bonelib.scans.phantom.population as population
from bonelib import InputError
from bonelib.core.files import whole_folder
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.scans.phantom.motion import moved
from bonelib.scans.phantom.rendering import check_voxel, draw_visit
from bonelib.scans.phantom.scanner import NATIVE_MM, scan
from bonelib.scans.tables import write_table
from bonelib.scans.volumes import Volume, mirrored, write_volume

STILL = (1.0, 0.0, 0.0, 0.0, 0.0)  # shares of the visual grades 1-5 where nothing moves
PROGRESS_S = 10.0


def make_radius(
    seed: int,
    *,
    voxel_mm: float = NATIVE_MM,
    patient: int = 1,
    visit: int = 1,
    course: population.Course = population.COURSE,
    **traits,
) -> tuple[Volume, dict]:
    """True density of one distal radius in mg HA/cm3, before the scanner, and its truth.

    About 10.2 mm of bone (168 slices of .0607 mm) with part of the ulna and soft tissue; the field of view varies.
    `traits` override what is drawn for the patient: names as in `population.TRAITS`, `tb_bmd=105` for Tb.BMD;
    `course` says when visits are, and what changes from one to the next.
    The truth holds the traits asked for (Tt.Ar mm2, Ct.Th, Tb.Th mm, densities mg HA/cm3 as a scan's contour would
    read them) and, under `true_...`, what was drawn. Raises `InputError` for an unknown trait.
    """
    drawn = draw_visit(seed, patient, visit, voxel_mm, course=course, **traits)
    return drawn.volume, drawn.truth


def make_cohort(params, folder: str | Path) -> Path:
    """Write a cohort: `scans/sub-001_ses-1.nii.gz` ..., `participants.tsv` and `scans.tsv` under `folder`.

    `params` has `seed`, `patients`, `visits` (the most) and `voxel_mm`, and may have `scans` (in all; some visits were
    then missed), `grades` (shares of the motion grades 1-5; else all are still), `mirror_left` (left bones are written
    as right ones), `first` (the number of the first patient; else 1) and `workers` (processes; else one a core). A
    scan depends on (seed, patient, visit), the grid and `grades` alone. The folder appears whole or not at all; an
    earlier cohort in its place is replaced, any other folder is refused with an `InputError`.
    """
    folder = Path(folder)
    _check(params, folder)
    visits = population.visits_of(params.seed, params.patients, params.visits, getattr(params, "scans", None))
    visits = {number + getattr(params, "first", 1) - 1: own for number, own in visits.items()}
    how = (params.voxel_mm, getattr(params, "grades", STILL), getattr(params, "mirror_left", False))
    with whole_folder(folder) as part:
        jobs = [(params.seed, p, own, *how, part / "scans") for p, own in visits.items()]
        rows = sorted(_rendered(jobs, getattr(params, "workers", None)), key=lambda row: row["scan"])
        people = [row for row in rows if row["visit"] == 1]
        own = ("patient", "sex", "age", "side", *population.REFERENCE["F"], "marrow")
        table = [{k: row[k] for k in own} | {"visits": len(n)} for row, n in zip(people, visits.values(), strict=True)]
        write_table(part / "participants.tsv", table)
        write_table(part / "scans.tsv", rows)
    return folder


def _rendered(jobs: list, count: int | None):
    """Rows of `scans.tsv` as the scans are done, with a line of progress about every ten seconds."""
    began = last = time.monotonic()
    total, done = sum(len(visits) for _, _, visits, *_ in jobs), 0
    with workers(count) as pool:
        for future in as_completed([pool.submit(_make_visits, *job) for job in jobs]):
            yield from (rows := future.result())
            done, now = done + len(rows), time.monotonic()
            if now - last >= PROGRESS_S or done == total:
                last, rate = now, done / (now - began)
                left = (total - done) / rate
                print(f"cohort: {done}/{total} scans, {rate:.2f} scans/s, {left:.0f} s left", flush=True)


def _make_visits(seed, patient, visits, voxel_mm, grades, mirror_left, folder: Path) -> list[dict]:
    """Draw, scan and write the visits of one patient; their rows of `scans.tsv`."""
    rows = []
    for visit in visits:
        drawn = draw_visit(seed, patient, visit, voxel_mm)
        grade = population.motion_grade(seed, patient, visit, drawn.truth["age"], grades)
        blurred, motion = moved(drawn.volume, numpy_rng(seed, "motion", patient, visit), grade)
        seen = scan(blurred, numpy_rng(seed, "noise", patient, visit), noise_sd=drawn.truth["noise_sd"])
        subject = f"sub-{patient:03d}"
        name = f"{subject}_ses-{visit}"
        mirror = mirror_left and seen.side == "left"
        path = write_volume(mirrored(seen) if mirror else seen, folder / f"{name}.nii.gz")
        row = {"scan": name, "patient": subject, "visit": visit, "file": f"scans/{path.name}", "grade": grade}
        own = {"seed": seed, **drawn.truth, **motion, "mirrored": "yes" if mirror else "no"}
        rows.append(row | own | ({"side": "right"} if mirror else {}))
    return rows


def _check(params, folder: Path) -> None:
    for name in ("patients", "visits", "workers"):
        value = getattr(params, name, 1)
        if not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name} is {value!r}; accepted are whole numbers from 1")
    check_voxel(params.voxel_mm)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "scans.tsv").is_file())):
        raise InputError(f"{folder}: holds something other than a cohort; remove it or name another folder")
