"""What directions of a latent space do to attributes, how far they do it evenly, and asked against measured.

`read`, codes, shifts and `Instrument` are those of `editing`. Intervals are of 95 %, by resampling patients (or, of
samples, the samples).
"""

import warnings
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from bonelib import InputError
from bonelib.evaluation.compartments import CLOSED, read
from bonelib.evaluation.gauge import UNITS
from bonelib.evaluation.morphometry import measure
from bonelib.latent.directions import Direction
from bonelib.latent.editing import BATCH, TOLERANCE, Instrument, Moved, closed_loop, jacobian, move, readings, shifted
from bonelib.randomness import numpy_rng
from bonelib.scans.volumes import Volume

EVEN = 0.1  # deviation from a straight line, as a share of the response, that still counts as linear


class Subjects(NamedTuple):
    """Bones to edit: codes (n, ...), the patient (or sample) of each, and whether it is of a "scan" or a "sample"."""

    codes: Tensor
    groups: list[str]
    sources: list[str]


def subjects(tool: Instrument, inverted: Tensor, patients: list[str], samples: Tensor, n: int) -> Subjects:
    """Up to `n` inverted codes and as many samples, those that can be read; inverted ones first.

    Where none can be read, the first ones are taken: they can be drawn, and whatever is read on them is NaN.
    """
    kept = {}
    for name, codes in (("scan", inverted), ("sample", samples)):
        fit = readings(tool.read, codes).isfinite().all(1)
        kept[name] = (fit if fit.any() else ~fit).nonzero()[:n, 0]
    drawn = samples[kept["sample"]]
    if inverted.dim() > samples.dim():
        drawn = drawn[:, None].expand(-1, inverted.shape[1], -1)
    groups = [patients[i] for i in kept["scan"].tolist()] + [f"sample {i}" for i in kept["sample"].tolist()]
    sources = ["scan"] * len(kept["scan"]) + ["sample"] * len(drawn)
    return Subjects(torch.cat([inverted[kept["scan"]], drawn]), groups, sources)


def effect_matrix(
    tool: Instrument, codes: Tensor, vectors: dict[str, Tensor], groups, *, step: float, seed: int, draws: int
) -> list[dict]:
    """The effect of every direction on every attribute, per unit of the code: central differences over +-`step`.

    Rows: direction, attribute, N codes, effect in the attribute's unit with its interval, the same in shares of the
    calibrated range, and cross-talk, the direction's largest share on another attribute over that on this one.
    """
    rows, members = [], _members(groups)
    for name, vector in vectors.items():
        change = (
            readings(tool.read, shifted(codes, step * vector)) - readings(tool.read, shifted(codes, -step * vector))
        ) / (2 * step)
        change = change.double().numpy()
        mean, some = _mean(change), _resampled(change, members, numpy_rng(seed, "effects", name), draws)
        low, high = _ends(some)
        shares = np.abs(mean) / tool.span.numpy()
        for k, attribute in enumerate(tool.names):
            others = np.delete(shares, k).max()
            counts = dict(direction=name, attribute=attribute, N=int(np.isfinite(change[:, k]).sum()))
            values = {
                "effect": mean[k],
                "low": low[k],
                "high": high[k],
                "share of range": mean[k] / float(tool.span[k]),
            }
            rows.append(
                counts
                | {key: float(v) for key, v in values.items()}
                | {"cross-talk": float(others / max(shares[k], 1e-9))}
            )
    return rows


def scaled(straight: dict[str, Direction], matrix: list[dict]) -> dict[str, Direction]:
    """Ridge directions with their measured effect as slope, for those named "ridge ATTRIBUTE" in `effect_matrix`.

    The slope of a ridge is shrunk by its penalty. A direction without a measured effect is left out.
    """
    found = {r["attribute"]: r["effect"] for r in matrix if r["direction"] == f"ridge {r['attribute']}"}
    return {n: straight[n]._replace(slope=effect) for n, effect in found.items() if np.isfinite(effect) and effect}


def responses(tool: Instrument, codes: Tensor, vector: Tensor, alphas) -> np.ndarray:
    """Mean change of the attributes (alphas, k) over codes that are moved by alpha along a direction."""
    start = readings(tool.read, codes)
    return np.stack([_mean((readings(tool.read, shifted(codes, float(a) * vector)) - start).numpy()) for a in alphas])


