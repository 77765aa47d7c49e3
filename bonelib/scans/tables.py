"""Tables as lists of dictionaries: tab-separated (.tsv) or comma-separated (.csv), by the file's ending."""

import csv
from pathlib import Path
from typing import Any

from bonelib import InputError


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def read_table(path: str | Path) -> list[dict[str, str]]:
    """One dictionary a row, all values as text. Raises `InputError` for a missing file or one that is not text."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter=_delimiter(path)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable table ({error})") from None


def write_table(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """A table with the columns of all rows, in the order in which they appear."""
    path = Path(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, delimiter=_delimiter(path), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def as_markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table, numbers to three digits."""

    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
