"""`make repro`: check params.yaml, reproduce what is stale, and on failure put the earlier outputs back.

python -m bonelib.repro [STAGE ...] [--profile NAME] [--all]

runs the story 01-09 and the paper of the active profile, with --all the supplements too. --profile makes another
profile the active one, in params.yaml.

DVC deletes a stage's outputs before it runs the stage; a mistake in the input must not cost them. It runs one stage
after another, and small networks do not keep several cores busy: without a GPU, the models are therefore trained,
inverted and edited side by side, each by a `dvc repro` of its own with its share of the cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import yaml

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import section
from bonelib.core.files import write_json
from bonelib.core.parallel import THREAD_SETTINGS, cores, die_with_parent
from bonelib.first_look import FILE as FIRST_LOOK
from bonelib.params import check_file
from bonelib.progress import Progress
from bonelib.scans.cohort import check_own_scans, check_source
from bonelib.scans.config import Cohort

REPRO = ("dvc", "--wait-for-lock", "repro")
CHILD = {"preexec_fn": die_with_parent} if sys.platform == "linux" else {}  # Windows has no such option
LOCAL = Path(".dvc/config.local")
STORY = ["paper"]  # the stage that needs 01-09
SECONDS = Path(__file__).with_name("stage_seconds.json")  # {profile: {stage: seconds}}, as measured on two cores


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
    lines.append(f"pictures in {out}/figures, numbers in {out}/metrics, notebooks in {out}/notebooks")
    if (out / "paper.pdf").is_file():  # not where targets end before
        lines.append(f"the paper in {out}/paper.pdf")
    return "\n".join(lines)


def by_model(stages: dict, models: list[str]) -> list[list[str]]:
    """Of the `stages` of dvc.yaml, those that run once for each model: every model's targets, in their order there, in
    which none needs a later one."""
    names = [name for name, stage in stages.items() if (stage.get("matrix") or {}).get("model") == "${models}"]
    return [[f"{name}@{model}" for name in names] for model in models]


def before(targets: list[str], itself: bool = False) -> list[str]:
    """The stages that `targets` need and that are none of them; with `itself` these too. No targets are all stages."""
    from dvc.repo import Repo
    from networkx import descendants

    with Repo() as repo:
        graph = repo.index.graph
        own = [stage for stage in graph if stage.addressing in targets or not targets]
        needed = set(own if itself else ()).union(*(descendants(graph, stage) for stage in own))
    return [stage.addressing for stage in needed if itself or stage.addressing not in targets]


def side_by_side(groups: list[list[str]], names: list[str], progress: Progress | None = None) -> int:
    """Reproduce groups of targets at the same time, each with its share of the cores; every line begins with its name.

    What they need from outside of their group must be there (`before`). Returns the first status that is not 0, when
    all have ended.
    """
    threads = str(max(1, cores() // len(groups)))
    env = os.environ | dict.fromkeys(THREAD_SETTINGS, threads)
    # One item at a time: DVC locks whatever it looks at, also upstream of a target, against the others
    running = [_started(["--single-item", *targets], env) for targets in groups]
    speakers = [
        threading.Thread(target=_speak, args=(process, progress, name))
        for name, process in zip(names, running, strict=True)
    ]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join()
    return next((status for status in [process.wait() for process in running] if status), 0)


def _started(words, env=None):
    how = dict(stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", env=env)
    return subprocess.Popen([*REPRO, *words], **how, **CHILD)


def _speak(process, progress, name=""):
    """Pass on what a process prints, each line with its name, and what is left where a stage begins."""
    for line in process.stdout:
        print(f"{name}: {line}" if name else line, end="", flush=True)
        if progress and (says := progress.heard(line, name)):
            print(says, flush=True)


def repro(models: list[str], targets: list[str], progress: Progress | None = None, share: bool | None = None) -> int:
    """`dvc repro TARGETS`; of the whole story, or with no targets of all, the models' stages side by side if faster.

    `share` says whether they may run so; by default where no target is given.
    """
    groups = by_model(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"], models)
    share = not targets if share is None else share
    if share and len(groups) > 1 and _cores_alone():
        shared = before(sum(groups, []))
        if status := (_dvc(shared, progress) if shared else 0) or side_by_side(groups, models, progress):
            return status
    return _dvc(targets, progress)


def _dvc(targets, progress=None):
    process = _started(targets)
    _speak(process, progress)
    return process.wait()


def _cores_alone():
    import torch

    return cores() > 1 and not torch.cuda.is_available()


def choose_profile(name: str, path: Path = Path("params.yaml")) -> None:
    """Make another profile the active one, in params.yaml. Raises `InputError` if there is none of that name."""
    text = path.read_text(encoding="utf-8")
    known = yaml.safe_load(text)["profiles"]
    if name not in known:
        raise InputError(f"{path}: no profile {name!r}; accepted are {', '.join(known)}")
    changed, count = re.subn(r"(?m)^profile: *[\w-]+", f"profile: {name}", text, count=1)
    if not count:
        raise InputError(f"{path}: no line `profile:` to write {name} to")
    if changed != text:
        path.write_text(changed, encoding="utf-8")
        print(f"{path}: the profile is now {name}", flush=True)


def is_published(values: dict) -> bool:
    """Whether the active profile takes models from the repository in place of a training."""
    train = values["profiles"][values["profile"]]["train"]
    return any("published" in train[model] for model in values["models"])


def check_weights(values: dict) -> None:
    """Refuse scans of the user's own with weights that never saw them; raises `InputError`."""
    source = values["cohort"]["source"]
    if is_published(values) and check_source(source):
        raise InputError(
            f"cohort.source: {source} are scans of your own, but the weights of profile {values['profile']!r} "
            "never saw them; `make repro PROFILE=laptop` trains everything anew"
        )


