"""`make repro`: check params.yaml, reproduce what is stale, and on failure put the earlier outputs back.

python -m bonelib.repro [STAGE ...] [--profile NAME] [--all]

runs the story 01-09 and the paper of the active profile, with --all the supplements too. --profile makes another
profile the active one, in params.yaml. DVC deletes a stage's outputs before it runs the stage; a mistake in the input
must not cost them. Without a GPU, stages that do not need each other run side by side.
"""

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Collection
from functools import cache
from pathlib import Path

import yaml

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import section
from bonelib.core.files import write_json
from bonelib.core.parallel import THREAD_SETTINGS, cores, die_with_parent
from bonelib.first_look import FILE as FIRST_LOOK
from bonelib.params import check_file
from bonelib.scans.cohort import check_own_scans, check_source
from bonelib.scans.config import Cohort

REPRO = ("dvc", "--wait-for-lock", "repro")
CHILD = {"preexec_fn": die_with_parent} if sys.platform == "linux" else {}  # Windows has no such option
LOCAL = Path(".dvc/config.local")
STORY = ["paper"]  # the stage that needs 01-09
RUNS, TOOK = re.compile(r"Running stage '([^']+)'"), re.compile(r"^(\S+): took (\d+) s$")  # lines of DVC and of stages
ALONE = {"ablation", "cost", "hagan", "native"}  # stages whose results are times
SECONDS = Path(__file__).with_name("stage_seconds.json")  # {profile: {stage: seconds}}, as measured on two cores


def closing_lines(profile: str) -> str:
    """What a run ends with: the measures of the samples beside those of real bones, and where everything lies."""
    out = Path("out") / profile
    found = json.loads((out / "metrics/04_image_quality.json").read_text(encoding="utf-8"))

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value + 0:.2f}".replace("-0.00", "0.00")

    def estimate(key: str) -> str:
        value, low, high = (number(found[f"{key}.{end}"]) for end in ("value", "low", "high"))
        return f"{value} ({low} to {high})" if low != "none" else f"{value} (no interval)"

    models = [key.removesuffix(".truncation") for key in found if key.endswith(".truncation")]
    rows = {"": [*models, "real bones"]}
    for name in ("density", "coverage", "precision", "recall"):
        real = number(found[f"{models[0]}.random3d.{name}.real_against_real"])
        rows[name] = [*(estimate(f"{model}.random3d.{name}") for model in models), real]
    for name in ("contours found", "closed slices", "fixed pattern", "Tb.BMD", "Tb.Th", "Tb.N"):
        rows[name] = [number(found[f"measured.{group}.{name}"]) for group in (*models, "real")]
    n = found[f"{models[0]}.random3d.density.n_fake"]
    lines = [f"{n} samples of each model of profile {profile}, beside real bones:"]
    lines += [f"  {name:16}" + "".join(f"{v:24}" for v in values).rstrip() for name, values in rows.items()]
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


def plan(targets: list[str]) -> dict[str, set[str]]:
    """{stage: the stages of these that it needs} of all that is stale of what `targets` need, themselves included.

    No targets are all stages; `train` stands for train@progan and all others of its kind. A stage is stale where DVC
    finds it changed, or where one that it needs is stale. Raises `InputError` for a target that is no stage.
    """
    from dvc.repo import Repo
    from networkx import descendants, topological_sort

    with Repo(_wait_for_lock=True) as repo, repo.lock:  # as `dvc --wait-for-lock` does
        graph = repo.index.graph
        names = {stage: {stage.addressing, stage.addressing.partition("@")[0]} for stage in graph}
        known = {name for own in names.values() for name in own if not name.endswith(".dvc")}
        if strange := [name for name in targets if name not in known]:
            raise InputError(f"dvc.yaml: no stage {strange[0]!r}; accepted are {', '.join(sorted(known))}")
        asked = [stage for stage, own in names.items() if own & set(targets) or not targets]
        wanted = {stage for own in asked for stage in (own, *descendants(graph, own))}
        stale: dict[str, set[str]] = {}
        for stage in reversed(list(topological_sort(graph))):  # whose edges lead to what is needed
            if stage in wanted and not stage.addressing.endswith(".dvc"):
                needs = {need.addressing for need in descendants(graph, stage)} & stale.keys()
                if needs or stage.status():
                    stale[stage.addressing] = needs
    return stale


