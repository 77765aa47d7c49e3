"""A generator whose attributes can be read: ranges, what goes together, and how far out a code lies.

A *code* is what `synthesize` takes: (n, d), or (n, layers, d) with a style a layer. A *shift* is (n, d); it is added to
all styles of a code alike. `read(codes) -> (n, attributes)` is differentiable.
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
STORED = ("low", "high", "centre", "shape", "max_mahalanobis", "mean", "spread", "max_latent_norm")


class AttributeModel(NamedTuple):
    """A generator whose attributes can be read and asked for.

    `read(codes)` gives attributes `names` (n, k), of which `low` and `high` (k,) are the calibrated range. `centre`
    (k,), `shape` (k, k) and `max_mahalanobis`, the distance from the mean that `LIKELY` samples do not exceed, say
    which attributes go together. `read_with_margin(codes)` (n, k + 1), where readings can be lost: `read`, and behind
    it how far they are from that. `mean` (d,), `spread` (d, d): a code is mean + spread @ white, and `max_latent_norm`
    the norm of white that `PLAUSIBLE` of them do not exceed.
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
        """Between which values attribute `k` of a bone with attributes (k,) may be asked for, with all else held: the
        part of the calibrated range where `mahalanobis` is at most `max_mahalanobis`, or that of the bone itself."""
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


def readers(generator, gauge: SurrogateMorphometry, data: dict) -> tuple[Callable, Callable]:
    """`read(codes)` on what the generator itself draws, without noise, and `read_with_margin`. `data` is of the model's
    config.json. Super-resolution keeps the mean of every block of voxels, which is all that a gauge looks at."""
    draw, (low, high) = coarsely(generator), data["intensity"]
    spacing = [mm * 2 ** (generator.stages - trunk(generator).stages) for mm in data["spacing_mm"]]

    def density(codes):
        return low + (high - low) * draw(codes)

    return (
        lambda codes: gauge.read(density(codes), spacing),
        lambda codes: gauge.read_with_margin(density(codes), spacing),
    )


def readings(read: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Attributes of many codes (n, k), in batches and without gradients."""
    with torch.no_grad():
        return torch.cat([read(part) for part in codes.split(BATCH)])


def jacobian(read: Callable[[Tensor], Tensor], codes: Tensor, asked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What is read of codes, (n, k), and its derivatives (n, k, d) by a shift. Those of the first attributes that are
    not `asked` (up to k) are not computed, and 0."""
    values, slopes = [], []
    for part in codes.split(BATCH):
        shift = torch.zeros(len(part), part.shape[-1], requires_grad=True)
        found = read(shifted(part, shift))
        own = torch.zeros(*found.shape, shift.shape[1])
        for i in range(found.shape[1]):
            if asked is not None and i < len(asked) and not asked[i]:
                continue
            own[:, i] = torch.autograd.grad(found[:, i].sum(), shift, retain_graph=True)[0]
        values.append(found.detach())
        slopes.append(own)
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
    """An `AttributeModel` for a generator from samples of its own, the codes (samples, d) and their readings (samples,
    k).

    `within` (low, high), each (k,) with NaN for no bound, narrows the range, as to what a gauge was fitted on. If fewer
    than `LEAST` of the samples can be measured, the range is NaN and nothing can be asked for.
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
    own = {key.removeprefix("gauge."): value for key, value in tensors.items() if key.startswith("gauge.")}
    read, read_with_margin = readers(generator, SurrogateMorphometry(**own), data)
    rest = {key: tensors[key] if tensors[key].dim() else float(tensors[key]) for key in STORED}
    return AttributeModel(read, ATTRIBUTES, **rest, read_with_margin=read_with_margin)


def _flat(codes: Tensor) -> Tensor:
    return codes if codes.dim() == 2 else codes.mean(1)
