"""Edit a latent code so that the decoded volume reaches target attributes.

Codes, shifts and `AttributeModel` are those of `attribute_model`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.evaluation.differentiable import UNITS
from bonelib.latent.attribute_model import AttributeModel, jacobian, readings, shifted

REACH = 12.0  # length of a move in SDs of the latent distribution beyond which it is another bone
TOLERANCE = 0.01  # of the range: where the closed loop stops
STEPS = 16  # of the closed loop at most
LONGEST, TURN_SD = 2.5, 0.5  # of its steps in SDs, and how far parts of them are turned
PARTS = ((1.0, 0.6), (0.3, 0.1))  # of its steps, first and then
SUFFICIENT_DECREASE = 0.5  # of what is missing: a step that leaves less is taken at once
MARGIN_FLOOR = 0.02  # margin of a reading below which a step holds it
STARTS, RESTART_SD = 8, 1.5  # walks of the closed loop at most, and how many SDs beside a place all but one begin
DAMPING = 3e-3  # of the mean squared effect, added before it is inverted


class Moved(NamedTuple):
    """Codes (n, ...) after the closed loop, and what was `measured` (n, k) on them.

    `error` (n,): the largest deviation from what was asked, in shares of the calibrated ranges; `white` (n, d): the
    move, in SDs of the latent distribution; `steps` (n,) taken.
    """

    codes: Tensor
    measured: Tensor
    error: Tensor
    white: Tensor
    steps: Tensor

    @property
    def length(self) -> Tensor:
        return self.white.norm(dim=1)

    def improved(self, rows: Tensor, found: "Moved") -> "Moved":
        """With those of `found`, of codes `rows`, that come closer."""
        closer = found.error < self.error[rows]
        return Moved(*(old.index_copy(0, rows[closer], new[closer]) for old, new in zip(self, found, strict=True)))


def optimise_to_target(
    tool: AttributeModel, codes: Tensor, targets: Tensor, *, seeds=(0,), steps: int = STEPS, starts: int = STARTS
) -> Moved:
    """Move each of the codes (n, ...) until its attributes are `targets` (n, k), NaN where one may go anywhere.

    Gauss-Newton on measured values: a step is the shortest, in SDs of the latent distribution, that corrects all errors
    by the effects measured at the code; so is the cortex held, where the step would open it. Of its longer parts the
    better one is taken; if it leaves much, the best of all parts and of parts turned aside at random; if none is better
    than where it stands, the step is halved. No step leaves the plausible region (`AttributeModel`, `REACH`). Up to
    `starts` walks are made, the later ones from places `RESTART_SD` beside the best so far and the code, by turns. The
    best of all is returned, whether as asked or not. Codes share passes of the generator and nothing else; `seeds` has
    one of each.
    """
    rngs, white = [torch_rng(seed, "closed loop") for seed in seeds], torch.zeros(len(codes), codes.shape[-1])
    best, left = _gauss_newton(tool, codes, white, targets, steps, rngs), torch.arange(len(codes))
    for number in range(1, starts):
        left = left[best.error[left] > TOLERANCE]
        if not len(left):
            break
        aside = torch.stack([torch.randn(codes.shape[-1], generator=rngs[i]) for i in left])
        white = RESTART_SD * aside / aside.norm(dim=1, keepdim=True) + (best.white[left] if number % 2 else 0)
        some = [rngs[i] for i in left]
        best = best.improved(left, _gauss_newton(tool, codes[left], white, targets[left], steps, some))
    return best


def _gauss_newton(tool, codes, white, targets, steps, rngs) -> Moved:
    """One walk of `optimise_to_target` for each code, from the code moved by `white` (n, d) SDs."""
    limit = tool.distance(codes).clamp(min=tool.max_latent_norm)

    def missing(values, rows):
        wanted = targets[rows]
        return torch.where(wanted.isfinite(), (wanted - values) / tool.span, 0).nan_to_num(nan=torch.inf)

    def errors(at, values, rows):
        error = missing(values, rows).abs().amax(1)
        return torch.where(tool.distance(at) <= limit[rows] + 1e-3, error, torch.inf)

    def tried(rows, steps):
        """The best of the `steps` (n, parts, d) of codes `rows`: what is missing behind it (n,), where it leads (n, d)
        and what is read there (n, k)."""
        parts, ends = steps.shape[1], (white[rows, None] + steps).flatten(0, 1)
        again = rows.repeat_interleave(parts)
        drawn = shifted(codes[again], ends @ tool.spread.T)
        plausible = (ends.norm(dim=1) <= REACH) & (tool.distance(drawn) <= limit[again])
        values = readings(tool.read, drawn)
        left = torch.where(plausible, missing(values, again).norm(dim=1), torch.inf).reshape(-1, parts)
        least, chosen = left.min(1)
        chosen += torch.arange(len(rows)) * parts
        return least, ends[chosen], values[chosen]

    at, rows, k = shifted(codes, white @ tool.spread.T), torch.arange(len(codes)), len(tool.names)
    values = readings(tool.read, at)
    best = Moved(at, values, errors(at, values, rows), white, torch.zeros(len(codes), dtype=torch.long))
    white, longest = white.clone(), torch.full((len(codes),), LONGEST)
    first, then = (torch.tensor(parts)[:, None] for parts in PARTS)
    for number in range(1, steps + 1):
        rows = rows[best.error[rows] > TOLERANCE]
        if not len(rows):
            break
        read, at = tool.read_with_margin or tool.read, shifted(codes[rows], white[rows] @ tool.spread.T)
        values, slopes = jacobian(read, at, targets[rows].isfinite().any(0))
        usable = values[:, :k].isfinite().all(1) & slopes.isfinite().all(-1).all(-1)
        rows, values, slopes = rows[usable], values[usable], slopes[usable]
        if not len(rows):
            break
        change = missing(values[:, :k], rows)
        step = _steps(tool, values, change, slopes, targets[rows].isfinite(), longest[rows])
        length, left = step.norm(dim=1), change.norm(dim=1)
        found = tried(rows, first * step[:, None])
        if len(poor := (found[0] > SUFFICIENT_DECREASE * left).nonzero()[:, 0]):
            parts = torch.cat([first, then]) * step[poor, None]
            turns = torch.stack([torch.randn(parts.shape[1:], generator=rngs[i]) for i in rows[poor]])
            turns = turns * length[poor, None, None] * TURN_SD / step.shape[1] ** 0.5
            further = tried(rows[poor], torch.cat([parts[:, len(first) :], parts + turns], 1))
            better = further[0] < found[0][poor]
            for old, new in zip(found, further, strict=True):
                old[poor[better]] = new[better]
        nearer = found[0] < left
        longest[rows] = torch.where(nearer, (2 * longest[rows]).clamp(max=LONGEST), length / 2)
        moved, taken = rows[nearer], torch.full((int(nearer.sum()),), number)
        _, white[moved], values = (part[nearer] for part in found)
        at = shifted(codes[moved], white[moved] @ tool.spread.T)
        best = best.improved(moved, Moved(at, values, errors(at, values, moved), white[moved], taken))
    return best


def _steps(tool, values, change, slopes, asked, longest):
    """The step (n, d) in SDs of each code, no longer than `longest` (n,), that holds its cortex shut."""
    k = len(tool.names)
    effects, found = slopes[:, :k] / tool.span[:, None] @ tool.spread, []
    for i, (effect, wanted, known) in enumerate(zip(effects, change, asked, strict=True)):
        effect, wanted = effect[known], wanted[known]
        step = _shortened(_min_norm_step(effect, wanted), longest[i])
        for margin, its in zip(values[i, k:], slopes[i, k:] @ tool.spread, strict=True):
            if float(margin + its @ step) < MARGIN_FLOOR:  # the cortex would open: hold it shut, as one attribute more
                both = torch.cat([effect, its[None]]), torch.cat([wanted, (MARGIN_FLOOR - margin)[None]])
                step = _shortened(_min_norm_step(*both), longest[i])
        found.append(step)
    return torch.stack(found)


def _shortened(step, longest):
    return step * (longest / step.norm().clamp(min=1e-9)).clamp(max=1.0)


def _min_norm_step(effect: Tensor, change: Tensor) -> Tensor:
    """The shortest step (d,) whose `effect` (k, d) is `change` (k,), damped where effects are nearly the same."""
    square = effect @ effect.T
    square = square + DAMPING * square.diagonal().mean().clamp(min=1e-9) * torch.eye(len(square))
    return effect.T @ torch.linalg.solve(square, change)


def move(
    tool: AttributeModel, code: Tensor, targets: dict[str, float], hold: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """A code whose bone measures `targets`, {attribute: value in `UNITS`}, and what is measured on it. With `hold` all
    other attributes stay as they are on `code` (1, ...).

    Raises `InputError` for an unknown attribute, a target outside its calibrated range or of attributes that do not go
    together, and a target that is not met within plausible latent density (to 2 % of the range).
    """
    if not tool.calibrated:
        raise InputError("too few of the bones that this model draws can be measured; nothing can be asked for")
    start = readings(tool.read, code)[0]
    if not start.isfinite().all():
        raise InputError("the bone of this code has no closed cortex and cannot be measured; take another code")
    wanted, held = (start.clone(), " with all else held") if hold else (torch.full_like(start, torch.nan), "")
    for name, value in targets.items():
        i = tool.index(name)
        low, high, unit = float(tool.low[i]), float(tool.high[i]), UNITS.get(name, "")
        if not low <= value <= high:
            says = f"{name} {value:g} {unit} is outside of the calibrated range"
            raise InputError(f"{says} {low:.4g} to {high:.4g} {unit}")
        wanted[i] = value
    own = tool.mahalanobis(torch.where(wanted.isfinite(), start, torch.nan))
    if tool.mahalanobis(wanted) > max(tool.max_mahalanobis, own):
        raise InputError(f"{targets}{held} goes with no bone that this model draws; ask for less, or hold less")
    found = optimise_to_target(tool, code, wanted[None])
    if found.error > 2 * TOLERANCE:
        got = ", ".join(f"{name} {float(found.measured[0, tool.index(name)]):.4g}" for name in targets)
        raise InputError(f"no plausible bone near this one measures {targets}{held}; reached: {got}")
    return found.codes, dict(zip(tool.names, found.measured[0].tolist(), strict=True))
