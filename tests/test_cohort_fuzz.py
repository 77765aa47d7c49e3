"""A small known cohort, named, nested, stored and typed at random: nobody is in two splits, nothing is lost unsaid."""

import functools
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonelib import InputError
from bonelib.scans.cohort import import_scans
from bonelib.scans.grids import Calibration
from bonelib.scans.listing import listed
from bonelib.scans.preprocessing import split_patients
from bonelib.scans.tables import read_table

MM = 0.4
XCT2 = Calibration(mu_scaling=8192, mu_water=0.2366, slope=1662.524, intercept=-398.609)
PEOPLE = (
    "anna",
    "Bert",
    "P001",
    "P002",
    "07",
    "12",
    "M\u00fcller",
    "\u674e",
    "a b",
    "x_1",
    "T1",
    "M12",
    "case_1",
    "9",
    "L",
    "q",
)
NESTINGS = (
    "sub-{p}_ses-{v}", "sub-{p}/ses-{v}/scan", "sub-{p}/sub-{p}_ses-{v}", "{p}/v{v}", "{p}_v{v}", "{p}_{v}", "{p}/{v}",
    "visit{v}/{p}", "{v}/{p}", "group/{p}/scan{v}", "{p}/2020-0{v}-11/radius", "{p}_L_{v}", "data/{p}-T{v}",
    "{p}/hr_{v}",
)  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "latin-1")
JUNK = (".DS_Store", "._x.nii", "notes.txt", "scan.json", "x.nii.part", "DICOMDIR", "empty.csv")


@functools.cache
def scan(number):
    """The bone of a number, (4, 24, 22): its marrow, 100 + 8 times the number, tells it again after any import."""
    y, x = np.mgrid[:24, :22]
    r = np.hypot(y - 12, x - 11)
    density = np.where(r < 8, np.where(r < 5.5, 100 + 8 * number, 950), 0)
    return density + np.random.default_rng(number).normal(0, 25, (4, 24, 22))


def number_of(path):
    """The number of the bone in an imported file."""
    voxels = np.asarray(nib.load(path).dataobj).T
    return int(np.argmin([abs(voxels[:, 9:15, 8:14].mean() - marrow(n)) for n in range(8)]))


@functools.cache
def marrow(number):
    return scan(number)[:, 9:15, 8:14].mean()


def write(path, voxels, axes, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.rint(voxels).astype(np.int16).T, np.diag([MM, MM, MM, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), f"{path}{kind}")


def unit_of(density, unit):
    mu = (density - XCT2.intercept) / XCT2.slope
    return {"mgHA": density, "HU": mu / XCT2.mu_water * 1000 - 1000, "native": mu * XCT2.mu_scaling}[unit]


@st.composite
def folders(draw):
    """Who (up to 3 people of 2 visits) is where, in which form, and with which tables."""
    people = draw(st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=3, unique=True))
    nesting = draw(st.lists(st.sampled_from(NESTINGS), min_size=1, max_size=2, unique=True))
    axes = draw(st.lists(st.sampled_from(("RAS", "LPS", "LAS", "SPL", "IRA")), min_size=1, max_size=2))
    return dict(
        scans=[(p, v) for p in people for v in range(1, draw(st.integers(1, 2)) + 1)],
        nesting=nesting,
        axes=axes,
        kind=draw(st.sampled_from((".nii", ".nii.gz"))),
        unit=draw(st.sampled_from(("mgHA", "mgHA", "HU", "native"))),
        told=draw(st.sampled_from(("mgHA", "right", "right", None))),
        junk=draw(st.lists(st.sampled_from(JUNK), max_size=2)),
        table=draw(st.sampled_from((None, None, None, "tsv", "csv", "part"))),
        typed=draw(st.sampled_from(("{}", " {} ", "sub-{}", "{}.0"))),
        encoding=draw(st.sampled_from(ENCODINGS)),
        copied=draw(st.booleans()) and draw(st.booleans()),
    )


def lay_out(folder, what):
    """Write the files of a drawn folder; {number of a bone: person}."""
    owners, files = {}, []
    for i, (person, visit) in enumerate(what["scans"]):
        name = what["nesting"][i % len(what["nesting"])].format(p=person, v=visit)
        voxels = unit_of(scan(i), what["unit"])
        write(folder / name, voxels, what["axes"][i % len(what["axes"])], what["kind"])
        owners[i] = person
        files.append((name + what["kind"], person))
    if what["copied"]:
        write(folder / "sub-copy_ses-1", unit_of(scan(0), what["unit"]), "RAS", what["kind"])
        files.append((f"sub-copy_ses-1{what['kind']}", "copy"))
    for name in what["junk"]:
        (folder / name).write_bytes(b"no scan")
    if what["table"]:
        comma = "\t" if what["table"] != "csv" else ";"
        rows = files[: len(files) - (what["table"] == "part")]
        lines = [comma.join((f, what["typed"].format(p))) for f, p in rows]
        text = "\r\n".join([comma.join(("File", "Patient ")), *lines, comma, ""])
        ending = "csv" if what["table"] == "csv" else "tsv"
        (folder / f"Scans.{ending}").write_bytes(text.encode(what["encoding"], errors="replace"))
    return owners


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(what=folders())
def test_any_folder_gives_the_right_cohort_or_one_sentence(what):
    with tempfile.TemporaryDirectory() as place:
        source, out, said = Path(place) / "s", Path(place) / "o", []
        source.mkdir()
        owners = lay_out(source, what)
        unit = what["unit"] if what["told"] == "right" else what["told"]
        try:
            names = [row["file"] for row in listed(source).rows]
            import_scans(source, out, unit, calibration=XCT2, say=lambda *a, **k: said.append(str(a[0])))
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
            assert not out.exists() and not list(Path(place).glob(".part*"))
            return
        rows = read_table(out / "scans.tsv")
        assert len(rows) == len(names)  # nothing that was listed is lost
        if len(rows) < len(owners):  # what was not listed is said
            assert "not listed" in "\n".join(said)
        of = {}
        for row in rows:
            of.setdefault(owners[number_of(out / row["file"])], set()).add(row["patient"])
        assert all(len(patients) == 1 for patients in of.values()), of
        patients = [row["patient"] for row in rows]
        if len(set(patients)) >= 3:
            splits = split_patients(patients, 0.3, seed=1)
            assert all(len({splits[p] for p in mine}) == 1 for mine in of.values())
