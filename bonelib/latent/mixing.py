"""Styles of two bones in one: crossings, what each style carries, and what injecting a second contrast changes
(Angermann et al. 2023, section 4.3; Fetty et al. 2020, style transfer).

A code with several styles is (styles, width), from coarse to fine; `synthesize` takes (n, styles, width).
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.core.pyramid import downsample
from bonelib.core.random import numpy_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM
from bonelib.evaluation.compartments import CLOSED, overlap, read
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import pair_mean
from bonelib.latent.codes import along
from bonelib.latent.models import Model
from bonelib.scans.config import Preprocess
from bonelib.scans.phantom import make_radius
from bonelib.scans.phantom.population import LIMITS
from bonelib.scans.phantom.stacks import coarsened, middle_stack
from bonelib.scans.volumes import Volume

UNSEEN = 100_000  # twins are patients of the phantom's from this number on, whom no cohort holds
TRAITS = ("Tt.Ar", "Tb.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "Ct.BMD", "Ct.Th")
OUTLINE = "outline"


def crossed(source: Tensor, target: Tensor, first: int) -> Tensor:
    """Codes (..., styles, width) whose `first` styles are the source's, and the others the target's: x^a of section
    4.3 is drawn from `crossed(w_s, w_t, a)`. Raises `InputError` for codes of one style, and a number beyond them."""
    if source.dim() < 2 or source.shape[-2] < 2:
        raise InputError(f"a code of the shape {tuple(source.shape)} has one style, and nothing in it can be crossed")
    if not 0 <= first <= source.shape[-2]:
        raise InputError(f"{first} styles of the source were asked for; accepted are 0 to {source.shape[-2]}")
    return torch.cat([source[..., :first, :], target[..., first:, :]], -2)


def crossings(styles: int, published, of: int) -> list[int]:
    """The `published` numbers of styles out of `of`, scaled to `styles`: each once, rising, and none without a mix."""
    return sorted({min(max(round(a * styles / of), 1), styles - 1) for a in published})


def scaled(styles: int, published, of: int) -> str:
    """What becomes of each of the `published` crossings, to be read: "3 of 15: 1 of 3; ..."."""
    return "; ".join(f"{a} of {of}: {crossings(styles, [a], of)[0]} of {styles}" for a in published)


def curve(model: Model, codes: Tensor, pairs: list[tuple[int, int]], patients, trait: str, seed: int) -> list[dict]:
    """One row for every pair (source, target) and every number of styles that are the source's, from 0 to all: the
    overlap of the mix's outline with either's, its distance to either in `trait`, in its unit, and its share of closed
    slices. NaN where no contours are found."""
    count = codes.shape[1]
    mixes = [torch.stack([crossed(codes[i], codes[j], a) for a in range(count - 1, 0, -1)]) for i, j in pairs]
    rows = []
    for (i, j), readings in zip(pairs, along(model, codes, pairs, mixes, seed, read), strict=True):
        source, target = readings[0], readings[-1]
        for a, mix in zip(range(count, -1, -1), readings, strict=True):
            numbers = {
                "overlap with source": overlap(mix.outline, source.outline),
                "overlap with target": overlap(mix.outline, target.outline),
                "distance to target": abs(mix.traits[trait] - target.traits[trait]),
                "distance to source": abs(mix.traits[trait] - source.traits[trait]),
                CLOSED: mix.traits[CLOSED],
            }
            rows.append({"styles of source": a, "first": patients[i], "last": patients[j]} | numbers)
    return sorted(rows, key=lambda row: row["styles of source"])


def _traits_and_outline(volume: Volume) -> tuple[dict[str, float], np.ndarray]:
    """`TRAITS` of one bone (NaN where it cannot be measured), and the mask within its outer contour."""
    outline = read(volume).outline
    found = (measure_or_none(volume, anisotropy=False) if outline.any() else None) or {}
    return {trait: found.get(trait, np.nan) for trait in TRAITS}, outline


def swaps(model: Model, codes: Tensor, pairs: list[tuple[int, int]], seed: int) -> dict[str, np.ndarray]:
    """What changes in the first bone of a pair when one style after the other, or every style, is the second's:
    differences (pairs, styles + 1) of every attribute of `TRAITS`, and for `OUTLINE` the share of voxels within either
    outer contour that lies in one of them alone. The last column is that of the whole other bone."""
    count, changes = codes.shape[1], {trait: [] for trait in (*TRAITS, OUTLINE)}
    swapped = [
        torch.stack([crossed(crossed(codes[i], codes[j], k), codes[i], k + 1) for k in range(count)]) for i, j in pairs
    ]
    for (own, outline), *others in along(model, codes, pairs, swapped, seed, _traits_and_outline):
        changes[OUTLINE].append([1 - overlap(outline, other) for _, other in others])
        for trait in TRAITS:
            changes[trait].append([traits[trait] - own[trait] for traits, _ in others])
    return {trait: np.array(of_pairs, float) for trait, of_pairs in changes.items()}


def style_attribution(
    changes: dict[str, np.ndarray], names: list[tuple[str, str]], *, seed: int, draws: int
) -> list[dict]:
    """Which style carries which attribute: one row each, with its interval. `names` are the two patients of every pair.

    The mean squared change when this style alone is another bone's, over that of the whole other bone. 1: the style
    decides it alone; 0: it has no say. They add up to 1 only if styles act independently.
    """
    rows = []
    for trait, values in changes.items():
        known = np.where(np.isfinite(values).all(axis=1)[:, None], values, np.nan) ** 2
        for k in range(values.shape[1] - 1):
            rng = numpy_rng(seed, "carried", trait, k)
            share = pair_mean(known[:, k], names, over=known[:, -1], rng=rng, draws=draws)
            rows.append({"attribute": trait, "style": k + 1} | share._asdict())
    return rows


def absolute_error(drawn: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of images (n, 1, z, y, x), (n,)."""
    return (drawn - images).abs().flatten(1).mean(1)


