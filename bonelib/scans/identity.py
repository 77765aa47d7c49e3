"""Who is who: patient, visit and side from the path of a scan, and which names mean the same person.

The rules, in this order:

1. A row of scans.tsv decides (see `listing`).
2. A BIDS entity in any part of the path: `sub-07_ses-2`, `sub-07/ses-2/`, `sub-07` (its visit is 1), `hemi-L`.
3. Otherwise every folder and the name of the file is freed of visits (v1, ses2, month 12, baseline, a date), counts
   (scan2, a last number of one or two digits), sides (L, right) and words that name no one (radius, xct2). The first
   part in which something is left, from the top, is the patient: a folder a patient, or flat names such as anna_v2.
   Names go before single letters, these before single digits, and these before counts. After a code of up to three
   letters, a last number is the patient's where a visit is named besides: BE-07_V1.
4. Where only a count or words are left, the file is a patient of its own: scan1, scan2.

So folders of visits (visit1/anna) are told from folders of patients (anna/visit1) by these words. Where they do not
tell, as of two numbers, BE-07 alone, 07a beside 07b, or one name in the folders of two groups, nothing is guessed:
the import stops and asks for a scans.tsv.
"""

import re
import unicodedata
from collections import defaultdict
from typing import NamedTuple

from bonelib import InputError

EDGE, END = r"(?:^|(?<=[_\s.\-]))", r"(?=$|[_\s.\-])"
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
TIMES = f"ses|session|visit|vis|v|timepoint|time|tp|t|month|mon|m|week|w|year|yr|y|day|d|followup|fu|{MONTHS}"
DATE = r"(?:19|20)\d\d(?:[-_.]?\d\d){0,2}|\d\d[-_.]\d\d[-_.](?:19|20)\d\d"
POINTS = rf"baseline|bl|follow[-_ ]?up|fu|(?:pre|post)(?:[-_ ]?op)?|{MONTHS}|{DATE}"
VISIT = re.compile(rf"{EDGE}(?:(?:{TIMES})[-_ ]?\d{{1,3}}|{POINTS}){END}", re.IGNORECASE)
COUNT = re.compile(rf"{EDGE}(?:(?:scan|exam|run|im|se|st|s|series)[-_ ]?\d+|\d){END}", re.IGNORECASE)
LAST_NUMBER = re.compile(r"[_\s.\-]+(\d{1,2})$")
CODE = re.compile(r"[^\W\d_]{1,3}[_\s.\-]+\d\d")
SIDE = re.compile(rf"{EDGE}(left|right|links|rechts|lt|rt|l|r){END}", re.IGNORECASE)
SIDES = {"": None, "l": "left", "lt": "left", "left": "left", "links": "left"}
SIDES |= {"r": "right", "rt": "right", "right": "right", "rechts": "right"}
WORDS = (
    "scans?|images?|img|bones?|dicom|dcm|nifti|nii|aim|isq|recon|volumes?|vol|series|study|stacks?|ct|xct|xct2|"
    "hr-?p?qct|pqct|radius|tibia|wrist|forearm|ankle|axial|distal|ultradistal|anat|raw|rawdata|data|dataset|files?|"
    "export|mgha|density|hu|native|copy(?: of)?|kopie|\\(\\d+\\)"
)
NO_NAME = re.compile(rf"{EDGE}(?:{WORDS}){END}", re.IGNORECASE)
SITES = {"radius": r"radi(?:us|i)|wrists?|forearms?", "tibia": r"tibiae?|ankles?"}
PEOPLE = "controls?|cases?|patients?|subjects?|participants?|persons?|men|women|males?|females?|healthy|id|pat|subj|sub"
GROUP = re.compile(
    rf"(?:{PEOPLE}|fractures?|osteoporosis|normal)|(?:groups?|cohorts?|sites?|arm|cent(?:er|re)s?|hospital)[-_ ]?\w?",
    re.IGNORECASE,
)
MEMBER = re.compile(rf"(?:{PEOPLE})[-_ ]?\d+", re.IGNORECASE)
TELL = "say it in a scans.tsv (file, patient)"
NAME, LETTER, DIGITS, COUNTED, NONE = 5, 4, 3, 2, 1  # how well a part of a path can be a patient
ENTITY = re.compile(
    r"(?:^|[_\s\-])(sub|ses|hemi|side)-(.+?)(?=[_\s]|-(?:ses|hemi|side|acq|run|rec|task|desc)-|$)", re.IGNORECASE
)

