"""What inversion through a forward operator gives back of a bone, and what it makes up."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.contours import BONE
from bonelib.evaluation.similarity import psnr
from bonelib.evaluation.statistics import mean_rows, pivoted
from bonelib.latent import inverse_problems as ip
from bonelib.latent.inverse_problems import Problem
from bonelib.latent.inversion import Inverter, draw_codes, evenly_spaced
from bonelib.latent.models import Model
from bonelib.networks.superres import SuperResolution
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.motion import GRADES, spectral_residual, trajectory
from bonelib.studies.config import InverseProblems

OBSERVED, WIENER, CODE, BOTH = "as observed", "Wiener filter", "code", "code and deviation"
EITHER = "the likelier of both"
NETWORK, NETWORK_BOTH = "super-resolution", "super-resolution and deviation"
NOISE, MOTION, UNKNOWN = "noise", "motion, known", "motion, unknown"
FEWEST = 2  # training stacks with codes


def lower(factor: int) -> str:
    """The name of the problem of voxels `factor` times as long."""
    return f"{factor}x lower resolution"


def stacks_with_codes(data: Stacks, rows: list[dict], split: str, count: int) -> tuple[list[dict], list[int]]:
    """Up to `count` evenly spread stacks of a split that have codes: their rows of stacks.csv, and places in `rows`,
    those of codes.csv. Raises `InputError` where there are fewer than two."""
    known = {(row["scan"], row["start"]): row for row in data.rows}
    at = [dict(index=i, found=known.get((r["scan"], int(r["start"])))) for i, r in enumerate(rows)]
    at = [one for one, r in zip(at, rows, strict=True) if r["split"] == split and one["found"]]
    if len(at) < FEWEST:
        raise InputError(f"codes.csv: holds {len(at)} codes of {split} stacks; at least {FEWEST} are needed")
    at = evenly_spaced(at, count)
    return [one["found"] for one in at], [one["index"] for one in at]


def _noisy(volume: Tensor, sd: float, seed: int, *key) -> Tensor:
    return volume + sd * torch.randn(volume.shape, generator=torch_rng(seed, "noise of observations", *key))


def _observed(operator: ip.Operator, volumes: Tensor, scans: list[str], sd: float, seed: int, *key) -> Problem:
    seen = [_noisy(operator(v), sd, seed, *key, s) for v, s in zip(volumes.split(1), scans, strict=True)]
    return Problem([operator] * len(seen), seen, sd)


def lower_resolution(volumes: Tensor, scans: list[str], factor: int, sd: float, seed: int) -> Problem:
    """Block means of volumes (n, 1, z, y, x), with noise."""
    return _observed(ip.averaged(factor), volumes, scans, sd, seed, factor)


def averaged_to(problem: Problem, slices: int) -> Problem:
    """The same observations averaged to a grid of `slices` slices, as they are there: what is to be found is that."""
    seen = [F.avg_pool3d(y, y.shape[2] // slices) for y in problem.observed]
    return Problem([ip.as_given] * len(seen), seen, problem.noise)


def motion(data: Stacks, rows: list[dict], shape, grade: int, sd: float, seed: int) -> Problem:
    """Stacks scanned while the arm moved as for `grade`, averaged to the grid of `shape` (z, y, x), with noise.

    The motion is made at full size, as the scanner would see it; the operator is that of the coarse grid.
    """
    spacing, (low, high) = tuple(data.meta["spacing_mm"]), data.meta["intensity"]
    operators, seen = [], []
    for row in rows:
        density = low + (high - low) * data.pooled([row], 0)[0, 0].float()
        events, _ = trajectory(density, spacing, numpy_rng(seed, "motion", row["scan"], row["start"]), GRADES[grade])
        changed = (density + spectral_residual(density, spacing, events, range(len(density))) - low) / (high - low)
        coarse = F.avg_pool3d(changed[None, None], len(density) // shape[0])
        operators.append(ip.moved(events, _coarse_spacing(data, shape[0]), (low, high)))
        seen.append(_noisy(coarse, sd, seed, "motion", row["scan"], row["start"]))
    return Problem(operators, seen, sd)


def problems(data: Stacks, rows: list[dict], volumes: Tensor, how: InverseProblems, seed: int) -> dict[str, Problem]:
    """All problems of the stacks `rows`, on the generator's grid, where they are `volumes` (n, 1, z, y, x)."""
    low, high = data.meta["intensity"]
    scans, least = [f"{row['scan']} {row['start']}" for row in rows], how.least_noise / (high - low)
    found = {lower(f): lower_resolution(volumes, scans, f, least, seed) for f in how.factors}
    found[NOISE] = _observed(ip.as_given, volumes, scans, how.noise / (high - low), seed)
    return found | {MOTION: motion(data, rows, volumes.shape[2:], how.grade, least, seed)}