def injected(draw, source: Tensor, target: Tensor, images: Tensor, error=absolute_error) -> np.ndarray:
    """`error` (n, styles + 1) of the images drawn with the target's styles from the a-th on (Fetty et al. 2020).

    Column a keeps a styles of the source: column 0 is the target alone, the last the source alone. `source` and
    `target` are (n, styles, width), `images` (n, 1, z, y, x) in [0, 1] what should come out, such as the source's bone
    in the target's contrast; `draw` maps codes to such images.
    """
    with torch.no_grad():
        ways = (crossed(source, target, a) for a in range(source.shape[1] + 1))
        return torch.stack([error(draw(codes), images) for codes in ways], 1).numpy()


def by_style(rows: list[dict]) -> list[dict]:
    """The rows of `style_attribution` of several models as a table to be read: a row an attribute, a column a style."""
    table = {}
    for row in rows:
        first = {"model": row["model"], "": row["attribute"], "N": row["N"]}
        line = table.setdefault((row["model"], row["attribute"]), first)
        ends = " ({low:.2f} to {high:.2f})" if row["low"] is not None else ""
        line[f"style {row['style']}"] = "none" if row["value"] is None else ("{value:.2f}" + ends).format(**row)
    return pd.DataFrame(table.values()).fillna("").to_dict("records")


def paired_phantoms(count: int, mineral: float, how: Preprocess, spacing_mm: float, halvings: int, seed: int) -> Tensor:
    """Phantoms in two contrasts (2, count, 1, z, y, x) in [0, 1]: as they are, and with `mineral` times the density of
    both compartments, or the least that a phantom may have, in an otherwise equal bone, pose and scan.

    They are middle stacks of scans preprocessed as `how` says, on the grid of the stacks (`spacing_mm`) averaged over
    blocks of 2^`halvings` voxels a side; where that is coarse, they are drawn on voxels of `COARSE_MM`.
    """
    coarse, voxel_mm, left = coarsened(how, spacing_mm, halvings, COARSE_MM)
    with workers() as pool:
        jobs = [pool.submit(_pair_of_phantoms, k, mineral, coarse, voxel_mm, seed) for k in range(count)]
        stacks = torch.from_numpy(np.concatenate([job.result() for job in jobs]))
    for _ in range(left):
        stacks = downsample(stacks)
    return stacks.reshape(count, 2, *stacks.shape[1:]).transpose(0, 1)


def _pair_of_phantoms(number, mineral, how, voxel_mm, seed) -> np.ndarray:
    """Both twins of one patient, (2, 1, z, y, x)."""
    patient, stacks = UNSEEN + number, []
    volume, truth = make_radius(seed, voxel_mm=voxel_mm, patient=patient)
    poorer = {name: max(mineral * truth[name], LIMITS[name][0]) for name in ("Tb.BMD", "Ct.BMD")}
    for bone in (volume, make_radius(seed, voxel_mm=voxel_mm, patient=patient, **poorer)[0]):
        stacks.append(middle_stack(bone, truth["noise_sd"], how, seed, "noise of twins", patient))
    return np.stack(stacks)[:, None]
