"""Targets for edited volumes: which are reached, which are refused, and what morphometry says of the results.

Intervals are of 95 %, by resampling patients (or, of samples, the samples).
"""

from itertools import product

import numpy as np
import torch
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.compartments import CLOSED, read
from bonelib.evaluation.differentiable import UNITS
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import of_rows, patient_interval
from bonelib.latent.attribute_model import BATCH, AttributeModel, readings, shifted
from bonelib.latent.directions import Direction
from bonelib.latent.target_optimisation import STARTS, TOLERANCE, Moved, move, optimise_to_target
from bonelib.scans.volumes import Volume


def search_targets(
    tool: AttributeModel,
    codes: Tensor,
    groups,
    sources,
    n: int,
    straight: dict[str, Direction],
    *,
    seed: int,
    starts: int = STARTS,
) -> tuple[list[dict], Tensor]:
    """`n` targets asked of codes in random order, met by the closed loop of `starts` walks and by one open step.

    A target is one attribute of `straight`, uniform over its `attainable_range`; all others are to stay. Rows: number
    of the code, patient, source, attribute, start, asked, and of both ways what was measured, error and side effect
    (mean change of the others) in shares of the ranges; length of the move in SDs, whether the loop met all within 2 %.
    And the codes (n, ...) it ended at. Nothing is asked where no code can be read, there is no direction, or nothing is
    calibrated.
    """
    start = readings(tool.read, codes)
    fit = start.isfinite().all(1).nonzero()[:, 0].tolist() if tool.calibrated else []
    room = {(i, name): tool.attainable_range(start[i], tool.index(name)) for i, name in product(fit, straight)}
    pairs = [pair for pair, (low, high) in room.items() if low < high]
    order = numpy_rng(seed, "asked").permutation(len(pairs))
    picked = [pairs[order[number % len(pairs)]] for number in range(n if pairs else 0)]
    if not picked:
        return [], codes[:0]
    index, which = torch.tensor([i for i, _ in picked]), torch.tensor([tool.index(name) for _, name in picked])
    targets, steps = [], []
    for number, (i, name) in enumerate(picked):
        (low, high), direction = room[i, name], straight[name]
        targets.append(low + (high - low) * numpy_rng(seed, "asked", number).random())
        steps.append((targets[-1] - float(start[i, tool.index(name)])) / direction.slope * direction.vector)
    wanted = start[index].index_put((torch.arange(n), which), torch.tensor(targets))
    opened, parts = readings(tool.read, shifted(codes[index], torch.stack(steps))), []
    for some in torch.arange(n).split(BATCH):
        parts.append(optimise_to_target(tool, codes[index[some]], wanted[some], seeds=some.tolist(), starts=starts))
        print(f"{int(some[-1]) + 1} of {n} targets", flush=True)
    found, rows = Moved(*(torch.cat(values) for values in zip(*parts, strict=True))), []
    for number, ((i, name), target) in enumerate(zip(picked, targets, strict=True)):
        k = int(which[number])
        row = dict(number=i, patient=groups[i], source=sources[i], attribute=name, start=float(start[i, k]))
        row["asked"] = target
        for way, values in (("closed", found.measured[number]), ("open", opened[number])):
            off = ((values - wanted[number]) / tool.span).abs()
            side = float(torch.cat([off[:k], off[k + 1 :]]).mean())
            row |= {f"{way} measured": float(values[k]), f"{way} error": float(off[k]), f"{way} side": side}
        met = float(found.error[number]) <= 2 * TOLERANCE
        rows.append(row | dict(length=float(found.length[number]), steps=int(found.steps[number]), met=met))
    return rows, found.codes


def _asked_summary(rows: list[dict], *, seed: int, draws: int) -> dict[str, float]:
    """Of rows of `search_targets`: shares met within 2 % and medians of side effects, with intervals by patient."""
    if not rows:
        return {"N": 0}
    keys = ("closed error", "open error", "closed side", "open side", "met")
    table = np.array([[float(row[key]) for key in keys] for row in rows])

    def of_all(values):
        closed, opened, side, other, met = values.T
        within, medians = 2 * TOLERANCE, (np.median(side), np.nanmedian(other))
        shares = [(closed <= within).mean(), met.mean(), (opened <= within).mean()]
        return np.array([*shares, *medians, medians[0] / medians[1]])

    names = ("closed loop within 2 %", "and all others held within 2 %", "open loop within 2 %")
    names += ("closed side effect", "open side effect", "side effect, closed over open")
    patients, rng = [row["patient"] for row in rows], numpy_rng(seed, "asked summary")
    found = patient_interval(of_rows(of_all, table), patients, rng=rng, draws=draws)
    return {"N": len(rows), "patients": found.patients} | found.columns(*names, sep=", ")