# What follows a patient's label must be another entity: of sub-case_1_ses-2 it is not clear where the name ends
OPEN_LABEL = re.compile(
    r"(?:^|[_\s])sub-[^_\s]+[_\s](?:\d+(?=[_\s]|$)|[^_\s\-]+(?=[_\s](?:ses|hemi|side)-))", re.IGNORECASE
)


class Who(NamedTuple):
    """Patient, visit ("" where the path names none) and side (left, right or None) of a scan.

    `parts` is what could be names, too, and `group` the folders of groups (center1, controls) in the path.
    """

    patient: str
    visit: str
    side: str | None
    parts: tuple[str, ...] = ()
    group: str = ""


class _Part(NamedTuple):
    """A folder or name: what of it may be the patient, its visit and side, and how well it can be the patient."""

    left: str
    visit: str
    side: str | None
    rank: int


def normal(name: str) -> str:
    """A name in one Unicode form (NFKC), with plain hyphens, single spaces, and nothing invisible in it."""
    kinds = {"Cf": "", "Pd": "-"}
    plain = unicodedata.normalize("NFKC", name)
    return " ".join("".join(kinds.get(unicodedata.category(c), c) for c in plain).split())


def alike(name: str) -> str:
    """What names share that differ in case, leading zeros or separators, or as `sub-7`, `Subject 7`, `7` and `7.0`."""
    key = re.sub(r"^(?:sub[-_ ]|(?:sub|subj|subject|participant|pid|id)[-_ ]?(?=\d))", "", normal(name).casefold())
    key = re.sub(r"(?<=\d)[\s_.\-]+(?=\d)", "-", re.sub(r"^(\d+)\.0$", r"\1", key))
    key = re.sub(r"(?<!\d)[\s_.\-]+|[\s_.\-]+(?!\d)", "", key)
    return re.sub(r"(?<!\d)0+(?=\d)", "", key)


def site_of(parts: tuple[str, ...]) -> str:
    """The bone that a path names, radius or tibia; "" where it names none or both."""
    path = "/".join(parts)
    found = [s for s, words in SITES.items() if re.search(rf"(?<![a-z])(?:{words})(?![a-z])", path, re.IGNORECASE)]
    return found[0] if len(found) == 1 else ""


def who(parts: tuple[str, ...]) -> Who:
    """Patient, visit and side from the parts of a path below the cohort's folder, the last without its ending.

    Raises `InputError` where the path names two patients, visits or sides.
    """
    parts = tuple(normal(part) for part in parts)
    said = defaultdict(set)
    for part in parts:
        if OPEN_LABEL.search(part):
            raise InputError(f"{'/'.join(parts)}: it is not clear where the patient's label ends; {TELL}")
        for key, value in ENTITY.findall(part):
            said["side" if key.lower() == "hemi" else key.lower()].add(value)
    visited = any(VISIT.search(part) for part in parts)
    read = [_read(part, visited or bool(said["sub"])) for part in parts]
    group = " ".join(part for part in parts[:-1] if GROUP.fullmatch(_tidy(VISIT.sub("", part))))
    for key, values in said.items():
        if len({alike(v) for v in values}) > 1:
            says = f"the path names {key} {' and '.join(sorted(values))}"
            raise InputError(f"{'/'.join(parts)}: {says}; it must name one")
    sides = {SIDES.get(v.lower()) for v in said["side"]} or {part.side for part in read} - {None}
    if len(sides) > 1:
        raise InputError(f"{'/'.join(parts)}: the path names both sides, left and right; it must name one")
    side = next(iter(sides), None)
    if said["sub"]:
        rest = [_read(ENTITY.sub("", part), True).visit for part in parts]
        visit = min(said["ses"], default=next((v for v in reversed(rest) if v), ""))
        return Who(min(said["sub"]), visit, side, group=group)
    best = max(part.rank for part in read)
    ranks = [part.rank for part in read]
    at = ranks.index(best)
    digits = [i for i, part in enumerate(read) if part.rank == DIGITS]
    if best == NONE and any(part.visit or part.side for part in read):
        raise InputError(f"{'/'.join(parts)}: the path names a visit or a side, but no patient; {TELL}")
    if best in (DIGITS, COUNTED) and ranks.count(best) > 1 or read[at].left.isdecimal() and any(i < at for i in digits):
        raise InputError(f"{'/'.join(parts)}: the path has two numbers, and either could be the patient; {TELL}")
    if best == NONE:
        return Who(parts[-1], "", None)
    visit = " ".join(
        part.visit or part.left * (part.rank < NAME) for i, part in enumerate(read) if i != at or part.visit
    )
    others = tuple(part.left for i, part in enumerate(read) if i != at and part.rank == best)
    return Who(read[at].left, visit.strip(), side, others, group)


