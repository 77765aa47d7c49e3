"""Eight graded corruptions of a set of real bones, from none (0) to severe (1).

Five act on a volume in mg HA/cm3 and keep its grid; three choose which bones are in a set, and return indices.
Strength is continuous, with one random draw for all strengths.
"""

import numpy as np
import torch
from scipy import ndimage

from bonelib import InputError
from bonelib.evaluation.contours import BONE, contours, eroded
from bonelib.scans.phantom.motion import GRADES, draw_events, spectral_residual
from bonelib.scans.volumes import Volume

BLUR_MM = 0.3  # SD of the strongest blur
NOISE_MG = 200.0  # SD of the strongest noise, mg HA/cm3
MOTION_GRADE = 4  # beyond, a copy lies so far aside that moving it further changes no more
HOLES_PER_MM3 = 5.0  # of trabecular bone, at most
HOLE_MM = 0.3  # radius: a plate is a fifth of a millimetre thick
DEPTH_MM = 0.5  # from the endosteal contour inwards, slice by slice
DROPPED = 2 / 3  # of the set's range of a trait, at most
REPEATED = 2  # bones that stand for all in the strongest duplication


def interior_of(volume: Volume) -> np.ndarray:
    """Mask (z, y, x) of the trabecular compartment, half a millimetre inwards. Raises `InputError` as `contours`."""
    return eroded(contours(volume)[1], DEPTH_MM, volume.spacing[1:])


def blurred(volume: Volume, strength: float, rng: np.random.Generator, interior=None) -> Volume:
    """Blurred by a Gaussian of an SD of up to `BLUR_MM`."""
    sigma = [_share(strength) * BLUR_MM / mm for mm in volume.spacing]
    return volume.with_voxels(ndimage.gaussian_filter(volume.voxels.astype(np.float32), sigma, mode="nearest"))


def noisy(volume: Volume, strength: float, rng: np.random.Generator, interior=None) -> Volume:
    """White noise of an SD of up to `NOISE_MG` added."""
    noise = rng.standard_normal(volume.shape, np.float32)
    return volume.with_voxels(volume.voxels + np.float32(_share(strength) * NOISE_MG) * noise)


def moving(volume: Volume, strength: float, rng: np.random.Generator, interior=None) -> Volume:
    """Streaks and doubled edges of an arm that moved: one draw of `MOTION_GRADE`, of which it moves as far and as long.

    Both grow, as the displacement alone does not: further away than a trabecula is wide, one place is as wrong as
    another.
    """
    strength = _share(strength)
    if strength == 0:
        return volume.with_voxels(volume.voxels.astype(np.float32))
    events = [
        event._replace(
            length=strength * event.length,
            shift=tuple(strength * mm for mm in event.shift),
            rotation=strength * event.rotation,
            rise=strength * event.rise,
        )
        for event in draw_events(rng, GRADES[MOTION_GRADE])
    ]
    still = torch.from_numpy(np.ascontiguousarray(volume.voxels, np.float32))
    residual = spectral_residual(still, volume.spacing, events, range(len(still)))
    return volume.with_voxels((still + residual).numpy())


def thinned(volume: Volume, strength: float, rng: np.random.Generator, interior=None) -> Volume:
    """Trabeculae lose up to one voxel of their surface: towards the least of each voxel and its six neighbours."""
    interior = interior_of(volume) if interior is None else interior
    voxels = volume.voxels.astype(np.float32)
    least = ndimage.minimum_filter(voxels, footprint=ndimage.generate_binary_structure(3, 1), mode="nearest")
    share = np.float32(_share(strength)) * (interior & (ndimage.maximum_filter(voxels, 3, mode="nearest") > BONE))
    return volume.with_voxels(voxels + share * (least - voxels))


def perforated(volume: Volume, strength: float, rng: np.random.Generator, interior=None) -> Volume:
    """Holes of `HOLE_MM` radius in trabecular bone, up to `HOLES_PER_MM3` of it, of the density of the marrow."""
    interior = interior_of(volume) if interior is None else interior
    voxels = volume.voxels.astype(np.float32)
    bone = np.argwhere(interior & (voxels > BONE))
    marrow = voxels[interior & (voxels <= BONE)]
    if not len(bone) or not len(marrow):
        return volume.with_voxels(voxels)
    most = max(1, round(HOLES_PER_MM3 * len(bone) * np.prod(volume.spacing)))
    centres = bone[rng.integers(len(bone), size=most)][
        : round(_share(strength) * most)
    ]  # fewer holes at the same places
    away = np.ones(volume.shape, bool)
    away[tuple(centres.T)] = False
    hole = interior & (ndimage.distance_transform_edt(away, volume.spacing) <= HOLE_MM) if len(centres) else ~away
    return volume.with_voxels(np.where(hole, np.minimum(voxels, np.median(marrow)), voxels))


VOLUMES = {
    "blur": blurred,
    "noise": noisy,
    "motion": moving,
    "thinned trabeculae": thinned,
    "perforated plates": perforated,
}


def duplicated(chosen: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Indices `chosen` of which up to all are replaced by those of `REPEATED` of them."""
    chosen = np.asarray(chosen)
    order = rng.permutation(len(chosen))
    out, count = chosen.copy(), round(_share(strength) * len(chosen))
    out[order[::-1][:count]] = chosen[order[np.arange(count) % REPEATED]]
    return out


def dropped(trait: np.ndarray, n: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of `n` of the samples with the lowest values of `trait`: up to `DROPPED` of all never occur."""
    lowest = np.argsort(trait, kind="stable")[: max(n, round((1 - DROPPED * _share(strength)) * len(trait)))]
    if len(trait) < n:
        raise InputError(f"trait has {len(trait)} values, but {n} samples are wanted")
    key = rng.random(len(trait))  # one draw for all strengths
    return lowest[np.argsort(key[lowest], kind="stable")[:n]]


def copied(n: int, reference: int, strength: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which of `n` samples are replaced, and by which of `reference` training samples: up to half, each another one."""
    order, source = rng.permutation(n), rng.permutation(reference)
    count = min(round(_share(strength) * n / 2), reference)
    return order[:count], source[:count]


def _share(strength):
    if not 0 <= strength <= 1:
        raise InputError(f"strength is {strength}; accepted are numbers from 0 to 1")
    return strength
