"""Writes the results and the picture of README.md from the outputs of a profile (`make readme`, the active one).

python -m bonelib.views.readme [PROFILE]
"""

import json
import re
import shutil
import sys
from pathlib import Path

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.params import check_file
from bonelib.scans.tables import read_table

BLOCK = re.compile(r"(<!-- results[^>]*-->\n).*?(<!-- /results -->)", re.S)
FURTHER = re.compile(r"(<!-- supplements[^>]*-->\n).*?(<!-- /supplements -->)", re.S)
QUALITY, NAMES = "04_image_quality", {"progan": "3D-ProGAN", "stylegan": "3D-StyleGAN"}
TRAITS = ("contours found", "closed slices", "fixed pattern", "Tb.BMD", "Ct.BMD", "Tb.Th", "Tb.N", "Ct.Th")

TEASER = "teaser.png"
PICTURES = {TEASER: "04_image_quality/teaser.png", "native.png": "S13_native/coronal.png"}
SUPPLEMENTS = (  # metrics file, key without ".value", what it is
    ("S8_hagan_uses", "conditional.BV/TV.samples.right",
     "samples asked for a fifth of the cohort by BV/TV in which morphometry finds it, share"),
    ("S8_hagan_uses", "conditional.motion grade.samples.right",
     "samples asked for a motion grade in which the grader finds it, share"),
    ("S9_two_contrasts", "told.contrast.unknown", "slices of unknown patients whose contrast their codes tell, share"),
    ("S9_two_contrasts", "transfer.soft tissue to mineral.moved", "mineral from soft tissue: error, mg HA/cm³"),
    ("S9_two_contrasts", "transfer.soft tissue to mineral.mean slice", "the same: error of the mean slice"),
    ("S10_inverse_problems", "4x lower resolution.the likelier of both.PSNR better",
     "voxels four times as long: bones restored better than by trilinear interpolation, share"),
    ("S10_inverse_problems", "motion, unknown.the likelier of both.morphometry better",
     "unknown motion: bones whose morphometry comes nearer to that of the still scan, share"),
    ("S11_visits_and_atlases", "scan + asked density.Tb.BMD, error",
     "Tb.BMD of visit 6 from visits 1 to 4: error, mg HA/cm³"),
    ("S11_visits_and_atlases", "no change, scan.Tb.BMD, error", "the same, if nothing changed: error"),
    ("S11_visits_and_atlases", "histogram.the set", "a test set to a histogram of Tb.BMD: Kolmogorov-Smirnov distance"),
    ("S12_augmentation", "with mixed bones.change of absolute error, grades",
     "a motion grader that also learned from mixed bones: change of its error, grades"),
    ("S13_native", "traits.Tb.Th.samples", "whole scans drawn at the scanner's voxels: Tb.Th, mm"),
    ("S13_native", "traits.closed slices.samples", "the same: closed slices, share"),
)  # fmt: skip


def findings(profile: str) -> str:
    """The table of README.md, of the numbers of out/PROFILE/paper.csv, as they are shown in the paper."""
    path = Path("out") / profile / "paper.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such file; `make repro` makes it, with the paper")
    shown: dict[str, str] = {}
    for row in read_table(path):
        if row["source"] == QUALITY and shown.get(row["key"], "%").endswith("%"):  # shares as they stand in tables
            shown[row["key"]] = row["shown"]
    narrow = [key.removesuffix(".random3d.FD.value") for key in shown if key.endswith(".random3d.FD.value")]
    models = {name.split(" ")[0]: name for name in narrow}  # the last setting of a model is the truncated one

    def cell(key, low):
        if key not in shown:
            return "not measured"
        ends = [shown[f"{low}.{end}"] for end in ("low", "high") if f"{low}.{end}" in shown]
        return f"{shown[key]} ({ends[0]} to {ends[1]})" if len(ends) == 2 else shown[key]

    names = (NAMES.get(m.split("-")[0], m) for m in models)
    lines = [[f"profile `{profile}`", *names, "real bones"], ["---"] * (len(models) + 2)]
    for metric in ("density", "coverage", "precision", "recall"):
        keys = [f"{name}.random3d.{metric}" for name in models.values()]
        real = [value for key, value in shown.items() if key.endswith(f".random3d.{metric}.real_against_real")]
        lines.append([metric, *(cell(f"{key}.value", key) for key in keys), *(real[:1] or ["not measured"])])
    for trait in TRAITS:
        groups = [f"measured.{group}.{trait}" for group in (*models.values(), "real")]
        lines.append([trait, *(cell(group, group) for group in groups)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def further(profile: str) -> str:
    """The table of README.md on the supplements, of those metrics files of out/PROFILE that are there."""
    lines = [["supplement", "", "value (95 % interval)", "N"], ["---"] * 4]
    for name, key, what in SUPPLEMENTS:
        path = Path("out") / profile / "metrics" / f"{name}.json"
        if path.is_file():
            numbers = json.loads(path.read_text(encoding="utf-8"))
            joins = (".value", ".low", ".high"), ("", " low", " high")  # of measures in rows, and in columns
            found = next((v for ends in joins if None not in (v := [numbers.get(key + end) for end in ends])), None)
            shown = "{:.3g} ({:.3g} to {:.3g})".format(*found).replace("-", "−") if found else "not measured"
            count = numbers.get(f"{key}.N", numbers.get(f"{key.rpartition('.')[0]}.N", 0))
            lines.append([f"`{name}`", what, shown, str(count)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@command
def main() -> None:
    readme = Path("README.md")
    profile = sys.argv[1] if len(sys.argv) > 1 else check_file()["profile"]
    table = findings(profile)
    more, text = further(profile), readme.read_text(encoding="utf-8")
    text = BLOCK.sub(lambda part: part[1] + table + part[2], text)
    readme.write_text(FURTHER.sub(lambda part: part[1] + more + part[2], text), encoding="utf-8")
    Path("paper/figures").mkdir(parents=True, exist_ok=True)
    for name, source in PICTURES.items():
        path = Path("out") / profile / "figures" / source
        if path.is_file() or name == TEASER:  # of a supplement that was not run the earlier picture stays
            shutil.copyfile(path, Path("paper/figures") / name)


if __name__ == "__main__":
    sys.exit(main())
