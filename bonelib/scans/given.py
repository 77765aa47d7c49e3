"""What users bring along with their scans: contours as masks, and a table of traits that their scanner measured."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from bonelib import InputError
from bonelib.scans.formats import read_mask
from bonelib.scans.grids import canonical
from bonelib.scans.tables import find_table, read_user_table, write_table
from bonelib.scans.volumes import Volume

TRAITS = ("Tt.Ar", "Tt.BMD", "Tb.BMD", "Ct.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "DA", "Conn.D", "Ct.Th", "Ct.Po")
SHARES = ("BV/TV", "Ct.Po")
TRAITS_FILE = "attributes.tsv"
KINDS = {"inner": r"trab|tb|endo", "cortex": r"cort", "outer": r"peri|full|total|tt"}
CORTEX, MARROW = 1, 2  # of the labels; 0 is outside


def contours_file(scan: str) -> str:
    """Where the labels of a scan lie in the folder of a cohort."""
    return f"contours/{scan}.nii.gz"


def contour_labels(volume: Volume, masks: list[Path], say) -> Volume | None:
    """The masks of a scan as labels on its grid (0 outside, 1 cortex, 2 trabecular), or None where they do not suffice.

    Needed are the trabecular compartment, and the cortical one or all of the bone; which is which is in the names.
    What is not used is named by `say`. Raises `InputError` for a mask that cannot be read.
    """
    found: dict[str, np.ndarray] = {}
    names = ", ".join(path.name for path in masks)
    for path in masks:
        kinds = [kind for kind, words in KINDS.items() if re.search(rf"(?<![a-z])(?:{words})", path.name.lower())]
        if len(kinds) != 1 or path.suffix.lower() == ".gobj":
            used = "used are _TRAB_MASK with _CORT_MASK or _FULL_MASK"
            say(f"{path.name}: taken for a mask and not used; {used}", flush=True)
            continue
        mask = read_mask(path)
        voxels, affine = canonical(mask.voxels, mask.affine)
        if voxels.shape != volume.shape or not np.allclose(affine, volume.affine, atol=0.5 * min(volume.spacing)):
            say(f"{path.name}: a mask on another grid than its scan, not used", flush=True)
            continue
        found[kinds[0]] = voxels > 0
    if "inner" not in found or len(found) < 2:
        if found:
            say(f"{names}: one compartment alone is not used; give trabeculae and cortex", flush=True)
        return None
    inner = found["inner"]
    outer = found.get("outer", inner) | found.get("cortex", inner)
    if not (outer & ~inner).any() or not (inner & outer).any():
        say(f"{names}: a compartment is empty, not used", flush=True)
        return None
    labels = np.where(inner, MARROW, np.where(outer, CORTEX, 0)).astype(np.int16)
    return replace(volume, voxels=labels, unit="native")


def import_traits(source: Path, names: dict[str, str], target: Path, say) -> None:
    """Write the traits of attributes.tsv in `source`, if it is there, to `target`; `names` are {file: scan}.

    Raises `InputError` for a file that is no scan of the cohort, a value that is no number, or a share above 1.
    """
    path = find_table(source, "attributes")
    if path is None:
        return
    out = []
    for row in read_user_table(path, ("file", *TRAITS), say):
        if row.get("file") not in names:
            raise InputError(f"{path}: {row.get('file')!r} is no scan of the cohort; the column file names them")
        for trait, value in row.items():
            if trait == "file" or not value:
                continue
            number = float(value) if re.fullmatch(r"[-+\d.eE]+", value) else np.nan
            if not (0 <= number < 1e5) or trait in SHARES and number > 1:
                said = f"{trait} {value!r} of {row['file']}"
                raise InputError(f"{path}: {said}; accepted are numbers, shares from 0 to 1")
        out.append({"scan": names[row["file"]]} | {k: v for k, v in row.items() if k != "file"})
    write_table(target, out)
    say(f"{path.name}: traits of {len(out)} scans take the place of measured ones", flush=True)