def without_git() -> None:
    """Tell DVC to do without git where there is none, as in a download of the repository as a ZIP."""
    if not Path(".git").exists() and Path(".dvc").is_dir() and not LOCAL.exists():
        LOCAL.write_text("[core]\n    no_scm = true\n", encoding="utf-8")


@command
def main() -> int:
    die_with_parent()
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("targets", nargs="*", help="stages of dvc.yaml; the story and the paper if left out")
    cli.add_argument("--profile")
    cli.add_argument("--all", action="store_true", help="the supplements, too")
    args = cli.parse_args()
    without_git()
    if args.profile:
        choose_profile(args.profile)
    values = check_file()
    check_weights(values)
    check_own_scans(section(Cohort, values["cohort"], "cohort"))
    profile, out = values["profile"], Path("out") / values["profile"]
    if is_published(values) and not (out / FIRST_LOOK).is_file():
        subprocess.run([sys.executable, "-m", "bonelib.first_look", str(out)], **CHILD)
    targets = args.targets or ([] if args.all else STORY)
    own = Path("scratch/stage_seconds") / f"{profile}.json"  # of an earlier run on this machine
    measured = json.loads(SECONDS.read_text(encoding="utf-8")).get(profile, {})
    measured |= json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    stages = [name for name in before(targets, itself=True) if not name.endswith(".dvc")]
    progress = Progress(stages, measured, len(values["models"]) if _cores_alone() else 1)
    print(f"profile {profile}: {progress.remaining()}", flush=True)
    status = repro(values["models"], targets, progress, share=not args.targets)
    own.parent.mkdir(parents=True, exist_ok=True)
    write_json(own, progress.seconds)
    if status:
        subprocess.run(["dvc", "checkout", "--quiet", "--force"], stderr=subprocess.DEVNULL, **CHILD)
        return 2
    if (Path("out") / profile / "metrics/04_image_quality.json").is_file():  # not where targets end before
        print(closing_lines(profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
