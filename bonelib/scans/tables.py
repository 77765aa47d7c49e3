"""Tables as lists of dictionaries: tab-separated (.tsv) or comma-separated (.csv), and those that users write."""

import codecs
import csv
import difflib
import io
import re
import unicodedata
from pathlib import Path
from typing import Any

from bonelib import InputError

NOTHING = ("", "n/a")  # what stands for no value; BIDS has n/a
SYNONYMS = {  # other names of known columns, as `_plain` leaves them
    **dict.fromkeys(("participantid", "patientid", "subjectid", "participant", "subject"), "patient"),
    **dict.fromkeys(("filename", "path"), "file"),
    **dict.fromkeys(("session", "sessionid"), "visit"),
    "gender": "sex",
}
TABLE = r"(?i)(?:{})(?:\.tsv|\.csv|\.txt|\.tsv\.txt|\.csv\.txt)"
SHEET = r"(?i)(?:{})\.(?:xlsx?|ods|numbers)"
ALIKE = 0.75  # of difflib: `grades` and `grade` have 0.91


def read_table(path: str | Path) -> list[dict[str, str]]:
    """One dictionary a row, all values as text without spaces about them; rows without any value are left out.

    The first row names the columns. Cells are parted by tabs, semicolons or commas, whichever that row has; where
    they are parted by tabs, quotes are plain characters. The text is UTF-8, or UTF-16 with a byte order mark. Raises
    `InputError` for a missing file, one that is not such text, and a row with more or fewer cells than the first.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        says = f"byte {error.start} is not UTF-8; save it anew as text in UTF-8"
        raise InputError(f"{path}: not a readable table, as {says}") from None
    if "\0" in text:
        raise InputError(f"{path}: not a readable table, as it is no text; accepted are .tsv and .csv in UTF-8")
    text = re.sub(r"\r\n?", "\n", text)
    text = re.sub(r"\Asep=.\n", "", text)  # of spreadsheets
    first = next(iter(text.splitlines()), "")
    comma = next((c for c in "\t;," if c in first), "\t" if path.suffix == ".tsv" else ",")
    quotes = csv.QUOTE_NONE if comma == "\t" else csv.QUOTE_MINIMAL
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=comma, quoting=quotes, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: not a readable table ({error})") from None
    heads, *cells = [[value.strip() for value in line] for line in lines] or [[]]
    while heads and not heads[-1]:
        heads.pop()
    if again := {head for head in heads if head and heads.count(head) > 1}:
        raise InputError(f"{path}: the column {min(again)!r} is there twice")
    rows = []
    for number, row in enumerate(cells, 2):
        if not any(row):
            continue
        if any(row[len(heads) :]) or len(row) < len(heads):
            said = ", ".join(value for value in row if value)[:60]
            says = f"row {number} ({said}) has {len(row)} cells, but the first has {len(heads)}"
            raise InputError(f"{path}: {says}; every row must have as many")
        rows.append({head: value for head, value in zip(heads, row, strict=False) if head})
    return rows


def find_table(source: Path, name: str) -> Path | None:
    """The table of that name in a folder, whatever its capitals and ending."""
    files = sorted(p for p in source.iterdir() if p.is_file())
    found = [p for p in files if re.fullmatch(TABLE.format(name), p.name)]
    sheets = [p for p in files if re.fullmatch(SHEET.format(name), p.name)]
    if sheets and not found:
        raise InputError(f"{sheets[0]}: this kind of table is not read; save it as {name}.csv or {name}.tsv")
    if len(found) > 1:
        raise InputError(f"{source}: both {found[0].name} and {found[1].name} are there; leave one of them")
    return found[0] if found else None


def read_user_table(path: str | Path, known: tuple[str, ...], say) -> list[dict[str, str]]:
    """`read_table` of a table that a person wrote, with the columns `known`, whatever their capitals and spaces.

    `n/a` becomes an empty value, and values are brought to one Unicode form (NFKC). Other columns are left out, and
    named by `say`. Raises `InputError` also for a column that is nearly a known one which is not there.
    """
    path, rows = Path(path), read_table(path)
    names = {}
    for head in rows[0] if rows else ():
        name = _plain(head)
        name = next((k for k in known if _plain(k) == name), SYNONYMS.get(name))
        if name in known:
            if name in names.values():
                raise InputError(f"{path}: the column {name!r} is there twice, once as {head!r}")
            names[head] = name
    left = [head for head in (rows[0] if rows else ()) if head not in names]
    missing = [name for name in known if name not in names.values()]
    for head in left:
        words = [_plain(word) for word in re.split(r"[\s_.\-]+", head)]
        near = [k for k in missing if _plain(k) in words] or _nearest(_plain(head), missing)
        if near:
            raise InputError(f"{path}: the column {head!r} is not known; did you mean {near[0]!r}?")
    if left:
        say(f"{path.name}: columns that are not used: {', '.join(left)}", flush=True)
    return [{name: _value(row[head]) for head, name in names.items()} for row in rows]


def _plain(name: str) -> str:
    return re.sub(r"[^\w/]|_", "", unicodedata.normalize("NFKC", name).casefold())


def _nearest(name: str, known: list[str]) -> list[str]:
    plain = {_plain(k): k for k in known}
    return [plain[n] for n in difflib.get_close_matches(name, plain, 1, ALIKE)]


def _value(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip()
    return "" if text.casefold() in NOTHING else text


def write_table(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """A table with the columns of all rows, in the order in which they appear."""
    path = Path(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    tabs = path.suffix == ".tsv"
    how = dict(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None) if tabs else {}
    if tabs:
        rows = [{k: re.sub(r"[\t\r\n]+", " ", v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n", **how)
        table.writeheader()
        table.writerows(rows)


def as_markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table, numbers to three digits."""

    def cell(value):
        if isinstance(value, float):
            return f"{value:.3g}" if value == value else "none"
        return str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
