"""What a training of a GAN leaves: weights, the JSON that says how to use them, curves, and what it kept on the way."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from bonelib import InputError
from bonelib.scans.dataset import Stacks, halved, set_apart
from bonelib.training import checkpoint, schedule
from bonelib.training.config import HierarchicalTrain, Train
from bonelib.training.distributed import Ranks
from bonelib.training.run import Progress, write_curves

CURVES = ("seen", "update", "stage", "fade", "critic_loss", "distance", "slope", "generator_loss")
CURVES += ("sign", "augmented", "overfit")  # of the scores of pairs; the probability of the adaptive augmentation


class Trained(NamedTuple):
    """What a step works with; `pools(stage)`, of a progressive training, are the stacks of a split on that grid."""

    params: Train | HierarchicalTrain
    data: Stacks
    objects: dict
    seed: int
    ranks: Ranks
    state: Path | None = None
    pools: Callable[[int], dict[str, Tensor]] | None = None


class Strip:
    """Samples of fixed latents, kept along the training, as float16 by the samples seen."""

    def __init__(self):
        self.kept: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept

    def load_state_dict(self, kept: dict[str, Tensor]) -> None:
        self.kept = kept


def own_grid(params: Train | HierarchicalTrain, data: Stacks, superres: str | Path | None) -> tuple[Stacks, int]:
    """The stacks on the grid that the generator draws, without validation patients, and the halvings to get there."""
    if (slices := data.meta["stack_slices"]) < params.slices:
        raise InputError(f"params.yaml: train: the generator draws {params.slices} slices; the stacks have {slices}")
    coarser = round(math.log2(slices / params.slices))
    if coarser and superres is not None and not (Path(superres) / "superres.safetensors").is_file():
        raise InputError(f"{superres}: no superres.safetensors; the stages end on a grid too coarse to do without")
    data = halved(data, coarser)
    return set_apart(data, params.snapshots.validation) if params.snapshots else data, coarser


def keep_snapshot(
    params: Train | HierarchicalTrain, average: nn.Module, at: Progress, begun: int, state: Path, ranks: Ranks
) -> None:
    """The generator's running average, where the plan asks for a snapshot in a step that began at `begun` samples; a
    new training removes older ones."""
    wanted, plan = params.snapshots, params.plan
    if ranks.rank == 0 and at.steps == 0:
        shutil.rmtree(state / "snapshots", ignore_errors=True)
    if wanted:
        due = [schedule.snapshots(plan, wanted.number, wanted.part, seen) for seen in (begun, at.seen)]
        if due[1] > due[0]:
            at.own["snapshots"] = [*at.own.get("snapshots", ()), at.seen]
            if ranks.rank == 0:
                checkpoint.save_tensors(_snapshot(state, at.seen), average.state_dict())


def kept_snapshots(at: Progress, state: Path) -> list[Path]:
    """The files of the snapshots that a training has kept in `state`."""
    return [_snapshot(state, seen) for seen in at.own.get("snapshots", ())]


def _snapshot(state: Path, seen: int) -> Path:
    return state / "snapshots" / f"{seen:010d}.safetensors"


def start_networks(objects: dict, start: str | Path | None, say) -> dict[str, str]:
    """Fill the networks from the model folder `start`, if given, and the running average likewise; returns the digests
    of what was found there."""
    names = [name for name in ("generator", "critic", "encoder") if name in objects]
    began = checkpoint.start_from(start, {name: objects[name] for name in names}, say)
    objects["average"].load_state_dict(objects["generator"].state_dict())
    return began


def write_model(
    folder: Path,
    params: Train | HierarchicalTrain,
    meta: dict,
    *,
    average,
    critic,
    growth: dict,
    candidates: list[Path],
    run: str,
    at: Progress,
    superres: str | Path | None,
    began: dict[str, str] | None = None,
    columns: tuple[str, ...] = CURVES,
    more: dict[str, nn.Module] | None = None,
) -> None:
    """Write a model folder. `average` is the generator, `candidates` are the files of its snapshots, `began` the
    digests of the weights that it started from, `columns` those of the curves, `more` networks beside the two."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "generator.safetensors", average.state_dict())
    checkpoint.save_tensors(folder / "critic.safetensors", critic.state_dict())
    checkpoint.save_tensors(folder / "growth.safetensors", growth)
    write_curves(folder / "curves.csv", columns, at)
    shutil.rmtree(folder / "candidates", ignore_errors=True)
    for path in candidates:
        (folder / "candidates").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "candidates" / path.name)
    parts = ["generator", "critic", *(more or {})]
    for name, network in (more or {}).items():
        checkpoint.save_tensors(folder / f"{name}.safetensors", network.state_dict())
    content = {"run": run, "train": json.loads(params.model_dump_json()), "data": meta, "seen": at.seen}
    content |= {"started_from": began} if began else {}
    if superres is not None:
        for name in ("superres", "superres-critic"):
            shutil.copyfile(Path(superres) / f"{name}.safetensors", folder / f"{name}.safetensors")
        content["superres"] = json.loads((Path(superres) / "config.json").read_text(encoding="utf-8"))["superres"]
        records = (Path(superres) / name for name in ("superres-record.json", "record.json"))  # of a model, or its own
        shutil.copyfile(next(path for path in records if path.is_file()), folder / "superres-record.json")
        parts += ["superres", "superres-critic"]
    content["sha256"] = {name: checkpoint.digest(folder / f"{name}.safetensors") for name in parts}
    checkpoint.write_json(folder / "config.json", content)