def linear_range(alphas, response: np.ndarray) -> float:
    """The largest alpha up to which a response (alphas,) stays within 10 % of the line through its smallest steps.

    Both signs are looked at; `alphas` are symmetric about 0 and hold it. 0 where already the second step is off. A step
    behind which nothing can be read (NaN) is off.
    """
    alphas, response = np.asarray(alphas, float), np.asarray(response, float)
    least = np.abs(alphas[alphas != 0]).min()
    near = np.isclose(np.abs(alphas), least)
    slope = float((alphas[near] * response[near]).sum() / (alphas[near] ** 2).sum())
    even = 0.0
    for size in sorted({abs(a) for a in alphas if a}):
        at = np.isclose(np.abs(alphas), size)
        if not np.abs(response[at] - slope * alphas[at]).max() <= EVEN * abs(slope) * size:
            break
        even = size
    return even


def reaches(tool: Instrument, codes: Tensor, vectors: dict[str, Tensor], matrix: list[dict], alphas) -> list[dict]:
    """Of every direction: the attribute it moves most, its row of `effect_matrix`, and how far it does so evenly.

    `alphas` are the steps, mirrored about 0, at which responses are read.
    """
    steps, rows = [*(-a for a in reversed(alphas)), 0.0, *alphas], []
    for name, vector in vectors.items():
        mine = [row for row in matrix if row["direction"] == name]
        row = max(mine, key=lambda r: abs(r["share of range"]))
        response = responses(tool, codes, vector, steps)[:, tool.index(row["attribute"])]
        rows.append(row | {"linear up to": linear_range(steps, response)})
    return rows


def by_rank(
    tool: Instrument, codes: Tensor, vectors: Tensor, groups, *, seed: int, draws: int
) -> tuple[np.ndarray, list[dict]]:
    """Effects (directions, k) of all directions (d, d), strongest eigenvalue first, and what goes with their rank.

    The effect is the root mean square over codes of the derivative per unit of the code, in shares of the range. Rows:
    attribute, Spearman's correlation of effect and rank (1 is the largest eigenvalue) with its interval, and the same
    for the attribute's part in all effects of a direction: positive if small eigenvalues carry it. NaN if none is
    read.
    """
    _, slopes = jacobian(tool.read, codes)
    kept = slopes.isfinite().all(-1).all(-1)
    squares = ((slopes[kept] / tool.span[:, None]) @ vectors.T).square().double().numpy()  # (codes, k, directions)
    rank, members = (
        np.arange(1, len(vectors) + 1),
        _members([g for g, k in zip(groups, kept.tolist(), strict=True) if k]),
    )

    def found(mean):
        effect = np.sqrt(mean)
        part = effect / effect.sum(0)
        return np.array([[stats.spearmanr(rank, row).statistic for row in table] for table in (effect, part)]).T

    some = _resampled(squares, members, numpy_rng(seed, "ranks"), draws, found)
    mean, rows = _mean(squares), []
    value = found(mean)
    # Fewer different codes blur the ranks of every draw: deviations from the draws' own mean are laid about the value
    low, high = value + _ends(some) - some.mean(0)
    for k, attribute in enumerate(tool.names):
        row = dict(attribute=attribute, N=len(squares), directions=len(rank))
        for j, key in enumerate(("effect", "part of all effects")):
            row |= {
                f"{key}, rank": float(value[k, j]),
                f"{key}, low": float(low[k, j]),
                f"{key}, high": float(high[k, j]),
            }
        rows.append(row)
    return np.sqrt(mean).T, rows


