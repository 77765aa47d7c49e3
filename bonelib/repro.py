"""`make repro`: check params.yaml, reproduce what is stale, and on failure put the earlier outputs back.

DVC deletes a stage's outputs before it runs the stage; a mistake in the input must not cost them. It runs one stage
after another, and small networks do not keep several cores busy: without a GPU, the models are therefore trained,
inverted and edited side by side, each by a `dvc repro` of its own with its share of the cores.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import yaml

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.parallel import THREAD_SETTINGS, cores, die_with_parent
from bonelib.params import check_file
from bonelib.scans.cohort import check_own_scans
from bonelib.scans.config import Cohort

REPRO = ("dvc", "--wait-for-lock", "repro")
CHILD = {"preexec_fn": die_with_parent} if sys.platform == "linux" else {}  # Windows has no such option
LOCAL = Path(".dvc/config.local")


def closing_lines(profile: str) -> str:
    """What a run ends with: the measures of the samples beside those of real bones, and where everything lies."""
    out = Path("out") / profile
    found = json.loads((out / "metrics/04_image_quality.json").read_text(encoding="utf-8"))

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
            values.append(f"{value} ({low} to {high})" if low != "none" else f"{value} (no interval)")
        real = number(found[f"{models[0]}.random3d.{name}.real_against_real"])
        lines.append(f"  {name:16}" + "".join(f"{value:24}" for value in values) + real)
    for name in ("contours found", "closed slices", "fixed pattern", "Tb.BMD", "Tb.Th", "Tb.N"):
        values = [number(found[f"measured.{group}.{name}"]) for group in (*models, "real")]
        lines.append(f"  {name:16}" + "".join(f"{value:24}" for value in values).rstrip())
    grades = json.loads((out / "metrics/02_motion_grading.json").read_text(encoding="utf-8"))
    if grades["trained"]:
        lines.append(f"{grades['balanced accuracy.n_scans']} scans of patients unknown to the motion grader:")
        for name in ("balanced accuracy", "within one grade"):
            low, high, chance = (number(grades[f"{name}.{end}"]) for end in ("low", "high", "chance"))
            lines.append(f"  {name:17} {number(grades[f'{name}.value'])} ({low} to {high}), chance {chance}")
    return "\n".join([*lines, f"pictures in {out}/figures, numbers in {out}/metrics, notebooks in {out}/notebooks"])


def by_model(stages: dict, models: list[str]) -> list[list[str]]:
    """Of the `stages` of dvc.yaml, those that run once for each model: every model's targets, in their order there, in
    which none needs a later one."""
    names = [name for name, stage in stages.items() if (stage.get("matrix") or {}).get("model") == "${models}"]
    return [[f"{name}@{model}" for name in names] for model in models]


def before(targets: list[str]) -> list[str]:
    """The stages that `targets` need and that are none of them."""
    from dvc.repo import Repo
    from networkx import descendants

    with Repo() as repo:
        graph = repo.index.graph
        own = [stage for stage in graph if stage.addressing in targets]
        needed = set().union(*(descendants(graph, stage) for stage in own))
    return [stage.addressing for stage in needed if stage.addressing not in targets]


def side_by_side(groups: list[list[str]], names: list[str]) -> int:
    """Reproduce groups of targets at the same time, each with its share of the cores; every line begins with its name.

    What they need from outside of their group must be there (`before`). Returns the first status that is not 0, when
    all have ended.
    """
    threads = str(max(1, cores() // len(groups)))
    how = dict(env=os.environ | dict.fromkeys(THREAD_SETTINGS, threads), **CHILD)
    how |= dict(stdout=subprocess.PIPE, text=True, encoding="utf-8")
    # One item at a time: DVC locks whatever it looks at, also upstream of a target, against the others
    running = [subprocess.Popen([*REPRO, "--single-item", *targets], **how) for targets in groups]

    def say(name, process):
        for line in process.stdout:
            print(f"{name}: {line}", end="", flush=True)

    speakers = [threading.Thread(target=say, args=pair) for pair in zip(names, running, strict=True)]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join()
    return next((status for status in [process.wait() for process in running] if status), 0)


def repro(models: list[str], targets: list[str]) -> int:
    """`dvc repro TARGETS`; of the whole pipeline, the models' own stages side by side where that is faster."""
    groups = by_model(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"], models)
    if not targets and len(groups) > 1 and _cores_alone():
        shared = before(sum(groups, []))
        if status := (_dvc(shared) if shared else 0) or side_by_side(groups, models):
            return status
    return _dvc(targets)


def _dvc(targets):
    return subprocess.run([*REPRO, *targets], **CHILD).returncode


def _cores_alone():
    import torch

    return cores() > 1 and not torch.cuda.is_available()


def without_git() -> None:
    """Tell DVC to do without git where there is none, as in a download of the repository as a ZIP."""
    if not Path(".git").exists() and Path(".dvc").is_dir() and not LOCAL.exists():
        LOCAL.write_text("[core]\n    no_scm = true\n", encoding="utf-8")


def main() -> int:
    die_with_parent()
    try:
        without_git()
        values = check_file()
        check_own_scans(section(Cohort, values["cohort"], "cohort"))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if repro(values["models"], sys.argv[1:]):
        subprocess.run(["dvc", "checkout", "--quiet", "--force"], stderr=subprocess.DEVNULL, **CHILD)
        return 2
    if (Path("out") / values["profile"] / "metrics/04_image_quality.json").is_file():  # not where targets end before
        print(closing_lines(values["profile"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
