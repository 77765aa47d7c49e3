"""What a folder of scans holds, before any voxel is read: which files are scans, masks, tables, and whose they are."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from bonelib import InputError
from bonelib.scans import identity
from bonelib.scans.dicom import NO_DICOM, dicom_files, frames
from bonelib.scans.formats import ENDINGS, format_of
from bonelib.scans.grids import plain_name, version
from bonelib.scans.tables import TABLE, find_table, read_user_table

GRADES = ("", "1", "2", "3", "4", "5")  # motion grades; empty is not graded
SITES = ("", "radius", "tibia")
DISTAL = ("", "first", "last")
SCANS = ("file", "patient", "visit", "grade", "side", "site", "distal")
PEOPLE = ("patient", "sex", "age")
SEXES = {"": "", "f": "F", "female": "F", "w": "F", "m": "M", "male": "M", "o": "", "other": ""}
MASK = re.compile(
    r"(?:^|[_\-. ])(?:masks?|segm?|segmentations?|labels?(?:tr|ts)?|labelmaps?|contours?|roi|gobj)(?=$|[_\-. \d])",
    re.IGNORECASE,
)
DERIVED = ("derivatives", "sourcedata", "code")  # of BIDS: what scans were made of, or into
SHOWN = 30  # patients of a table that is printed


class Listing(NamedTuple):
    """`rows` of `SCANS`, `masks` {file of a scan: paths}, `people` {patient: row of participants.tsv}, `notes` of what
    was left out and why."""

    rows: list[dict[str, str]]
    masks: dict[str, list[Path]]
    people: dict[str, dict[str, str]]
    notes: list[str]


def listed(source: Path, participants: str | None = None) -> Listing:
    """Who is who in a folder: scans.tsv and participants.tsv (or .csv) where they are, else the paths (`identity`).

    Raises `InputError`, naming file, row or column, for a folder without scans and for whatever could mix up patients.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; cohort.source names the folder of the scans, unpacked")
    notes: list[str] = []
    scans, masks, skipped = _walk(source)

    def say(text, flush=True):
        notes.append(text)

    table = find_table(source, "scans")
    rows = _from_table(source, table, scans, notes, say) if table else _from_paths(source, scans)
    if not rows:
        kinds = f"accepted are {', '.join(ENDINGS)}, and folders of DICOM"
        raise InputError(f"{source}: no scans found{_counted(skipped, '; there are ')}; {kinds}")
    people = _people(source, participants, say)
    patients = sorted({row["patient"] for row in rows})
    identity.check_names(patients, list(people))
    found = identity.matched(patients, list(people))
    notes += [f"participants: {name!r} is taken for patient {p!r}" for name, p in found.items() if name != p]
    if stray := [name for name in people if name not in found]:
        notes.append(f"participants: {len(stray)} match no scan: {', '.join(map(repr, stray[:5]))}")
    known = {patient: people[name] for name, patient in found.items()}
    if people and (lacking := [p for p in patients if p not in known]):
        notes.append(f"participants: {len(lacking)} patients are not in the table: {', '.join(map(repr, lacking[:5]))}")
    if skipped:
        notes.append(f"not read:{_counted(skipped, ' ')}")
    return Listing(rows, _of_scans(source, masks, rows, notes), known, notes)


def summary(listing: Listing, most: int | None = SHOWN) -> str:
    """What was understood, as text: a row a patient with visits and files, at most `most` of them, then the notes."""
    visits = defaultdict(Counter)
    for row in listing.rows:
        visits[row["patient"]][row["visit"]] += 1
    width = max(7, *(len(p) for p in visits))
    lines = [f"{len(listing.rows)} scans of {len(visits)} patients", f"{'patient':{width}}  visits (files)"]
    for patient, counts in list(visits.items())[:most]:
        lines.append(f"{patient:{width}}  " + ", ".join(f"{v} ({n})" for v, n in sorted(counts.items())))
    if most and len(visits) > most:
        lines.append(f"and {len(visits) - most} more")
    return "\n".join([*lines, *listing.notes])