def asked(
    tool: Instrument, codes: Tensor, groups, sources, n: int, straight: dict[str, Direction], *, seed: int
) -> tuple[list[dict], Tensor]:
    """`n` targets asked of codes in random order, met by the closed loop and, beside it, by one open step.

    A target is one attribute of `straight`, uniform over what is `reachable`; all others are to stay. The open step
    goes along that attribute's direction. Rows: number of the code, its patient and source, attribute, start, asked,
    measured; error and side effect (mean change of the others), in shares of the ranges, of both ways; length of the
    move in SDs, whether the loop met all within 2 %. And the codes (n, ...) it ended at. Nothing is asked where no code
    can be read, there is no direction, or nothing is calibrated.
    """
    start = readings(tool.read, codes)
    fit = start.isfinite().all(1).nonzero()[:, 0].tolist() if tool.calibrated else []
    room = {(i, name): tool.reachable(start[i], tool.index(name)) for i, name in product(fit, straight)}
    pairs = [pair for pair, (low, high) in room.items() if low < high]
    order = numpy_rng(seed, "asked").permutation(len(pairs))
    picked = [pairs[order[number % len(pairs)]] for number in range(n if pairs else 0)]
    if not picked:
        return [], codes[:0]
    index, which = torch.tensor([i for i, _ in picked]), torch.tensor([tool.index(name) for _, name in picked])
    shares = [numpy_rng(seed, "asked", number).random() for number in range(n)]
    targets = [
        room[pair][0] + (room[pair][1] - room[pair][0]) * share for pair, share in zip(picked, shares, strict=True)
    ]
    wanted = start[index].index_put((torch.arange(n), which), torch.tensor(targets))
    opened = torch.stack(
        [
            (target - float(start[i, tool.index(name)])) / straight[name].slope * straight[name].vector
            for (i, name), target in zip(picked, targets, strict=True)
        ]
    )
    opened, parts = readings(tool.read, shifted(codes[index], opened)), []
    for some in torch.arange(n).split(BATCH):
        parts.append(closed_loop(tool, codes[index[some]], wanted[some], seeds=some.tolist()))
        print(f"{int(some[-1]) + 1} of {n} targets", flush=True)
    found, rows = Moved(*(torch.cat(values) for values in zip(*parts, strict=True))), []
    for number, ((i, name), target) in enumerate(zip(picked, targets, strict=True)):
        k = int(which[number])
        row = dict(
            number=i, patient=groups[i], source=sources[i], attribute=name, start=float(start[i, k]), asked=target
        )
        for way, values in (("closed", found.measured[number]), ("open", opened[number])):
            off = ((values - wanted[number]) / tool.span).abs()
            others = torch.cat([off[:k], off[k + 1 :]])
            row |= {
                f"{way} measured": float(values[k]),
                f"{way} error": float(off[k]),
                f"{way} side": float(others.mean()),
            }
        met = float(found.error[number]) <= 2 * TOLERANCE
        rows.append(row | dict(length=float(found.length[number]), steps=int(found.steps[number]), met=met))
    return rows, found.codes


def asked_summary(rows: list[dict], *, seed: int, draws: int) -> dict[str, float]:
    """Of rows of `asked`: shares met within 2 % and medians of side effects, with intervals by patient."""
    if not rows:
        return {"N": 0}
    members = _members([row["patient"] for row in rows])
    keys = ("closed error", "open error", "closed side", "open side", "met")
    table = np.array([[float(row[key]) for key in keys] for row in rows])

    def found(values):
        closed, opened, side, other, met = values.T
        other = np.nanmedian(other)
        return np.array(
            [
                (closed <= 2 * TOLERANCE).mean(),
                met.mean(),
                (opened <= 2 * TOLERANCE).mean(),
                np.median(side),
                other,
                np.median(side) / other,
            ]
        )

    names = ("closed loop within 2 %", "and all others held within 2 %", "open loop within 2 %")
    names += ("closed side effect", "open side effect", "side effect, closed over open")
    rng = numpy_rng(seed, "asked summary")
    some = np.stack([found(table[_draw(members, rng)]) for _ in range(draws)])
    low, high = _ends(some)
    values = {"N": len(rows), "patients": len(members)}
    for i, name in enumerate(names):
        values |= {name: float(found(table)[i]), f"{name}, low": float(low[i]), f"{name}, high": float(high[i])}
    return values


def impossible(tool: Instrument, codes: Tensor, n: int, names, *, seed: int) -> list[dict]:
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


def asked_table(rows: list[dict], *, seed: int, draws: int) -> dict[str, dict[str, float]]:
    """`asked_summary` of all rows, and of those of each source."""
    parts = {"all": rows} | {s: [r for r in rows if r["source"] == s] for s in dict.fromkeys(r["source"] for r in rows)}
    return {name: asked_summary(part, seed=seed, draws=draws) for name, part in parts.items()}


def with_intervals(columns: dict[str, dict[str, float]]) -> list[dict]:
    """Summaries {column: {key: value}} with keys "key, low" and "key, high" as rows of text for `as_markdown`."""
    rows = []
    for key in (k for k in next(iter(columns.values())) if not k.endswith((", low", ", high"))):
        row = {"": key}
        for name, v in columns.items():
            row[name] = f"{v[key]:.3g}" + (
                f" ({v[f'{key}, low']:.3g} to {v[f'{key}, high']:.3g})" if f"{key}, low" in v else ""
            )
        rows.append(row)
    return rows


def panels(tool: Instrument, rows: list[dict], names) -> list[dict]:
    """For `figures.scatter`: asked against measured of rows of `asked`, one panel for each attribute of `names`."""
    drawn = []
    for name in names:
        mine, unit = [row for row in rows if row["attribute"] == name], UNITS.get(name, "")
        line = [float(tool.low[tool.index(name)]), float(tool.high[tool.index(name)])]
        sets = {w: ([r["asked"] for r in mine], [r[f"{w} measured"] for r in mine]) for w in ("open", "closed")}
        drawn.append(dict(title=f"{name}, {unit}", x="asked", y="read", sets=sets, lines={"": (line, line)}))
    return drawn