def order(needs: dict[str, set[str]], seconds: dict[str, float]) -> list[str]:
    """The stages by what waits for them: first those from which the way to the end is longest in seconds."""
    usual = sum(seconds.values()) / len(seconds) if seconds else 1.0

    @cache
    def way(name: str) -> float:
        after = (way(other) for other in needs if name in needs[other])
        return seconds.get(name, usual) + max(after, default=0.0)

    return sorted(needs, key=way, reverse=True)


def repro(needs: dict[str, set[str]], lanes: int, seconds: dict[str, float]) -> int:
    """Reproduce the stages of a `plan`, at most `lanes` at a time, each by a `dvc repro` of its own and with its share
    of the cores, as soon as all that it needs is there. Stages that measure times run alone.

    `seconds` {stage: seconds} are those measured, and follow what stages say that they took. Every line begins with the
    name of its stage, and where one begins, what is left is said. Returns the first status that is not 0.
    """
    left, running, heard, status = order(needs, seconds), set(), queue.SimpleQueue(), 0
    while left or running:
        ready = [name for name in left if not needs[name] & {*left, *running}]
        ready = [name for name in ready if name.partition("@")[0] not in ALONE] or ([] if running else ready[:1])
        while ready and len(running) < lanes and not running & ALONE and not status:
            share = max(1, cores() // min(lanes, len(running) + len(ready)))
            _start(name := ready.pop(0), share, heard)
            left.remove(name)
            running.add(name)
        if not running:
            break
        name, said = heard.get()
        if isinstance(said, int):
            running.remove(name)
            status = status or said
            continue
        print(f"{name}: {said}", end="", flush=True)
        if took := TOOK.search(said):
            seconds[took[1]] = int(took[2])
        if begins := RUNS.search(said):
            print(f"{begins[1]}: {remaining([*left, *running], seconds, lanes)}", flush=True)
    return status


def _start(name: str, threads: int, heard: queue.SimpleQueue) -> None:
    # One item: DVC locks whatever it looks at, also upstream of a target, against the others
    how = dict(stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    env = os.environ | dict.fromkeys(THREAD_SETTINGS, str(threads))
    process = subprocess.Popen([*REPRO, "--single-item", name], env=env, **how, **CHILD)

    def listen():
        for line in process.stdout:
            heard.put((name, line))
        heard.put((name, process.wait()))

    threading.Thread(target=listen).start()


def remaining(stages: Collection[str], seconds: dict[str, float], abreast: int) -> str:
    """As "5 stages left, about 4 min"; without the time where nothing was measured."""
    count, known = len(stages), [seconds[name] for name in stages if name in seconds]
    says = f"{count} stage{'s' * (count != 1)} left"
    if not known:
        return says
    about = sum(known) * count / len(known) / min(abreast, count)
    return f"{says}, about {about:.0f} s" if about < 90 else f"{says}, about {about / 60:.0f} min"


def lanes() -> int:
    """How many stages run at a time: one on a GPU, else two or more, as small networks do not keep cores busy."""
    import torch

    return 1 if torch.cuda.is_available() else min(cores(), max(2, cores() // 4), 4)


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
        says = f"{source} are scans of your own, but the weights of profile {values['profile']!r} never saw them"
        raise InputError(f"cohort.source: {says}; `make repro PROFILE=laptop` trains everything anew")


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
    needs, abreast = plan(targets), lanes()
    if not needs:
        print("Data and pipelines are up to date.")
    print(f"profile {profile}: {remaining(needs, measured, abreast)}", flush=True)
    status = repro(needs, abreast, measured)
    write_json(own, measured)
    if status:
        subprocess.run(["dvc", "checkout", "--quiet", "--force"], stderr=subprocess.DEVNULL, **CHILD)
        return 2
    if (out / "metrics/04_image_quality.json").is_file():  # not where targets end before
        print(closing_lines(profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
