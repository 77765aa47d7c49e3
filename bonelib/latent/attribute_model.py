"""Edit a latent code so that the decoded volume reaches target attributes.

A *code* is what `synthesize` takes: (n, d), or (n, layers, d) with a style a layer. A *shift* is (n, d); it is added to
all styles of a code alike. Whatever reads attributes is a function of codes, `read(codes) -> (n, attributes)`, which
torch can differentiate.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bonelib import InputError
from bonelib.core.random import torch_rng
from bonelib.evaluation.differentiable import ATTRIBUTES, UNITS, SurrogateMorphometry
from bonelib.networks.encoder import coarsely, trunk

BATCH = 64  # codes that are drawn at a time
RANGE = (0.01, 0.99)  # quantiles of samples between which an attribute may be asked for
LEAST = 0.1  # share of samples that must be measurable for a range
PLAUSIBLE = 0.999  # share of samples that lie no farther out than a code may be moved
LIKELY = 0.99  # share of samples whose attributes lie no farther from their mean than those that may be asked for
REACH = 12.0  # length of a move in SDs of the latent distribution beyond which it is another bone
TOLERANCE = 0.01  # of the range: where the closed loop stops
STEPS = 16  # of the closed loop at most
LONGEST, ASIDE = 2.5, 0.5  # of its steps in SDs, and how far parts of them are turned
PARTS = ((1.0, 0.6), (0.3, 0.1))  # of its steps, first and then
SUFFICIENT_DECREASE = 0.5  # of what is missing: a step that leaves less is taken at once
MARGIN_FLOOR = 0.02  # margin of a reading below which a step holds it
STARTS, BESIDE = 8, 1.5  # walks of the closed loop at most, and how many SDs beside a place all but one begin
STORED = ("low", "high", "centre", "shape", "max_mahalanobis", "mean", "spread", "max_latent_norm")
DAMPING = 3e-3  # of the mean squared effect, added before it is inverted


class AttributeModel(NamedTuple):
    """A generator whose attributes can be read and asked for.

    `read(codes)` gives attributes `names` (n, k). `low`, `high` (k,): the calibrated range, outside of which nothing is
    drawn. `centre` (k,) and `shape` (k, k), mean and covariance of the attributes of samples, and `max_mahalanobis`,
    the distance from the mean that `LIKELY` of them do not exceed, say which attributes go together (`mahalanobis`).
    `read_with_margin(codes)` (n, k + 1), where readings can be lost: `read`, and behind it how far they are from that.
    `mean` (d,), `spread` (d, d): of the generator's codes, a code is mean + spread @ white; `max_latent_norm`: the norm
    of white that `PLAUSIBLE` of them do not exceed.
    """

    read: Callable[[Tensor], Tensor]
    names: tuple[str, ...]
    low: Tensor
    high: Tensor
    centre: Tensor
    shape: Tensor
    max_mahalanobis: float
    mean: Tensor
    spread: Tensor
    max_latent_norm: float
    read_with_margin: Callable[[Tensor], Tensor] | None = None

    @property
    def span(self) -> Tensor:
        return self.high - self.low

    @property
    def calibrated(self) -> bool:
        """Whether enough samples could be measured for a range; if not, nothing can be asked for."""
        return bool((self.span > 0).all())

    @property
    def table(self) -> list[dict]:
        """The calibrated range as rows."""
        ends = zip(self.names, self.low.tolist(), self.high.tolist(), strict=True)
        return [dict(attribute=n, unit=UNITS.get(n, ""), low=a, high=b) for n, a, b in ends]

    def index(self, name: str) -> int:
        if name not in self.names:
            raise InputError(f"attribute {name!r} cannot be asked for; accepted are {', '.join(self.names)}")
        return self.names.index(name)

    def mahalanobis(self, values: Tensor) -> float:
        """How far attributes (k,) lie from those of samples: Mahalanobis distance over those that are not NaN."""
        asked = values.isfinite()
        off = (values - self.centre)[asked].double()
        return float((off @ torch.linalg.solve(self.shape[asked][:, asked].double(), off)).sqrt())

    def attainable_range(self, values: Tensor, k: int) -> tuple[float, float]:
        """Between which values attribute `k` of a bone with attributes (k,) may be asked for, with all else held.

        The part of the calibrated range where `mahalanobis` is at most `max_mahalanobis`, or that of the bone itself.
        """
        inverse, off = torch.linalg.inv(self.shape.double()), (values - self.centre).double()
        off[k] = 0
        bend, tilt = float(inverse[k, k]), float(inverse[k] @ off)
        room = max(self.max_mahalanobis, self.mahalanobis(values)) ** 2 - float(off @ inverse @ off)
        half = max(tilt**2 + bend * room, 0.0) ** 0.5
        ends = (float(self.centre[k]) + (-tilt - half) / bend, float(self.centre[k]) + (-tilt + half) / bend)
        return max(ends[0], float(self.low[k])), min(ends[1], float(self.high[k]))

    def distance(self, codes: Tensor) -> Tensor:
        """How far out codes lie (n,): the norm of their white coordinates, of the mean of several styles."""
        return torch.linalg.solve(self.spread, (_flat(codes) - self.mean).T).norm(dim=0)


def shifted(codes: Tensor, shift: Tensor) -> Tensor:
    """Codes with a shift (n, d) or (d,) added to all their styles."""
    return codes + (shift if codes.dim() == 2 or shift.dim() == 1 else shift[:, None])


def reader(generator, gauge: SurrogateMorphometry, data: dict) -> Callable[[Tensor], Tensor]:
    """`read(codes)` by a gauge on what the generator itself draws, without noise; `data` is of the model's config.json.

    Super-resolution is left out: it keeps the mean of every block of voxels, which is all that a gauge looks at.
    """
    density, spacing = _coarsely(generator, data)
    return lambda codes: gauge.read(density(codes), spacing)


def reader_with_margin(generator, gauge: SurrogateMorphometry, data: dict) -> Callable[[Tensor], Tensor]:
    """As `reader`, with the margin of the cortex behind the attributes (`SurrogateMorphometry.read_with_margin`)."""
    density, spacing = _coarsely(generator, data)
    return lambda codes: gauge.read_with_margin(density(codes), spacing)


def _coarsely(generator, data):
    """What maps codes to densities on the grid of the generator itself, and that grid's spacing."""
    draw, (low, high) = coarsely(generator), data["intensity"]
    spacing = [mm * 2 ** (generator.stages - trunk(generator).stages) for mm in data["spacing_mm"]]
    return lambda codes: low + (high - low) * draw(codes), spacing


