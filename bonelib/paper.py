"""The stage `paper`: paper/paper.typ, compiled from the metrics and figures of a profile and from nothing else.

python -m bonelib.paper OUT TARGET [--supplements]

writes the PDF to OUT/TARGET, and beside it a table of every number in it: what is shown, its file and its key. The
supplements are read with --supplements alone, so that what a stage depends on is what it reads.
"""

import argparse
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import section
from bonelib.core.provenance import flat
from bonelib.evaluation.statistics import patient_interval
from bonelib.latent.config import Inversion
from bonelib.scans.config import Preprocess
from bonelib.scans.tables import write_table
from bonelib.training.config import Train, training_section

SOURCE = Path("paper/paper.typ")
PUBLISHED_PROFILE = "paper"  # the profile whose models are those of the publication
INTERVAL_LEVEL = inspect.signature(patient_interval).parameters["level"].default


def facts(out: Path, target: str, supplements: bool) -> dict[str, Any]:
    """What the paper is told beside metrics and figures; `metrics` lists the stages whose numbers it may read."""
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    profile, models = out.name, values["models"]
    if profile not in values["profiles"]:
        raise InputError(f"{out}: no folder of a profile; accepted are out/{', out/'.join(values['profiles'])}")
    own, published = values["profiles"][profile], values["profiles"][PUBLISHED_PROFILE]
    stages = sorted(path.stem for path in (out / "metrics").glob("*.json"))
    configs = {model: _config(out, model) for model in models}
    drawn = {m: training_section(config["train"], "train", m).generator for m, config in configs.items()}
    settings = {"interval level": INTERVAL_LEVEL, "voxel_mm": own["voxel_mm"], "published": _unstated(published)}
    settings["preprocess"] = section(Preprocess, own["preprocess"], "preprocess").model_dump(mode="json")
    return {
        "out": f"/{out.as_posix()}",
        "profile": profile,
        "models": models,
        "metrics": [stage for stage in stages if supplements or not stage.startswith("S")],
        "wide": {m: f"{m} {how.untruncated:g}" for m, how in drawn.items()},
        "narrow": {m: f"{m} {how.truncation:g}" for m, how in drawn.items()},
        "settings": dict(flat(settings)),
        "seed": values["seed"],
        "phantom": values["cohort"]["source"].startswith("bonelib/scans/phantom"),
        "published": any("published" in own["train"][model] for model in models),
        "superres": any("superres" in config for config in configs.values()),
        "departures": [row for model in models for row in departures(model, configs[model], own, published)],
        "table": Path(target).with_suffix(".csv").name,
        "pictures": sorted(path.relative_to(out / "figures").as_posix() for path in out.glob("figures/**/*.png")),
    }


def departures(model: str, config: dict, own: dict, published: dict) -> list[dict]:
    """Where a model was trained and inverted otherwise than published: rows model, key, published, here.

    How it was trained is what its config.json says, how it was published is the model of that name, or else of its
    kind, in the profile `paper`.
    """
    kind = model if model in published["train"] else config["train"]["generator"]["kind"]
    pairs = [("train", training_section, config["train"], published["train"][kind])]
    pairs.append(("inversion", partial(section, Inversion), own["inversion"][model], published["inversion"][kind]))
    rows = []
    for name, checked, found, given in pairs:
        here, there = (dict(flat(checked(values, name).model_dump(mode="json"))) for values in (found, given))
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key) and not key.endswith(".published"):
                row = {"model": model, "key": f"{name}.{key}", "published": there.get(key), "here": here.get(key)}
                rows.append(row)
    return rows


def _config(out: Path, model: str) -> dict:
    path = out / "models" / model / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no config.json of a model ({error}); run the stage `select` first") from None


def _unstated(published: dict) -> dict:
    """What the publication does not say and the profile `paper` had to choose."""
    train = section(Train, published["train"]["progan"], "train")
    encoder = section(Inversion, published["inversion"]["progan"], "inversion").encoder
    return {"penalty": train.penalty, "drift": train.drift, "encoder samples": encoder.samples}


def compiled(told: dict[str, Any], selector: str | None = None, source: Path = SOURCE, root: str | Path = ".") -> Any:
    """The paper as PDF bytes, or what a typst query says of it, from what `facts` returned.

    Raises `InputError` with the sentence of the compiler where a metric or figure is missing or a claim is false.
    """
    import typst

    how = dict(root=str(root), sys_inputs={"facts": json.dumps(told)}, ignore_system_fonts=True)
    try:
        return json.loads(typst.query(str(source), selector, **how)) if selector else typst.compile(str(source), **how)
    except (typst.TypstError, RuntimeError) as error:  # a query raises the latter
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None


def build(out: str | Path, target: str, *, supplements: bool = False) -> list[dict]:
    """Compile the paper of the folder `out` to `out`/`target`; returns its numbers: shown, source, key, value."""
    out = Path(out)
    told = facts(out, target, supplements)
    pdf, marks = compiled(told), [found["value"] for found in compiled(told, "<num>")]
    numbers = [{key: mark[key] for key in ("shown", "source", "key", "value")} for mark in marks]
    (out / target).write_bytes(pdf)
    write_table((out / target).with_suffix(".csv"), numbers)
    return numbers


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("out", type=Path)
    cli.add_argument("target")
    cli.add_argument("--supplements", action="store_true", help="read the metrics of S1 and so on, too")
    args = cli.parse_args()
    numbers = build(args.out, args.target, supplements=args.supplements)
    print(f"{args.out / args.target}: {len(numbers)} numbers, each with its key in {Path(args.target).stem}.csv")


if __name__ == "__main__":
    sys.exit(main())