def asked_table(rows: list[dict], *, seed: int, draws: int) -> dict[str, dict[str, float]]:
    """`_asked_summary` of all rows, and of those of each source."""
    parts = {"all": rows} | {s: [r for r in rows if r["source"] == s] for s in dict.fromkeys(r["source"] for r in rows)}
    return {name: _asked_summary(part, seed=seed, draws=draws) for name, part in parts.items()}


def infeasible_targets(tool: AttributeModel, codes: Tensor, n: int, names, *, seed: int) -> list[dict]:
    """`n` targets outside of the calibrated range, by a tenth to a whole range, and what `move` says to them.

    No rows where nothing is calibrated: then no target is farther out than any other.
    """
    rows = []
    for number in range(n if tool.calibrated else 0):
        rng, name = numpy_rng(seed, "impossible", number), names[number % len(names)]
        k, beyond = tool.index(name), float(rng.uniform(0.1, 1.0))
        target = float(tool.high[k] + beyond * tool.span[k] if number % 2 else tool.low[k] - beyond * tool.span[k])
        try:
            move(tool, codes[number % len(codes)][None], {name: target})
            says = ""
        except InputError as error:
            says = str(error)
        rows.append(dict(attribute=name, asked=target, refused=bool(says), reason=says))
    return rows


def with_intervals(columns: dict[str, dict[str, float]]) -> list[dict]:
    """Summaries {column: {key: value}} with keys "key, low" and "key, high" as rows of text for `as_markdown`."""

    def cell(of, key):
        ends = f" ({of[f'{key}, low']:.3g} to {of[f'{key}, high']:.3g})" if f"{key}, low" in of else ""
        return f"{of[key]:.3g}{ends}"

    keys = (k for k in next(iter(columns.values())) if not k.endswith((", low", ", high")))
    return [{"": key} | {name: cell(of, key) for name, of in columns.items()} for key in keys]


def panels(tool: AttributeModel, rows: list[dict], names) -> list[dict]:
    """For `figures.scatter`: targets against measured values, one panel for each attribute of `names`."""
    drawn = []
    for name in names:
        mine, unit = [row for row in rows if row["attribute"] == name], UNITS.get(name, "")
        line = [float(tool.low[tool.index(name)]), float(tool.high[tool.index(name)])]
        sets = {w: ([r["asked"] for r in mine], [r[f"{w} measured"] for r in mine]) for w in ("open", "closed")}
        drawn.append(dict(title=f"{name}, {unit}", x="asked", y="read", sets=sets, lines={"": (line, line)}))
    return drawn


def measure_with_closure(volume: Volume) -> dict[str, float] | None:
    """`morphometry.measure` of a bone and its share of closed slices, None where no contours are found."""
    found = measure_or_none(volume, anisotropy=False)
    return found and found | {CLOSED: read(volume).traits[CLOSED]}


def verified_by_morphometry(rows: list[dict], before: list, after: list, names, *, least: float) -> list[dict]:
    """What morphometry says of the bones of `search_targets` (rows), by what `measure_with_closure` found `before` and
    `after` the move: a row an attribute of all bones with contours, and of those whose cortex is closed in the share
    `least` of their slices, as contours forced over a gap may leave out part of a bone. The mean change read, and
    measured over it (1: morphometry sees all of it): slope through 0; correlation."""
    table = []
    for name, (bones, limit) in product(names, {"contours found": 0.0, "cortex closed": least}.items()):
        mine = [i for i, row in enumerate(rows) if row["attribute"] == name]
        both = [i for i in mine if before[i] and after[i] and np.isfinite(after[i][name] - before[i][name])]
        both = [i for i in both if min(before[i][CLOSED], after[i][CLOSED]) >= limit]
        wanted = np.array([rows[i]["closed measured"] - rows[i]["start"] for i in both])
        seen = np.array([after[i][name] - before[i][name] for i in both])
        enough = len(both) > 2 and wanted.std() > 0
        row = dict(attribute=name, bones=bones, N=len(both), of=len(mine))
        row["read"] = float(np.abs(wanted).mean()) if both else np.nan
        row["measured over read"] = float((wanted @ seen) / (wanted @ wanted)) if both and wanted.any() else np.nan
        table.append(row | {"r": float(np.corrcoef(wanted, seen)[0, 1]) if enough else np.nan})
    return table