def _walk(source: Path) -> tuple[list[Path], list[Path], Counter]:
    """Paths of scans and of masks below a folder, and what else is there, counted by kind. Links are followed once."""
    scans, masks, skipped, seen = [], [], Counter(), set()
    bids = (source / "dataset_description.json").is_file()
    for top, folders, names in os.walk(source, followlinks=True, onerror=_unreadable):
        here = Path(top)
        real = here.resolve()
        for name in DERIVED if bids and here == source else ():
            if name in folders:
                folders.remove(name)
                skipped[f"BIDS folder {name}"] += 1
        hidden = [f for f in folders if f.startswith(".") or f == "__MACOSX"]
        folders[:] = sorted(f for f in folders if f not in hidden) if real not in seen else []
        if real in seen:
            skipped[f"folder that is a link to another one ({here.relative_to(source)})"] += 1
            continue
        seen.add(real)
        skipped["hidden"] += len(hidden)
        slices = dicom_files(here)
        whole = _multi_frame(slices)
        if len(slices) > len(whole):
            (masks if _of_masks(here.relative_to(source).parts) else scans).append(here)
        others = _newest([here / n for n in sorted(names) if here / n not in slices], skipped)
        for path in [*whole, *others]:
            if path.name.startswith("."):
                skipped["hidden"] += 1
            elif not path.exists():
                skipped["links to nothing"] += 1
            elif format_of(path) and not _of_masks((*path.relative_to(source).parts[:-1], _stem(path))):
                scans.append(path)
            elif format_of(path) or path.suffix.lower() == ".gobj":
                masks.append(path)
            elif not re.fullmatch(TABLE.format("scans|participants|attributes"), path.name) or here != source:
                skipped[path.suffix.lower() or path.name] += 1
    return sorted(scans), sorted(masks), +skipped


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or take it out")


def _of_masks(parts: tuple[str, ...]) -> bool:
    return any(MASK.search(part) for part in parts)


def _multi_frame(slices: list[Path]) -> list[Path]:
    """Of the DICOM files of a folder those that hold several frames, each a scan of its own."""
    if not slices or frames(max(slices, key=lambda p: p.stat().st_size)) < 2:
        return []
    return [path for path in slices if frames(path) > 1]


def _newest(paths: list[Path], skipped: Counter) -> list[Path]:
    """Of files that VMS numbered (A.AIM;1, A.AIM;2) the last of each name."""
    last: dict[str, Path] = {}
    for path in sorted(paths, key=version):
        if plain_name(path) in last:
            skipped["older versions"] += 1
        last[plain_name(path)] = path
    return list(last.values())


def _stem(path: Path) -> str:
    """The name of a file without version and known ending."""
    name = plain_name(path)
    for ending in sorted((*ENDINGS, *NO_DICOM, ".ima", ".gobj"), key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _counted(skipped: Counter, before: str) -> str:
    return before + ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items())) if skipped else ""


def _from_paths(source: Path, scans: list[Path]) -> list[dict[str, str]]:
    found = {}
    for path in scans:
        parts = path.relative_to(source).parts[:-1]
        found[path] = identity.who((*parts, path.resolve().name if path == source else _stem(path)))
    identity.check_nesting(list(found.values()))
    rows = []
    for path, one in found.items():
        file = path.relative_to(source)
        known = dict(file=str(file), patient=one.patient, visit=one.visit or "1", side=one.side or "")
        rows.append(dict.fromkeys(SCANS, "") | known | {"site": identity.site_of(file.parts)})
    return rows


def _from_table(source: Path, table: Path, scans: list[Path], notes: list[str], say) -> list[dict[str, str]]:
    """The rows of scans.tsv with their files found and their values checked."""
    rows = read_user_table(table, SCANS, say)
    if not rows:
        raise InputError(f"{table}: the table lists no scan; fill it, or take it out")
    if missing := {"file", "patient"} - set(rows[0]):
        raise InputError(f"{table}: the column {min(missing)!r} is missing; needed are file and patient")
    places = {_form(str(path.relative_to(source))): path for path in scans}
    seen: dict[Path, dict] = {}
    out = []
    for row in rows:
        row = dict.fromkeys(SCANS, "") | row
        if lacking := [key for key in ("file", "patient") if not row[key]]:
            says = f"the row of {row['file'] or row['patient']!r} has no {lacking[0]}"
            raise InputError(f"{table}: {says}; every scan needs one")
        path = _place(source, row["file"], places)
        first = seen.setdefault(path.resolve(), row)
        if first is not row:
            two = first["patient"] != row["patient"]
            of = f" for patients {first['patient']!r} and {row['patient']!r}" * two
            raise InputError(f"{table}: {row['file']} is listed twice{of}; every scan is listed once")
        out.append(_checked(table, row) | {"file": os.path.relpath(path, source)})
    if rest := [path for path in scans if path.resolve() not in seen]:
        notes.append(f"{table.name}: {len(rest)} scans are not listed and left out: {_named(source, rest)}")
    return out