def _read(part: str, visited: bool) -> _Part:
    """One part of a path, freed of what is no name; `visited` where the path names a visit by a word."""
    side = {SIDES[found.lower()] for found in SIDE.findall(part)}
    if len(side) > 1:
        raise InputError(f"{part}: the name holds both sides, left and right; it must name one")
    bare = SIDE.sub("", part)
    visits = [m.group() for m in VISIT.finditer(bare)]
    weak = _tidy(NO_NAME.sub("", VISIT.sub("", bare)))
    left, rank = weak, NONE
    if member := MEMBER.match(weak):
        left, rank = member.group(), NAME
        visits += [_tidy(weak[member.end() :])]
    elif (strong := _tidy(COUNT.sub("", weak))) and not GROUP.fullmatch(strong):
        number = LAST_NUMBER.search(strong)
        if number and CODE.fullmatch(strong):  # BE-07: patient 7 of a place, or the seventh visit of a person?
            if not visited:
                raise InputError(f"{part}: the number at the end could be the patient or a visit; {TELL}")
            number = None
        visits += [m.group() for m in COUNT.finditer(weak)] + ([number[1]] if number else [])
        left = strong[: number.start()] if number else strong
        rank = LETTER if re.fullmatch(r"[^\W\d_]", left) else NAME
    elif weak and not GROUP.fullmatch(weak):
        rank = DIGITS if weak.isdecimal() else COUNTED
        if len(COUNT.findall(weak)) > 1:
            raise InputError(f"{part}: the name has two numbers, and either could be the patient; {TELL}")
    return _Part(left, " ".join(v for v in visits if v), next(iter(side), None), rank)


def _tidy(text: str) -> str:
    return re.sub(r"([_\s.\-])[_\s.\-]+", r"\1", text).strip("_-. ")


def check_nesting(found: list[Who]) -> None:
    """Refuse paths in which folders and files could be the patients, or one could be two; raises `InputError`."""
    owners, groups = defaultdict(set), defaultdict(set)
    for one in found:
        groups[alike(one.patient)].add(one.group)
        for part in one.parts:
            owners[alike(part)].add(one.patient)
    again = {part: names for part, names in owners.items() if len(names) > 1}
    if again and len({one.patient for one in found}) < 2 * len(again):
        part, names = next(iter(again.items()))
        says = f"{part!r} lies in the folders of {', '.join(sorted(names)[:3])}"
        raise InputError(f"{says}: it is not clear which of them is the patient; {TELL}")
    for patient, names in groups.items():
        if len(names) > 1:
            says = f"patient {patient!r} is in {' and '.join(repr(n) for n in sorted(names)[:2])}"
            raise InputError(f"{says}: it is not clear whether that is one person; {TELL}")
    stems = _by(lambda name: re.sub(r"(?<=\d)[a-z]$", "", alike(name)), [one.patient for one in found])
    for names in stems.values():
        if len({alike(name) for name in names}) > 1:
            first, second, *_ = sorted(names)
            raise InputError(f"{first!r} and {second!r}: the last letter could be a patient, a side or a visit; {TELL}")


def check_names(patients: list[str], people: list[str]) -> None:
    """Refuse patients whose names differ in case, zeros or separators alone, unless `people`, the names in
    participants.tsv, hold both; raises `InputError` with both named."""
    for names in _by(alike, patients).values():
        if len(names) > 1 and not names <= set(people):
            first, second, *_ = sorted(names)
            says = f"patients {first!r} and {second!r} differ in case, zeros or separators alone"
            mend = "write them alike if they are one, or list both in participants.tsv if they are two"
            raise InputError(f"{says}; {mend}")


def matched(patients: list[str], people: list[str]) -> dict[str, str]:
    """{name in participants.tsv: patient}: equal names, or, where only one is alike, that one."""
    near = _by(alike, patients)
    found = {name: {name} if name in patients else near.get(alike(name), set()) for name in people}
    return {name: min(candidates) for name, candidates in found.items() if len(candidates) == 1}


def _by(key, names: list[str]) -> dict[str, set[str]]:
    groups = defaultdict(set)
    for name in names:
        groups[key(name)].add(name)
    return groups