def readings(read: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Attributes of many codes (n, k), in batches and without gradients."""
    with torch.no_grad():
        return torch.cat([read(part) for part in codes.split(BATCH)])


def jacobian(read: Callable[[Tensor], Tensor], codes: Tensor) -> tuple[Tensor, Tensor]:
    """Attributes (n, k) of codes, and their derivatives (n, k, d) by a shift."""
    values, slopes = [], []
    for part in codes.split(BATCH):
        shift = torch.zeros(len(part), part.shape[-1], requires_grad=True)
        found = read(shifted(part, shift))
        parts = [torch.autograd.grad(column.sum(), shift, retain_graph=True)[0] for column in found.unbind(1)]
        values.append(found.detach())
        slopes.append(torch.stack(parts, 1))
    return torch.cat(values), torch.cat(slopes)


def calibrate(
    read,
    names,
    generator,
    *,
    seed: int,
    samples: int,
    truncation: float | None = None,
    within=None,
    read_with_margin=None,
):
    """An `AttributeModel` for a generator: range and plausible density from samples of its own, with their readings.

    `within` (low, high), each (k,) with NaN for no bound, narrows the range, as to what a gauge was fitted on. If fewer
    than `LEAST` of the samples can be measured, the range is NaN and nothing can be asked for. Returns the instrument,
    the codes (samples, d) and their readings (samples, k).
    """

    def drawn(n, purpose):
        return generator.to_styles(generator.sample_latent(n, torch_rng(seed, purpose)), truncation).detach()

    codes = drawn(samples, "codes of the range")
    found = readings(read, codes)
    many = drawn(8 * codes.shape[-1], "codes of the density")
    mean, covariance = many.mean(0), torch.cov(many.T)
    floor = 1e-3 * covariance.diagonal().mean()
    spread = torch.linalg.cholesky(covariance + floor * torch.eye(len(mean)))
    measurable = found[found.isfinite().all(1)]
    enough = len(measurable) >= LEAST * samples
    low, high = measurable.quantile(torch.tensor(RANGE), 0) if enough else torch.full((2, len(names)), torch.nan)
    if within is not None and enough:
        low, high = torch.fmax(low, within[0]), torch.fmin(high, within[1])
    # What goes together is known of more bones than attributes, none of which is always the same
    enough = enough and len(measurable) > 2 * len(names) and bool((high > low).all())
    low, high = (low, high) if enough else torch.full((2, len(names)), torch.nan)
    centre, shape = (measurable.mean(0), torch.cov(measurable.T)) if enough else (low.clone(), torch.eye(len(names)))
    made = AttributeModel(read, tuple(names), low, high, centre, shape, 0.0, mean, spread, 0.0, read_with_margin)
    fresh = made.distance(drawn(8 * codes.shape[-1], "codes of the farthest"))
    far = torch.tensor([made.mahalanobis(values) for values in measurable] if enough else [0.0])
    return (
        made._replace(max_latent_norm=float(fresh.quantile(PLAUSIBLE)), max_mahalanobis=float(far.quantile(LIKELY))),
        codes,
        found,
    )


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

    Gauss-Newton on measured values: a step is the shortest, in SDs of the latent distribution, that corrects all
    errors by the effects measured at the code, so that what is right already is held by their null space; so is the
    cortex, where the step would open it (`AttributeModel.read_with_margin`). Of its longer parts the better one is
    taken; if it leaves much, the best of all parts and of parts turned aside at random; if none is better than
    where it stands, the step is halved. No step leaves the plausible region (`AttributeModel`, `REACH`); a code
    that lies outside of it may not move farther out. What a code does to a bone turns on the way, and a walk may
    end where it turns: up to `starts` walks are made, the later ones from places `BESIDE` the best so far and
    `BESIDE` the code, by turns. The best of all is returned, whether as asked or not. Codes share passes of the
    generator and nothing else; `seeds` has one of each.
    """
    rngs, white = [torch_rng(seed, "closed loop") for seed in seeds], torch.zeros(len(codes), codes.shape[-1])
    best, left = _gauss_newton(tool, codes, white, targets, steps, rngs), torch.arange(len(codes))
    for number in range(1, starts):
        left = left[best.error[left] > TOLERANCE]
        if not len(left):
            break
        aside = torch.stack([torch.randn(codes.shape[-1], generator=rngs[i]) for i in left])
        white = BESIDE * aside / aside.norm(dim=1, keepdim=True) + (best.white[left] if number % 2 else 0)
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
        values, slopes = jacobian(tool.read_with_margin or tool.read, shifted(codes[rows], white[rows] @ tool.spread.T))
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
            turns = turns * length[poor, None, None] * ASIDE / step.shape[1] ** 0.5
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
        step = _shortened(nearest(effect, wanted), longest[i])
        for margin, its in zip(values[i, k:], slopes[i, k:] @ tool.spread, strict=True):
            if float(margin + its @ step) < MARGIN_FLOOR:  # the cortex would open: hold it shut, as one attribute more
                step = nearest(torch.cat([effect, its[None]]), torch.cat([wanted, (MARGIN_FLOOR - margin)[None]]))
                step = _shortened(step, longest[i])
        found.append(step)
    return torch.stack(found)


def _shortened(step, longest):
    return step * (longest / step.norm().clamp(min=1e-9)).clamp(max=1.0)


def nearest(effect: Tensor, change: Tensor) -> Tensor:
    """The shortest step (d,) whose `effect` (k, d) is `change` (k,), damped where effects are nearly the same."""
    square = effect @ effect.T
    square = square + DAMPING * square.diagonal().mean().clamp(min=1e-9) * torch.eye(len(square))
    return effect.T @ torch.linalg.solve(square, change)


def move(
    tool: AttributeModel, code: Tensor, targets: dict[str, float], hold: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """A code whose bone measures `targets`, {attribute: value in `UNITS`}, and what is measured on it, attribute by
    attribute. With `hold` all attributes that are not named stay as they are on `code` (1, ...), a sample or a scan's.

    Raises `InputError` for an unknown attribute, a target outside its calibrated range or of attributes that do not go
    together, and a target that is not met within plausible latent density (to 2 % of the range): then nothing is drawn.
    """
    if not tool.calibrated:
        raise InputError("too few of the bones that this model draws can be measured; nothing can be asked for")
    start = readings(tool.read, code)[0]
    if not start.isfinite().all():
        raise InputError("the bone of this code has no closed cortex and cannot be measured; take another code")
    wanted = start.clone() if hold else torch.full_like(start, torch.nan)
    for name, value in targets.items():
        i = tool.index(name)
        low, high, unit = float(tool.low[i]), float(tool.high[i]), UNITS.get(name, "")
        if not low <= value <= high:
            raise InputError(
                f"{name} {value:g} {unit} is outside of the calibrated range {low:.4g} to {high:.4g} {unit}"
            )
        wanted[i] = value
    if tool.mahalanobis(wanted) > max(
        tool.max_mahalanobis, tool.mahalanobis(torch.where(wanted.isfinite(), start, torch.nan))
    ):
        held = ", with all else held," if hold else ""
        raise InputError(f"{targets}{held} goes with no bone that this model draws; ask for less, or hold less")
    found = optimise_to_target(tool, code, wanted[None])
    if found.error > 2 * TOLERANCE:
        got = ", ".join(f"{name} {float(found.measured[0, tool.index(name)]):.4g}" for name in targets)
        raise InputError(
            f"no plausible bone near this one measures {targets}{' with all else held' if hold else ''}; reached: {got}"
        )
    return found.codes, dict(zip(tool.names, found.measured[0].tolist(), strict=True))


def save_attribute_model(tool: AttributeModel, gauge: SurrogateMorphometry, path: str | Path) -> None:
    """Write all of an instrument but the generator, for `load_attribute_model`; safetensors."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: torch.as_tensor(getattr(tool, key)).contiguous() for key in STORED}
    save_file(tensors | {f"gauge.{key}": value.contiguous() for key, value in gauge._asdict().items()}, path)


def load_attribute_model(path: str | Path, generator, data: dict) -> AttributeModel:
    """The instrument that stage `attribute_editing` wrote, for the generator it was calibrated with."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; it is written by 08_attribute_editing")
    tensors = load_file(path)
    gauge = SurrogateMorphometry(
        **{key.removeprefix("gauge."): value for key, value in tensors.items() if key.startswith("gauge.")}
    )
    rest = {key: tensors[key] if tensors[key].dim() else float(tensors[key]) for key in STORED}
    return AttributeModel(
        reader(generator, gauge, data), ATTRIBUTES, **rest, read_with_margin=reader_with_margin(generator, gauge, data)
    )


def _flat(codes: Tensor) -> Tensor:
    return codes if codes.dim() == 2 else codes.mean(1)
