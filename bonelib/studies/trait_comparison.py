"""Real against generated volumes: morphometry, fixed patterns in the interior, and power spectra by region."""

import numpy as np
from scipy import ndimage, stats

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.evaluation.contours import closed_slices, contours, dilated, eroded
from bonelib.evaluation.features import standardised
from bonelib.evaluation.metrics import fixed_pattern_correlation
from bonelib.evaluation.morphometry import measure
from bonelib.evaluation.statistics import FEWEST, against_real, half_interval, pair_mean
from bonelib.scans.volumes import Volume

CLOSED = "closed slices"
TRAITS = ("Tt.Ar", "Tt.BMD", "Tb.BMD", "Ct.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "Ct.Th", "Ct.Po")
DEPTH_MM = 0.5  # from the endosteal contour inwards, slice by slice, where the interior counts as trabecular texture
AWAY_MM = (1.5, 5.0)  # from the periosteal contour outwards, where soft tissue shows nothing but noise
REGIONS = ("interior", "background")
BINS = 16
LEAST = 12  # measured bones, and real patients, for distances between their traits
SPECTRUM_FLOOR = 1e-3  # (mg HA/cm3)^2


def measured(volume: Volume) -> dict | None:
    """What morphometry says of a volume, or None where no contours are found.

    `traits` (`morphometry.measure`, and the share of slices with a closed ring), `interior` (mask of the trabecular
    interior), `spectra` {region: log10 power (BINS,)}.
    """
    try:
        periosteal, endosteal = contours(volume)
    except InputError:
        return None
    traits = measure(volume, compartments=(periosteal, endosteal), anisotropy=False)
    traits[CLOSED] = closed_slices(volume, periosteal)
    interior = eroded(endosteal, DEPTH_MM, volume.spacing[1:])
    near, far = (dilated(periosteal, mm, volume.spacing[1:]) for mm in AWAY_MM)
    regions = zip(REGIONS, (interior, _plain(volume, far & ~near)), strict=True)
    return dict(traits=traits, interior=interior, spectra={name: spectrum(volume, where) for name, where in regions})


def measure_groups(groups: dict[str, list[Volume]]) -> dict[str, list[dict | None]]:
    """`measured` of every volume of every group, by worker processes."""
    with workers() as pool:
        jobs = {name: [pool.submit(measured, v) for v in volumes] for name, volumes in groups.items()}
        return {name: [job.result() for job in of_group] for name, of_group in jobs.items()}


def spectrum(volume: Volume, region: np.ndarray) -> np.ndarray:
    """Log10 of the mean in-plane power (mg HA/cm3)^2 of a region's voxels in radial bins up to the Nyquist frequency,
    after slices are freed of the mean of the region and faded out over its border, per voxel. NaN where the region has
    none."""
    weight = ndimage.gaussian_filter(region.astype(np.float32), (0, 1, 1)) * region
    total = weight.sum(axis=(1, 2), keepdims=True)
    if not total.max() > 0:
        return np.full(BINS, np.nan)
    mean = (weight * volume.voxels).sum(axis=(1, 2), keepdims=True) / np.maximum(total, 1)
    power = np.abs(np.fft.rfft2((volume.voxels - mean) * weight)) ** 2
    power = power.sum(axis=0) / (weight**2).sum()
    rows, columns = np.fft.fftfreq(volume.shape[1]), np.fft.rfftfreq(volume.shape[2])
    index = np.ceil(np.hypot(rows[:, None], columns) / 0.5 * BINS).astype(int)
    sums, counts = (np.bincount(index.ravel(), w, BINS + 1)[1 : BINS + 1] for w in (power.ravel(), np.ones(power.size)))
    return np.log10(sums / counts + SPECTRUM_FLOOR)


def summary(
    volumes: list[Volume], found: list[dict | None], groups, *, seed: int, draws: int
) -> dict[str, dict[str, float | int | None]]:
    """What morphometry says of a group: {quantity: value, low, high, n}, the interval by halves of `groups` (patients).

    Shares with contours and of closed slices, fixed pattern of different patients, mean and SD of the traits; None
    where there is none.
    """
    groups = np.asarray(groups)
    here = np.array([result is not None for result in found])
    out = {"contours found": _of(here.astype(float), groups, np.mean, seed, draws)}
    values = [volume.voxels for volume, result in zip(volumes, found, strict=True) if result]
    inside, owners, rng = [result["interior"] for result in found if result], groups[here], numpy_rng(seed, "stamps")
    first, second, pairs = np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    if len(values) > 1:
        first, second, pairs = fixed_pattern_correlation(
            np.stack(values), np.stack(inside), groups=owners, sigma=1.5, seed=seed
        )
    alike = pair_mean(pairs, np.stack([owners[first], owners[second]], 1), rng=rng, draws=draws)
    low, high = (alike.low, alike.high) if alike.patients >= FEWEST else (None, None)
    out["fixed pattern"] = dict(value=alike.value, low=low, high=high, n=len(owners))
    for key in (CLOSED, *TRAITS):
        traits = np.array([np.nan if result is None else result["traits"][key] for result in found], float)
        out[key] = _of(traits, groups, np.mean, seed, draws)
        out[f"{key} SD"] = _of(traits, groups, np.std, seed, draws)
    return out


def _of(values, groups, statistic, seed, draws):
    """A statistic of the finite values, its interval and N."""
    kept = np.isfinite(values)
    values, groups, rng = values[kept], groups[kept], numpy_rng(seed, "summary interval")
    if not len(values):
        return dict(value=None, low=None, high=None, n=0)
    found = half_interval(lambda rows: float(statistic(values[rows])), groups, rng=rng, draws=draws)
    return dict(value=found.value, low=found.low, high=found.high, n=len(values))


def side_by_side(findings: dict[str, dict]) -> list[dict]:
    """The summaries of groups as a table: a row a quantity, a column a group, each value with its interval and N."""

    def cell(found):
        if found["value"] is None:
            return f"none, N={found['n']}"
        ends = "" if found["low"] is None else f" [{found['low']:.3g}, {found['high']:.3g}]"
        return f"{found['value']:.3g}{ends}, N={found['n']}"

    quantities = next(iter(findings.values()))
    return [{"": key} | {name: cell(of[key]) for name, of in findings.items()} for key in quantities]


def as_numbers(findings: dict[str, dict]) -> dict[str, float | int | None]:
    """The summaries as flat numbers: group.quantity, and .low, .high, .n and .real_against_real of it."""
    out = {}
    for name, of_group in findings.items():
        for key, found in of_group.items():
            out[f"{name}.{key}"] = found["value"]
            out |= {f"{name}.{key}.{what}": found[what] for what in ("low", "high", "n")}
            out[f"{name}.{key}.real_against_real"] = findings["other real"][key]["value"]
    return out


def trait_features(groups: dict[str, list[dict | None]], patients: list[str]) -> tuple[dict[str, np.ndarray], list]:
    """The traits as one more family of features: {group: (n, 10)} with "real" at mean 0 and SD 1, patients of "real".

    Bones in which a trait cannot be measured are left out, and so is a group left with fewer than `LEAST`; nothing is
    returned if "real" has fewer than `LEAST` patients.
    """
    sets = {name: matrix(found) for name, found in groups.items()}
    owners = [patients[i] for i in sets["real"][1]]
    kept = {name: values for name, (values, _) in sets.items() if len(values) >= LEAST}
    if len(set(owners)) < LEAST or "other real" not in kept or len(kept) < 3:
        return {}, owners
    others = {name: values for name, values in kept.items() if name != "real"}
    return dict(zip(["real", *others], standardised(kept["real"], *others.values()), strict=True)), owners


def matrix(found: list[dict | None], traits=TRAITS) -> tuple[np.ndarray, np.ndarray]:
    """Traits (n, len(traits)) of the volumes of a group in which all are finite, and the places of those volumes."""
    return _whole([r and [r["traits"][t] for t in traits] for r in found], len(traits))


def _whole(rows: list, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows in which all numbers are finite, and their places; a row may be None."""
    values = np.array([[np.nan] * columns if r is None else r for r in rows], float).reshape(-1, columns)
    whole = np.isfinite(values).all(axis=1)
    return values[whole], np.flatnonzero(whole)


def trait_distances(groups: dict[str, list[dict | None]], patients: list[str], *, seed: int, draws: int) -> list[dict]:
    """Wasserstein distance of every trait between each group and "real", in standard deviations of "real", and as
    "correlations" the mean absolute difference of the correlations between traits; by patients. Groups with fewer than
    four measured volumes are left out."""
    sets = {name: matrix(found) for name, found in groups.items()}
    names, enough = np.asarray(patients)[sets["real"][1]], {k: v for k, (v, _) in sets.items() if len(v) >= 4}
    if "real" not in enough or "other real" not in enough or len(set(names)) < FEWEST:
        return []
    rows = against_real(_distances, enough, names, "trait interval", seed=seed, draws=draws)
    return [dict(setting=name, trait=(*TRAITS, "correlations")[k]) | found | dict(d=1) for name, k, found in rows]


def _distances(real, fake, _):
    sd = real.std(axis=0) + 1e-9
    traits = [stats.wasserstein_distance(real[:, i] / sd[i], fake[:, i] / sd[i]) for i in range(real.shape[1])]
    with np.errstate(invalid="ignore"):  # a trait that is the same in all has no correlations
        gap = np.nan_to_num(np.corrcoef(real.T)) - np.nan_to_num(np.corrcoef(fake.T))
    return [*traits, float(np.abs(gap[np.triu_indices(len(gap), 1)]).mean())]


def spectral_distances(
    groups: dict[str, list[dict | None]], patients: list[str], *, seed: int, draws: int
) -> tuple[list[dict], list[dict]]:
    """How far the mean spectra of each group are from those of "real", by region: (rows, spectra as a table). The value
    is the mean over the bins of the absolute difference of log10 power (0.3 is a factor of two), by patients."""
    rows, curves = [], [{"bin": i + 1} for i in range(BINS)]
    for region in REGIONS:
        sets = {name: _whole([r and r["spectra"][region] for r in found], BINS) for name, found in groups.items()}
        names, enough = np.asarray(patients)[sets["real"][1]], {k: v for k, (v, _) in sets.items() if len(v) >= 4}
        for name, (values, _) in sets.items():
            for line, power in zip(curves, values.mean(axis=0) if len(values) else [np.nan] * BINS, strict=True):
                line[f"{region}, {name}"] = float(power)
        if "other real" in enough and len(set(names)) >= FEWEST:
            found = against_real(_gap, enough, names, "spectrum interval", region, seed=seed, draws=draws)
            rows += [dict(setting=name, region=region) | numbers | dict(d=BINS) for name, _, numbers in found]
    return rows, curves


def _gap(real, fake, _):
    return float(np.abs(real.mean(axis=0) - fake.mean(axis=0)).mean())


def _plain(volume, region):
    """The region without what is no soft tissue: the ulna, and what lies outside of the arm or the field of view."""
    if not region.any():
        return region
    low, middle, high = np.quantile(volume.voxels[region], [0.16, 0.5, 0.84])
    smooth = ndimage.uniform_filter(volume.voxels, 3)
    strange = abs(smooth - middle) > 1.5 * (high - low)
    return region & ~ndimage.binary_dilation(strange, iterations=3)
