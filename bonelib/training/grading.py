"""Train the network that grades motion, grade every scan, and say how far the grades can be trusted (section 3.3).

A fold never sees the patients that it grades. Depth windows of a scan are graded one by one and averaged.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError, core
from bonelib.core.config import fingerprint
from bonelib.core.provenance import code_hash
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.networks import layers, numerics, resnet
from bonelib.networks.numerics import compute_dtype
from bonelib.networks.resnet import ResNet
from bonelib.scans import dataset
from bonelib.scans.dataset import Stacks, augmented
from bonelib.scans.tables import write_table
from bonelib.training import checkpoint, run
from bonelib.training.config import Grading

GRADES = (1, 2, 3, 4, 5)
WINDOWS_MG = ((300.0, 600.0), (12.0, 100.0))  # mg HA/cm3, centre and half width: of bone, and of soft tissue
JITTER = (0.05, 0.01)  # contrast and brightness, half the range, in the unit of the input
WARM_UP = 0.15  # share of the updates over which the rate rises; then it falls as a cosine
CLIP = 2.0
# Networks of other code are not kept
CODE = code_hash(layers, numerics, resnet, dataset, core, run, sys.modules[__name__])
COLUMNS = ("scan", "patient", "grade", "given", "predicted", "origin")


def scans_of(data: Stacks) -> list[dict]:
    """One dictionary a scan: scan, patient, volume, and `given`, its grade 1-5 or None. Raises `InputError`."""
    scans = {}
    for row in data.rows:
        given = (row.get("grade") or "").strip()
        if given not in ("", *map(str, GRADES)):
            raise InputError(f"stacks.csv: scan {row['scan']} has grade {given!r}; accepted are 1 to 5, or none")
        known = dict(scan=row["scan"], patient=row["patient"], volume=row["volume"])
        scans[row["scan"]] = known | {"given": int(given) if given else None}
    return list(scans.values())


def patient_folds(scans: list[dict], count: int, seed: int) -> dict[str, int]:
    """The fold of every patient; dealt out by their mean grade, so that each fold has all grades if it can."""
    patients = sorted({s["patient"] for s in scans})
    mean = {p: np.mean([s["given"] for s in scans if s["patient"] == p]) for p in patients}
    mixed = sorted(numpy_rng(seed, "grading folds").permutation(patients).tolist(), key=mean.get)
    return {patient: i % count for i, patient in enumerate(mixed)}


def train_grader(how: Grading, data: Stacks, folder: str | Path, *, state: str | Path, seed: int, say=print) -> list:
    """Grade all scans, and write grades.csv and, if one could be trained, the grader to `folder`; returns the rows.

    Given grades are kept as `grade`; their `predicted` (expected grade) comes from the fold that did not see the
    patient. Scans without a grade get that of the grader trained on all graded scans, which is written; "none" where
    there are not two different grades from two patients. Finished networks are kept in `state`.
    """
    folder, state = Path(folder), Path(state)
    scans = scans_of(data)
    graded = [s for s in scans if s["given"]]
    rest = [s for s in scans if not s["given"]]
    found, patients = {s["given"] for s in graded}, {s["patient"] for s in graded}
    folder.mkdir(parents=True, exist_ok=True)
    if len(found) < 2 or len(patients) < 2:
        for name in ("grader.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)
        says = f"{len(found)} different grades of {len(patients)} patients; two of each are needed"
        say(f"no grader was trained: stacks.csv has {says}", flush=True)
        return _written(folder, [_row(s, None) for s in scans])

    folds = patient_folds(graded, count := min(how.folds, len(patients)), seed)
    identity = fingerprint(how, data.meta["data_hash"], data.meta["intensity"], seed, CODE, graded)
    predicted = {}
    with checkpoint.locked(state):
        for fold in range(count):
            inside = [s for s in graded if folds[s["patient"]] != fold]
            asked = [s for s in graded if folds[s["patient"]] == fold]
            predicted |= _fold(how, data, inside, asked, state, f"fold {fold + 1} of {count}", identity, seed, say)[1]
        tensors, of_rest = _fold(how, data, graded, rest, state, "all scans", identity, seed, say)
        predicted |= of_rest
    checkpoint.save_tensors(folder / "grader.safetensors", tensors)
    content = {"run": identity, "grading": how.model_dump(mode="json"), "data": data.meta}
    content |= {"windows": _unit_windows(data.meta["intensity"]), "scans": len(graded), "patients": len(patients)}
    content |= {"outputs": "logits of the grade being above 1, 2, 3 and 4"}
    content |= {"sha256": {"grader": checkpoint.digest(folder / "grader.safetensors")}}
    checkpoint.write_json(folder / "config.json", content)
    return _written(folder, [_row(s, predicted[s["scan"]]) for s in scans])


def grade_all(folder: str | Path, data: Stacks) -> list:
    """Grade all scans by the grader in `folder`, which knew none of their patients; writes grades.csv.

    Raises `InputError` if it was made for volumes of another voxel size or intensity map.
    """
    net, config = load_grader(folder)
    for key in ("spacing_mm", "intensity"):
        if config["data"][key] != data.meta[key]:
            says = f"made for {key} {config['data'][key]}, but that of the scans is {data.meta[key]}"
            raise InputError(f"{Path(folder) / 'config.json'}: {says}")
    depth = config["grading"]["depth"]
    scans = scans_of(data)
    chances = [exceedance_probabilities(net, data.volumes[s["volume"]], depth).tolist() for s in scans]
    return _written(Path(folder), [_row(*pair) for pair in zip(scans, chances, strict=True)])


def load_grader(folder: str | Path) -> tuple[ResNet, dict]:
    """The grader of a model folder and its config. Raises `InputError` naming the missing file."""
    folder = Path(folder)
    for name in ("grader.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; no grader was trained, or this is another folder")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    net = build_grader(Grading(**config["grading"]), config["data"]["intensity"])
    net.load_state_dict(checkpoint.load_file(folder / "grader.safetensors"))
    return net.eval(), config


def known_grader(folder: str | Path) -> tuple[ResNet, dict] | None:
    """`load_grader`, or None where `train_grader` has left grades.csv without one, for want of different grades."""
    folder = Path(folder)
    if (folder / "grades.csv").is_file() and not (folder / "grader.safetensors").is_file():
        return None
    return load_grader(folder)


def build_grader(how: Grading, intensity) -> ResNet:
    """The network that a `Grading` section describes, for volumes with these densities at 0 and 1."""
    return ResNet(how.widths, how.blocks, _unit_windows(intensity), dtype=compute_dtype(how.precision))


def _unit_windows(intensity) -> list[list[float]]:
    """The grey windows in the unit of the input."""
    low, high = intensity
    return [[(centre - low) / (high - low), width / (high - low)] for centre, width in WINDOWS_MG]


def exceedance_probabilities(net: ResNet, volume: np.ndarray, depth: int) -> Tensor:
    """P(grade > 1, 2, 3, 4) of one volume (z, y, x) in [0, 1]: mean over windows of `depth` slices that cover it."""
    slices = len(volume)
    depth, count = min(depth, slices), -(-slices // depth)
    starts = np.linspace(0, slices - depth, count).round().astype(int)
    with torch.no_grad():
        parts = torch.stack([torch.from_numpy(np.asarray(volume[s : s + depth], np.float32)) for s in starts])
        return torch.sigmoid(net(parts[:, None])).mean(0)


def _fold(how, data, inside, asked, state, name, identity, seed, say) -> tuple[dict, dict]:
    """Weights of the network trained on the scans `inside`, and its P(grade > k) of the scans `asked`."""
    folder = state / name.replace(" ", "-")
    file = folder / "done.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        whole = meta["run"] == identity and checkpoint.digest(folder / "done.safetensors") == meta["sha256"]
    except (OSError, ValueError, KeyError):
        whole = False
    if whole:
        say(f"{name}: kept from an earlier run", flush=True)
        return checkpoint.load_file(folder / "done.safetensors"), meta["predicted"]
    net = train_network(how, data, inside, folder, name, identity, seed, say)
    predicted = {s["scan"]: exceedance_probabilities(net, data.volumes[s["volume"]], how.depth).tolist() for s in asked}
    checkpoint.save_tensors(folder / "done.safetensors", net.state_dict())
    sha256 = checkpoint.digest(folder / "done.safetensors")
    checkpoint.write_json(file, dict(run=identity, sha256=sha256, predicted=predicted))
    return net.state_dict(), predicted


def train_network(how: Grading, data: Stacks, scans: list[dict], state, name, identity, seed, say) -> ResNet:
    """A network that grades, of scans as in `scans_of`; it goes on bit for bit from what is in the folder `state`."""
    torch.manual_seed(torch_rng(seed, "grading weights", name).initial_seed())
    net = build_grader(how, data.meta["intensity"])
    adam = torch.optim.AdamW(net.parameters(), lr=how.rate, weight_decay=how.decay)

    def train_step(at: run.Progress) -> dict[str, float]:
        adam.param_groups[0]["lr"] = how.rate * _one_cycle(at.seen / at.end, 1 / 25, 1, 4e-6)
        adam.param_groups[0]["betas"] = (_one_cycle(at.seen / at.end, 0.95, 0.85, 0.95), 0.999)
        volumes, grades = batch(how, data, scans, name, seed, at.seen // how.batch)
        wanted = (grades[:, None] > torch.tensor(GRADES[:-1])).float()
        loss = F.binary_cross_entropy_with_logits(net(volumes), wanted)
        at.count(run.update(adam, loss, CLIP))
        at.seen += how.batch
        return {"loss": loss.item()}

    end, where = max(2, how.samples // how.batch) * how.batch, dict(state=state, fingerprint=identity, name=name)
    run.run(train_step, dict(net=net, adam=adam), end=end, **where, say=say)
    return net.eval()


def _one_cycle(share: float, start: float, top: float, end: float) -> float:
    """What rate and momentum are at a share of the training: to `top` over `WARM_UP` of it, then to `end`, by cosines
    (Smith and Topin 2019)."""
    first = share < WARM_UP
    low, way = (start, 1 - share / WARM_UP) if first else (end, (share - WARM_UP) / (1 - WARM_UP))
    return low + (top - low) * (1 + math.cos(math.pi * way)) / 2


def batch(how: Grading, data: Stacks, scans: list[dict], name: str, seed: int, update: int) -> tuple[Tensor, Tensor]:
    """Windows (n, 1, z, y, x) and their grades (n,), every grade equally often, for the update of that number."""
    rng = numpy_rng(seed, "grading batch", name, update)
    by_grade = [[s for s in scans if s["given"] == g] for g in sorted({s["given"] for s in scans})]
    turns = np.arange(update * how.batch, (update + 1) * how.batch) % len(by_grade)
    chosen = [by_grade[t][rng.integers(len(by_grade[t]))] for t in turns]
    slices = data.volumes.shape[1]
    depth = min(how.depth, slices)
    parts = []
    for scan in chosen:
        start = rng.integers(slices - depth + 1)
        part = torch.from_numpy(data.volumes[scan["volume"], start : start + depth].astype(np.float32))
        # Motion looks the same in a mirror, and mirroring smooths nothing, as every interpolation does
        parts.append(part.flip([axis for axis in range(3) if rng.random() < 0.5]) if how.mirror else part)
    volumes = augmented(torch.stack(parts)[:, None], update * how.batch, seed, how.augment)
    gain = 1 + JITTER[0] * torch.from_numpy(rng.uniform(-1, 1, len(parts))).float()
    shift = JITTER[1] * torch.from_numpy(rng.uniform(-1, 1, len(parts))).float()
    volumes = volumes * gain[:, None, None, None, None] + shift[:, None, None, None, None]
    return volumes.clamp(0, 1), torch.tensor([s["given"] for s in chosen])


def _row(scan: dict, chances) -> dict:
    """A row of grades.csv; `chances` are P(grade > 1, 2, 3, 4), whose sum and one is the expected grade."""
    expected = None if chances is None else 1 + sum(chances)
    rounded = None if expected is None else int(np.clip(round(expected), *GRADES[:: len(GRADES) - 1]))
    origin = "given" if scan["given"] else "predicted" if chances is not None else "none"
    values = dict(grade=scan["given"] or rounded, given=scan["given"], predicted=expected and round(expected, 4))
    values = {key: "" if value is None else value for key, value in values.items()}
    return {"scan": scan["scan"], "patient": scan["patient"], **values, "origin": origin}


def _written(folder: Path, rows: list[dict]) -> list[dict]:
    rows = [{key: row[key] for key in COLUMNS} for row in rows]
    checkpoint.write_whole(folder / "grades.csv", lambda part: write_table(part, rows))
    return rows