def _coarse_spacing(data: Stacks, slices: int) -> list[float]:
    return [mm * data.meta["stack_slices"] / slices for mm in data.meta["spacing_mm"]]


def unknown_motion(
    case: Problem, still: Tensor, left: Tensor, data: Stacks, how: InverseProblems, seed: int
) -> Problem:
    """The same moved scans, of which nobody says how the arm moved: each with the most probable of trajectories drawn.
    `still` (n, 1, z, y, x) are the volumes of codes sought in them as if they were still, `left` as for `restore`."""
    prior, spacing, operators = ip.fit_deviation(left), _coarse_spacing(data, still.shape[2]), []
    tried = dict(grade=how.grade, count=how.trajectories)
    for i, (seen, first) in enumerate(zip(case.observed, still.split(1), strict=True)):
        rng, of = numpy_rng(seed, "trajectories", i), (spacing, data.meta["intensity"])
        events = ip.likely_trajectory(seen, first, prior, case.noise, *of, **tried, rng=rng)
        operators.append(ip.moved(events, *of))
    return Problem(operators, case.observed, case.noise)


def restore(
    problem: Problem,
    known: Tensor,
    left: Tensor,
    model: Model,
    inverter: Inverter,
    how: InverseProblems,
    rate: float,
) -> tuple[dict[str, Tensor], ip.Codes]:
    """Every method's bones (n, 1, z, y, x) of a problem on the generator's grid, and the codes among them.

    `known` (m, 1, z, y, x) are training stacks on that grid, `left` what their codes leave of them.
    """
    mean = known.mean(0, keepdim=True)
    seen = ip.enlarged(problem.observed, known.shape[2:])
    filtered = ip.most_probable(mean.expand_as(seen), problem, ip.fit_deviation(known - mean), how.filter_steps)
    codes = ip.most_probable_codes(filtered, problem, model, inverter, left, steps=how.steps, rate=rate)
    drawn = draw_codes(model, codes.codes)
    both = ip.most_probable(drawn, problem, ip.fit_deviation(left), how.filter_steps)
    about_mean = ip.evidence(problem, mean.expand_as(seen), known - mean)
    likelier = torch.from_numpy(ip.evidence(problem, drawn, left) - codes.prior.numpy() > about_mean)
    either = torch.where(likelier[:, None, None, None, None], both, filtered)
    return {OBSERVED: seen, WIENER: filtered, CODE: drawn, BOTH: both, EITHER: either}, codes


def super_resolved(superres: SuperResolution, coarse: Tensor) -> Tensor:
    """What super-resolution draws most probably over volumes (n, 1, z, y, x): expected texture, and no noise."""
    with torch.no_grad():
        textures = [superres.prior(one, one.new_zeros(1, superres.texture)) for one in coarse.split(1)]
        return torch.cat([superres.whole(*pair) for pair in zip(coarse.split(1), textures, strict=True)])


def restore_full(
    problem: Problem, known: Tensor, drawn: Tensor, coarse: Tensor, codes: Tensor, superres, steps: int
) -> dict[str, Tensor]:
    """Every method's bones (n, 1, z, y, x) of a problem of lower resolution at full size. `known` (m, 1, z, y, x) are
    training stacks, `drawn` what super-resolution draws over their means; `coarse` are the observations on the
    generator's grid, `codes` what codes draw of them there."""
    mean = known.mean(0, keepdim=True)
    seen = ip.enlarged(problem.observed, known.shape[2:])
    network = super_resolved(superres, coarse)
    return {
        OBSERVED: seen,
        WIENER: ip.most_probable(mean.expand_as(seen), problem, ip.fit_deviation(known - mean), steps),
        NETWORK: network,
        NETWORK_BOTH: ip.most_probable(network, problem, ip.fit_deviation(known - drawn), steps),
        CODE: super_resolved(superres, codes),
    }


