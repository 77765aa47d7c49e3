"""`make repro`: check params.yaml, reproduce what is stale, and on failure put the earlier outputs back.

DVC deletes a stage's outputs before it runs the stage; a mistake in the input must not cost them.
"""

import json
import subprocess
import sys
from pathlib import Path

from bonelib import InputError
from bonelib.params import check_file
from bonelib.processes import die_with_parent


def closing_lines(profile: str) -> str:
    """What a run ends with: the measures of the samples beside those of real bones, and where everything lies."""
    out = Path("out") / profile
    found = json.loads((out / "metrics/04_image_quality.json").read_text())

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value + 0:.2f}".replace("-0.00", "0.00")

    models = [key.removesuffix(".truncation") for key in found if key.endswith(".truncation")]
    n = found[f"{models[0]}.random3d.density.n_fake"]
    lines = [f"{n} samples of each model of profile {profile}, beside real bones:"]
    lines.append(f"  {'':16}" + "".join(f"{model:24}" for model in models) + "real bones")
    for name in ("density", "coverage", "precision", "recall"):
        values = []
        for model in models:
            value, low, high = (number(found[f"{model}.random3d.{name}.{end}"]) for end in ("value", "low", "high"))
            values.append(f"{value} ({low} to {high})")
        real = number(found[f"{models[0]}.random3d.{name}.real_against_real"])
        lines.append(f"  {name:16}" + "".join(f"{value:24}" for value in values) + real)
    for name in ("contours found", "closed slices", "stamp", "Tb.BMD", "Tb.Th", "Tb.N"):
        values = [number(found[f"measured.{group}.{name}"]) for group in (*models, "real")]
        lines.append(f"  {name:16}" + "".join(f"{value:24}" for value in values).rstrip())
    grades = json.loads((out / "metrics/02_motion_grading.json").read_text())
    if grades["trained"]:
        lines.append(f"{grades['balanced accuracy.n_scans']} scans of patients unknown to the motion grader:")
        for name in ("balanced accuracy", "within one grade"):
            low, high, chance = (number(grades[f"{name}.{end}"]) for end in ("low", "high", "chance"))
            lines.append(f"  {name:17} {number(grades[f'{name}.value'])} ({low} to {high}), chance {chance}")
    return "\n".join([*lines, f"pictures in {out}/figures, numbers in {out}/metrics, notebooks in {out}/notebooks"])


def main() -> int:
    die_with_parent()
    try:
        profile = check_file()["profile"]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if subprocess.run(["dvc", "repro", *sys.argv[1:]], preexec_fn=die_with_parent).returncode:
        subprocess.run(["dvc", "checkout", "--quiet", "--force"], preexec_fn=die_with_parent, stderr=subprocess.DEVNULL)
        return 2
    print(closing_lines(profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
