"""Train the network that grades motion, grade every scan, and say how far the grades can be trusted (section 3.3).

A fold never sees the patients that it grades. Depth windows of a scan are graded one by one and averaged.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError, randomness
from bonelib.networks import layers, resnet
from bonelib.networks.resnet import ResNet
from bonelib.params import Grading, fingerprint
from bonelib.provenance import code_hash
from bonelib.randomness import numpy_rng, torch_rng
from bonelib.scans import dataset
from bonelib.scans.dataset import EXCLUDED_GRADES, Stacks, augmented
from bonelib.scans.tables import write_table
from bonelib.training import checkpoint

GRADES = (1, 2, 3, 4, 5)
WINDOWS_MG = ((300.0, 600.0), (12.0, 100.0))  # mg HA/cm3, centre and half width: of bone, and of soft tissue
JITTER = (0.05, 0.01)  # contrast and brightness, half the range, in the unit of the input
WARM_UP = 0.15  # share of the updates over which the rate rises; then it falls as a cosine
CLIP = 2.0
SAY_EVERY_S = 10.0
# Networks of other code are not kept
CODE = code_hash(layers, resnet, dataset, randomness, sys.modules[__name__])
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
    patient. Scans without a grade get that of the grader trained on all graded scans, which is the one that is
    written (grader.safetensors, config.json). Without two different grades from two patients none is trained, and
    ungraded scans get no grade and the origin "none". Finished networks are kept in `state` and not trained again.
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
    run = fingerprint(how, data.meta["data_hash"], data.meta["intensity"], seed, CODE, graded)
    clock = _Clock(how.samples * (count + 1), say)
    predicted = {}
    with checkpoint.locked(state):
        for fold in range(count):
            inside = [s for s in graded if folds[s["patient"]] != fold]
            asked = [s for s in graded if folds[s["patient"]] == fold]
            predicted |= _fold(how, data, inside, asked, state, f"fold {fold + 1} of {count}", run, seed, clock)[1]
        tensors, of_rest = _fold(how, data, graded, rest, state, "all scans", run, seed, clock)
        predicted |= of_rest
    checkpoint.save_tensors(folder / "grader.safetensors", tensors)
    content = {
        "run": run,
        "grading": json.loads(how.model_dump_json()),
        "windows": unit_windows(data.meta["intensity"]),
        "outputs": "logits of the grade being above 1, 2, 3 and 4",
        "data": data.meta,
        "scans": len(graded),
        "patients": len(patients),
        "sha256": {"grader": checkpoint.digest(folder / "grader.safetensors")},
    }
    checkpoint.write_json(folder / "config.json", content)
    return _written(folder, [_row(s, predicted[s["scan"]]) for s in scans])


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
    return ResNet(how.widths, how.blocks, unit_windows(intensity), dtype=getattr(torch, how.precision))


def unit_windows(intensity) -> list[list[float]]:
    """The grey windows in the unit of the input."""
    low, high = intensity
    return [[(centre - low) / (high - low), width / (high - low)] for centre, width in WINDOWS_MG]


def above(net: ResNet, volume: np.ndarray, depth: int) -> Tensor:
    """P(grade > 1, 2, 3, 4) of one volume (z, y, x) in [0, 1]: mean over windows of `depth` slices that cover it."""
    slices = len(volume)
    depth, count = min(depth, slices), -(-slices // depth)
    starts = np.linspace(0, slices - depth, count).round().astype(int)
    with torch.no_grad():
        parts = torch.stack([torch.from_numpy(np.asarray(volume[s : s + depth], np.float32)) for s in starts])
        return torch.sigmoid(net(parts[:, None])).mean(0)


def _fold(how, data, inside, asked, state, name, run, seed, clock) -> tuple[dict, dict]:
    """Weights of the network trained on the scans `inside`, and its P(grade > k) of the scans `asked`."""
    file = state / f"{name.replace(' ', '-')}.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        whole = meta["run"] == run and checkpoint.digest(file.with_suffix(".safetensors")) == meta["sha256"]
    except (OSError, ValueError, KeyError):
        whole = False
    if whole:
        clock.skip(how.samples, name)
        return checkpoint.load_file(file.with_suffix(".safetensors")), meta["predicted"]
    net = _trained(how, data, inside, name, seed, clock)
    predicted = {s["scan"]: above(net, data.volumes[s["volume"]], how.depth).tolist() for s in asked}
    checkpoint.save_tensors(file.with_suffix(".safetensors"), net.state_dict())
    sha256 = checkpoint.digest(file.with_suffix(".safetensors"))
    checkpoint.write_json(file, dict(run=run, sha256=sha256, predicted=predicted))
    return net.state_dict(), predicted


def _trained(how: Grading, data: Stacks, scans: list[dict], name: str, seed: int, clock) -> ResNet:
    torch.manual_seed(torch_rng(seed, "grading weights", name).initial_seed())
    net = build_grader(how, data.meta["intensity"])
    adam = torch.optim.AdamW(net.parameters(), lr=how.rate, weight_decay=how.decay)
    updates = max(2, how.samples // how.batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, how.rate, total_steps=updates, pct_start=WARM_UP)
    for update in range(updates):
        volumes, grades = batch(how, data, scans, name, seed, update)
        wanted = (grades[:, None] > torch.tensor(GRADES[:-1])).float()
        loss = F.binary_cross_entropy_with_logits(net(volumes), wanted)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        rate.step()
        clock.tick(how.batch, name, loss.item(), last=update == updates - 1)
    return net.eval()


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


class _Clock:
    """Progress over all networks: samples seen, rate, and time left."""

    def __init__(self, total: int, say):
        self.total, self.say, self.seen, self.done = total, say, 0, 0
        self.began = self.said = time.monotonic()

    def skip(self, samples: int, name: str) -> None:
        self.seen += samples
        self.say(f"{name}: kept from an earlier run", flush=True)

    def tick(self, samples: int, name: str, loss: float, last: bool) -> None:
        self.seen, self.done, now = self.seen + samples, self.done + samples, time.monotonic()
        if last or now - self.said > SAY_EVERY_S:
            self.said, rate = now, self.done / (now - self.began)
            left = max(0.0, (self.total - self.seen) / rate / 60)
            line = f"{name} | {self.seen}/{self.total} samples | {rate:.1f}/s | loss {loss:.2f}"
            self.say(f"{line} | about {left:.1f} min left", flush=True)


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


def confusion(rows: list[dict]) -> list[dict]:
    """Counts of scans by given grade (rows) and predicted grade (columns), of those that have both."""
    given, predicted = _pairs(rows)[:2]
    return [
        {"given": g, **{f"predicted {p}": int(((given == g) & (predicted == p)).sum()) for p in GRADES}} for g in GRADES
    ]


def scores(rows: list[dict], seed: int, draws: int) -> list[dict]:
    """How well the predicted grades meet the given ones, out of fold: one row a measure.

    Rows: measure, value, the 95 % interval low and high with whole patients resampled, chance (the best that one
    grade for all scans reaches; 1/k for the balanced accuracy of k grades, 0 for kappa), n scans, n patients.
    """
    given, predicted, patients = _pairs(rows)
    if not len(given):
        return []
    table = []
    for name, measure in MEASURES.items():
        chance = np.nanmax([measure(given, np.full_like(given, g)) for g in GRADES])
        table.append(_scored(name, measure, given, predicted, patients, float(chance), seed, draws))
    return table


def _scored(name: str, measure, a: np.ndarray, b: np.ndarray, patients, chance: float, seed: int, draws: int) -> dict:
    names, index = np.unique(patients, return_inverse=True)
    members = [np.flatnonzero(index == i) for i in range(len(names))]
    rng = numpy_rng(seed, "grading interval")
    picks = [np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))]) for _ in range(draws)]
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold one grade alone
        drawn = np.array([measure(a[p], b[p]) for p in picks])
        found = dict(value=measure(a, b), chance=chance)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    found = {key: float(v) if np.isfinite(v) else None for key, v in (found | dict(low=low, high=high)).items()}
    ordered = {key: found[key] for key in ("value", "low", "high", "chance")}
    return {"measure": name, **ordered, "n_scans": len(a), "n_patients": len(names)}


def noise_level(volume: np.ndarray, block: int = 8) -> float:
    """SD of the noise of a volume (z, y, x), in its unit, from the change between slices in soft tissue.

    Blocks of 8 x 8 voxels, of whose SDs the lowest fifth is soft tissue; streaks hardly change between slices.
    Among phantoms of .24 mm it follows the true noise with r = .98 at every motion grade.
    """
    change = np.diff(np.asarray(volume, np.float32), axis=0)
    z, y, x = change.shape[0], change.shape[1] // block, change.shape[2] // block
    blocks = change[:, : y * block, : x * block].reshape(z, y, block, x, block)
    return float(np.quantile(blocks.std(axis=(2, 4)), 0.2) / np.sqrt(2))


def noise_scores(rows: list[dict], noise: np.ndarray, seed: int, draws: int) -> list[dict]:
    """Correlation of the expected grade with the noise among scans of the same given grade, as a row of `scores`.

    It is near 0 if the grader reads motion and not noise. `noise` has one value for each row with both grades.
    """
    given, _, patients = _pairs(rows)
    if len(given) < 3:
        return []
    expected = np.array([float(r["predicted"]) for r in rows if r["given"] != "" and r["predicted"] != ""])
    within = [v - np.array([v[given == g].mean() for g in given]) for v in (expected, np.asarray(noise, float))]

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1])

    return [_scored("expected grade against noise", correlation, *within, patients, 0.0, seed, draws)]


def _pairs(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both = [r for r in rows if r["given"] != "" and r["predicted"] != ""]
    given = np.array([int(r["given"]) for r in both], int)
    predicted = np.rint([float(r["predicted"]) for r in both]).astype(int).clip(GRADES[0], GRADES[-1])
    return given, predicted, np.array([r["patient"] for r in both])


def _balanced(given: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.mean([(predicted[given == g] == g).mean() for g in np.unique(given)]))


def _kappa(given: np.ndarray, predicted: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights; not a number where there is nothing to agree on."""
    chance = np.mean((given[:, None] - predicted[None, :]) ** 2)
    return float(1 - np.mean((given - predicted) ** 2) / chance) if chance > 0 else float("nan")


def _excluded(grades: np.ndarray) -> np.ndarray:
    return np.isin(grades, EXCLUDED_GRADES)


MEASURES = {
    "balanced accuracy": _balanced,
    "accuracy": lambda given, predicted: float((given == predicted).mean()),
    "within one grade": lambda given, predicted: float((abs(given - predicted) <= 1).mean()),
    "exclude or keep": lambda given, predicted: float((_excluded(given) == _excluded(predicted)).mean()),
    "quadratic kappa": _kappa,
}