def _form(name: str) -> str:
    return unicodedata.normalize("NFKC", os.path.normpath(name.replace("\\", "/")))


def _place(source: Path, name: str, places: dict[str, Path]) -> Path:
    """Where a listed file lies, in whatever Unicode form and with whichever slashes its name is written."""
    path = source / name
    if path.exists():
        return source / os.path.normpath(name)
    if found := places.get(_form(name)):
        return found
    raise InputError(f"{path}: no such file, but the table of scans lists it")


def _checked(table: Path, row: dict[str, str]) -> dict[str, str]:
    """A row whose values are known ones, in the form in which the cohort has them."""
    grade = re.sub(r"\.0+$", "", row["grade"])
    side, site, distal = (row[key].lower() for key in ("side", "site", "distal"))
    accepted = {"grade": (grade, GRADES, "1 to 5"), "side": (side, identity.SIDES, "left, right")}
    accepted |= {"site": (site, SITES, "radius, tibia"), "distal": (distal, DISTAL, "first, last")}
    for key, (value, known, words) in accepted.items():
        if value not in known:
            raise InputError(f"{table}: {key} {row[key]!r} of {row['file']}; accepted are {words} or none")
    visit = re.sub(r"^(\d+)\.0+$", r"\1", row["visit"])
    visit = visit or next((v for k, v in identity.ENTITY.findall(_stem(Path(row["file"]))) if k.lower() == "ses"), "1")
    site = site or identity.site_of(Path(row["file"].replace("\\", "/")).parts)
    said = dict(grade=grade, side=identity.SIDES[side] or "", site=site, distal=distal)
    return row | said | {"patient": identity.normal(row["patient"]), "visit": visit}


def _people(source: Path, table: str | None, say) -> dict[str, dict[str, str]]:
    """The rows of participants.tsv by the name of the patient, with sex F, M or none and age a number or none."""
    path = Path(table) if table else find_table(source, "participants")
    if path is None:
        return {}
    rows = read_user_table(path, PEOPLE, say)
    if rows and "patient" not in rows[0]:
        raise InputError(f"{path}: the column 'patient' is missing; accepted are patient, sex and age")
    people: dict[str, dict[str, str]] = {}
    for row in rows:
        name = identity.normal(row["patient"])
        sex, age = row.get("sex", ""), row.get("age", "").replace(",", ".").removesuffix("+")  # 89+ of BIDS
        if not name:
            raise InputError(f"{path}: a row has no patient; every row needs one")
        if sex.lower() not in SEXES:
            raise InputError(f"{path}: sex {sex!r} of {name}; accepted are F, M or none")
        if age and not (re.fullmatch(r"\d+(\.\d+)?", age) and float(age) <= 120):
            raise InputError(f"{path}: age {age!r} of {name}; accepted are years from 0 to 120, or none")
        known = {k: v for k, v in (("sex", SEXES[sex.lower()]), ("age", age)) if k in row}
        if people.setdefault(name, known) != known:
            raise InputError(f"{path}: patient {name!r} is there twice, with other values; keep one row a patient")
    return people


def _of_scans(source: Path, masks: list[Path], rows: list[dict[str, str]], notes: list[str]) -> dict[str, list[Path]]:
    """The masks of every scan: their names go on where that of the scan ends, in its folder or below.

    Elsewhere, the name of the scan must hold the patient's: `scan_TRAB_MASK` is of no one.
    """
    scans = [(Path(row["file"]).parent, _stem(Path(row["file"])), row) for row in rows]
    found, stray = defaultdict(list), []
    for path in masks:
        here, name = path.relative_to(source).parent, _stem(path)
        own = [(f, s, row) for f, s, row in scans if re.match(re.escape(s) + r"[_\-. ]", name)]
        near = [(f, s, row) for f, s, row in own if here.is_relative_to(f)]
        near = near or [(f, s, row) for f, s, row in own if identity.alike(row["patient"]) in identity.alike(s)]
        best = max(((len(f.parts), len(s)) for f, s, _ in near), default=None)
        files = [row["file"] for f, s, row in near if (len(f.parts), len(s)) == best]
        (found[files[0]] if len(files) == 1 else stray).append(path)
    if stray:
        notes.append(f"masks of no scan, left out: {len(stray)}, such as {stray[0].name}")
    return dict(found)


def _named(source: Path, paths: list[Path]) -> str:
    return ", ".join(str(p.relative_to(source)) for p in paths[:5]) + (" ..." if len(paths) > 5 else "")
