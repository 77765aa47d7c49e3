"""What a training of a GAN leaves: weights, the JSON that says how to use them, curves, and what it kept on the way."""

import json
import shutil
from pathlib import Path

from bonelib.training import checkpoint
from bonelib.training.config import Train
from bonelib.training.run import Progress, write_curves

CURVES = ("seen", "update", "stage", "fade", "critic_loss", "distance", "slope", "generator_loss")
CURVES += ("sign", "augmented", "overfit")  # of the scores of pairs; the probability of the adaptive augmentation


def write_model(
    folder: Path,
    params: Train,
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
) -> None:
    """Write a model folder. `average` is the generator, `candidates` are the files of its snapshots, `began` the
    digests of the weights that it started from."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "generator.safetensors", average.state_dict())
    checkpoint.save_tensors(folder / "critic.safetensors", critic.state_dict())
    checkpoint.save_tensors(folder / "growth.safetensors", growth)
    write_curves(folder / "curves.csv", CURVES, at)
    shutil.rmtree(folder / "candidates", ignore_errors=True)
    for path in candidates:
        (folder / "candidates").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "candidates" / path.name)
    parts = ["generator", "critic"]
    content = {"run": run, "train": json.loads(params.model_dump_json()), "data": meta, "seen": at.seen}
    content |= {"started_from": began} if began else {}
    if superres is not None:
        for name in ("superres", "superres-critic"):
            shutil.copyfile(Path(superres) / f"{name}.safetensors", folder / f"{name}.safetensors")
        content["superres"] = json.loads((Path(superres) / "config.json").read_text(encoding="utf-8"))["superres"]
        shutil.copyfile(Path(superres) / "record.json", folder / "superres-record.json")
        parts += ["superres", "superres-critic"]
    content["sha256"] = {name: checkpoint.digest(folder / f"{name}.safetensors") for name in parts}
    checkpoint.write_json(folder / "config.json", content)