def by_ruler(volume: Volume) -> dict[str, float] | None:
    """`morphometry.measure` of a bone and its share of closed slices, None where no contours are found."""
    try:
        return measure(volume) | {CLOSED: read(volume).traits[CLOSED]}
    except InputError:
        return None


def confirmed(rows: list[dict], before: list, after: list, names, *, least: float) -> list[dict]:
    """What the slow ruler says of the bones of `asked` (rows), drawn whole before and after the move.

    `before`, `after`: of every row what `by_ruler` found. Rows: attribute (of `names`), of all bones with contours and
    of those whose cortex is closed in the share `least` of their slices, both before and after, as contours forced over
    a gap may leave out part of a bone; N of how many; the mean change read, and measured over it (1: the slow ruler
    sees all of it): slope through 0; correlation.
    """
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


def conditions(rows: list[dict], people: dict[str, dict], density) -> dict[str, np.ndarray]:
    """Age, sex (F 0, M 1) and trabecular density of the bones of `rows`, as far as they are known: name to (n,)."""

    def numbers(key, meaning):
        return np.array([meaning(people.get(row["patient"], {}).get(key) or "nan") for row in rows])

    found = {
        "age": numbers("age", float),
        "sex": numbers("sex", lambda s: {"F": 0.0, "M": 1.0}.get(s, np.nan)),
        "Tb.BMD": np.asarray(density, float),
    }
    return {name: v for name, v in found.items() if np.isfinite(v).sum() > 3 and np.nanstd(v) > 0}


def atlas(codes: Tensor, covariates: np.ndarray, at: np.ndarray) -> Tensor:
    """The mean code (m, ...) of bones with covariates `at` (m, p): codes by linear regression on covariates (n, p)."""
    design = np.column_stack([np.ones(len(covariates)), covariates])
    flat = codes.flatten(1).double().numpy()
    weights = np.linalg.lstsq(design, flat, rcond=None)[0]
    means = np.column_stack([np.ones(len(at)), at]) @ weights
    return torch.from_numpy(means).float().reshape(len(at), *codes.shape[1:])


def atlases(tool: Instrument, codes: Tensor, known: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], list[dict]]:
    """The mean bone, and mean bones under each of `conditions`: codes by name, and what is read on them as rows.

    Sexes are F and M; of numbers the 10th, 50th and 90th percentile are taken.
    """
    found, places = {"mean": codes.mean(0, keepdim=True)}, {"mean": ([float("nan")], len(codes))}
    for name, values in known.items():
        has = np.isfinite(values)
        at = np.array([0.0, 1.0]) if name == "sex" else np.quantile(values[has], [0.1, 0.5, 0.9])
        found[name] = atlas(codes[torch.from_numpy(has)], values[has][:, None], at[:, None])
        places[name] = (at.tolist(), int(has.sum()))
    rows = []
    for name, (at, n) in places.items():
        for a, values in zip(at, readings(tool.read, found[name]).tolist(), strict=True):
            rows.append(dict(condition=name, at=a, N=n) | dict(zip(tool.names, values, strict=True)))
    return found, rows


def sliders(
    tool: Instrument, straight: dict[str, Direction], others: dict[str, Tensor], most: float
) -> dict[str, tuple]:
    """{label: (direction (d,), low, high)} for editing by hand: attributes in their units, over half a range each way.

    `others` {label: direction} follow, over +-`most`.
    """
    found = {}
    for name, direction in straight.items() if tool.calibrated else ():
        half = float(tool.span[tool.index(name)]) / 2
        found[f"{name}, {UNITS.get(name, '')}"] = (direction.vector / direction.slope, -half, half)
    return found | {label: (vector, -most, most) for label, vector in others.items()}


def _members(groups):
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(group == i) for i in range(len(names))]


def _draw(members, rng):
    if not members:
        return np.zeros(0, int)
    return np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])


def _resampled(values, members, rng, draws, statistic=lambda mean: mean):
    return np.stack([statistic(_mean(values[_draw(members, rng)])) for _ in range(draws)])


def _mean(values):
    """Over the first axis, of what is not NaN; NaN of nothing."""
    known = np.isfinite(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def _ends(some):
    """The ends of intervals of 95 % from draws (draws, ...); NaN where no draw has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, that there is nothing
        return np.nanquantile(some, [0.025, 0.975], 0)