# What is right, and what is made up


def made_up(real: Tensor, restored: Tensor, intensity: tuple[float, float]) -> dict[str, np.ndarray]:
    """Of bones (n, 1, z, y, x), shares (n,): of what is called bone, that is none; of the bone, that is missed."""
    low, high = intensity
    a, b = (v.flatten(1) > (BONE - low) / (high - low) for v in (real, restored))
    # 0 / 0 is NaN: where there is no bone, nothing is said
    return {"false bone": ((b & ~a).sum(1) / b.sum(1)).numpy(), "missed bone": ((a & ~b).sum(1) / a.sum(1)).numpy()}


def added_detail(real: Tensor, restored: Tensor, factor: int) -> dict[str, np.ndarray]:
    """Of what block means do not tell (n, 1, z, y, x): its SD over the true one's, and its correlation with that, (n,).
    That is the operator's null space, of which the data say nothing: what is added there and does not correlate is made
    up."""
    a, b = (v - F.interpolate(F.avg_pool3d(v, factor), scale_factor=factor) for v in (real, restored))
    a, b = (v.flatten(1).double() for v in (a, b))
    sizes = a.norm(dim=1), b.norm(dim=1)
    r = (a * b).sum(1) / (sizes[0] * sizes[1]).clamp(min=1e-12)
    return {"detail, SD over the true": (sizes[1] / sizes[0].clamp(min=1e-12)).numpy(), "detail, r": r.numpy()}


def measured(
    real: Tensor, restored: dict[str, Tensor], intensity, factor: int | None, error=None
) -> dict[str, dict[str, np.ndarray]]:
    """{method: {measure: values (n,)}} of a problem; `error` (real, restored) -> (n,) is of morphometry, if any."""
    found = {}
    for method, volumes in restored.items():
        values = {"PSNR, dB": psnr(real[:, 0].numpy(), volumes[:, 0].numpy())}
        values |= {"morphometry, SDs off": error(real, volumes)} if error else {}
        values |= made_up(real, volumes, intensity) | (added_detail(real, volumes, factor) if factor else {})
        found[method] = values
    return found


def better(mine: np.ndarray, other: np.ndarray, *, least: bool = False) -> np.ndarray:
    """Whether values (n,) are better than others, larger or with `least` smaller, 1 or 0. A bone that cannot be read
    (NaN) is worse than one that can be; NaN where neither can be."""
    worst = np.inf if least else -np.inf
    a, b = (np.where(np.isnan(v), worst, v) for v in (np.asarray(mine, float), np.asarray(other, float)))
    return np.where(np.isnan(mine) & np.isnan(other), np.nan, a < b if least else a > b)


def table(
    found: dict[str, dict[str, dict[str, np.ndarray]]], patients: Sequence[str], *, seed: int, draws: int
) -> list[dict]:
    """Of `measured` of every problem: one row a problem, method and measure, with its interval by patient.

    Beside the measures, the share of bones whose PSNR, and whose morphometry, is better than that of the observation.
    """
    rows = []
    for problem, methods in found.items():
        for method, values in methods.items():
            base, wins = methods.get(OBSERVED), {}
            if base and method != OBSERVED:
                wins["PSNR better"] = better(values["PSNR, dB"], base["PSNR, dB"])
            if wins and (name := "morphometry, SDs off") in values:
                wins["morphometry better"] = better(values[name], base[name], least=True)
            found = mean_rows(values | wins, patients, "inverse problems", problem, seed=seed, draws=draws)
            rows += [dict(problem=problem, method=method) | row for row in found]
    return rows


def pivot(rows: list[dict], problem: str) -> list[dict]:
    """The rows of a problem as a table to be read: a line a measure, a column a method."""
    return pivoted([row for row in rows if row["problem"] == problem], "measure", "method")


def verdict(rows: list[dict], problem: str, measure: str, asked: float) -> list[str]:
    """Sentences on the share of bones on which each method is better than the observation, against what is asked."""
    return [
        f"{problem}, {r['method']}: {r['value']:.0%} ({r['low']:.0%} to {r['high']:.0%}) of {r['N']} stacks of "
        f"{r['patients']} patients, {'as' if r['value'] >= asked else 'less than'} asked ({asked:.0%})"
        for r in rows
        if (r["problem"], r["measure"]) == (problem, measure) and r["N"]
    ]
