"""From scans of varying field of view to constant slice stacks (Angermann et al. 2023, section 3.1 and Figure 2)."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from scipy.fft import dctn, idctn

from bonelib import InputError
from bonelib.core.files import of_file, write_json
from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng
from bonelib.scans.config import Preprocess
from bonelib.scans.given import CORTEX, MARROW, contours_file
from bonelib.scans.plausibility import bone_box, cut_off, picture
from bonelib.scans.tables import read_table, write_table
from bonelib.scans.volumes import Volume, read_volume, regrid

NATIVE_MM = 0.0607  # voxel size of the published scans, for which the DCT threshold is stated
SPACING_TOLERANCE = 0.02  # of the voxel size, between a scan's header and params.yaml
MOST_CUT = 0.02  # of a bone that may lie outside of the constant shape
MOST_LEFT_OUT = 0.1  # of the scans, whose bones are cut more than that
SMALLEST = 0.25  # a scan may miss at most three quarters of the constant shape along an axis


def place(volume: Volume, shape: tuple[int, int, int]) -> tuple[tuple[int, ...], float]:
    """The first voxel (z, y, x) of a part of `shape` about the bone, and the share of the bone that it cuts off.

    Along an axis on which the scan is smaller, it lies in the middle of the part, and the first voxel is negative.
    """
    starts = [(have - want) // 2 for have, want in zip(volume.shape, shape, strict=True)]
    if volume.shape[1] <= shape[1] and volume.shape[2] <= shape[2]:
        return tuple(starts), 0.0
    seen = picture(volume)
    box = bone_box(seen)
    for axis, have, want in zip((1, 2), volume.shape[1:], shape[1:], strict=True):
        if box and have > want:
            middle = (box[axis - 1].start + box[axis - 1].stop - want) // 2
            starts[axis] = min(max(middle, 0), have - want)
    kept = [slice(max(0, s), s + want) for s, want in zip(starts[1:], shape[1:], strict=True)]
    return tuple(starts), cut_off(seen, kept)


def crop_or_mirror_pad(
    volume: Volume, shape: tuple[int, int, int], starts: tuple[int, ...] | None = None
) -> tuple[Volume, np.ndarray]:
    """The part of `shape` (z, y, x) voxels from `starts`, by default the `place` of the bone, mirrored at the edges.

    Returns the volume, whose affine follows, and the mask of padded voxels. Raises `InputError` for a scan with
    less than a quarter of `shape` along an axis, which mirroring would only repeat.
    """
    if any(have < SMALLEST * want for have, want in zip(volume.shape, shape, strict=True)):
        raise InputError(
            f"a scan of {volume.shape} voxels is too small; at least a quarter of {tuple(shape)} is needed"
        )
    starts = place(volume, shape)[0] if starts is None else starts
    inner = volume.voxels[tuple(slice(max(0, s), max(0, s) + want) for s, want in zip(starts, shape, strict=True))]
    pad = [(max(0, -s), want - n - max(0, -s)) for s, want, n in zip(starts, shape, inner.shape, strict=True)]
    padded = np.ones(shape, bool)
    padded[tuple(slice(before, before + n) for (before, _), n in zip(pad, inner.shape, strict=True))] = False
    return regrid(volume, np.pad(inner, pad, mode="symmetric"), starts), padded


def dct_noise(voxels: np.ndarray, clip: float) -> np.ndarray:
    """The noise volume: `voxels` rebuilt from its orthonormal DCT coefficients clipped to +-`clip`."""
    return idctn(dctn(voxels, norm="ortho").clip(-clip, clip), norm="ortho").astype(np.float32)


def clip_for(spacing_mm: float, clip: float) -> float:
    """The DCT threshold on a grid of `spacing_mm`, when `clip` is the one for the native grid of 0.0607 mm.

    An orthonormal DCT spreads noise of a given density over as many coefficients as there are voxels, so that its
    coefficients shrink with the square root of the voxel's volume, and the threshold has to follow.
    """
    return clip * (NATIVE_MM / spacing_mm) ** 1.5


def block_means(voxels: np.ndarray, step: int, dtype=None) -> np.ndarray:
    """Means over blocks of `step` voxels (z, y, x) a side; what is left at the ends is left out."""
    z, y, x = (n // step for n in voxels.shape)
    blocks = voxels[: z * step, : y * step, : x * step].reshape(z, step, y, step, x, step)
    return blocks.mean(axis=(1, 3, 5), dtype=dtype)


def subsample(volume: Volume, step: int) -> Volume:
    """Means over blocks of `step` voxels a side: densities are kept, and the affine follows."""
    if any(n % step for n in volume.shape):
        raise InputError(f"a volume of {volume.shape} voxels cannot be subsampled by {step}")
    return regrid(volume, block_means(volume.voxels, step, np.float32), (0, 0, 0), step)


def subsample_labels(labels: np.ndarray, step: int) -> np.ndarray:
    """Labels (z, y, x) of contours by majority over blocks of `step` voxels."""
    outer, inner = (block_means(labels >= label, step) >= 0.5 for label in (CORTEX, MARROW))
    return outer.astype(np.int8) + (outer & inner)


def slice_stacks(slices: int, depth: int, count: int) -> list[int]:
    """First slices of `count` equally spaced, overlapping stacks of `depth` that cover all of `slices`."""
    if count * depth < slices or depth > slices:
        raise InputError(f"{count} stacks of {depth} slices cannot cover {slices} slices")
    return [round(i * (slices - depth) / max(1, count - 1)) for i in range(count)]


def to_unit(density: np.ndarray, intensity: tuple[float, float]) -> np.ndarray:
    """Densities (mg HA/cm3) to [0, 1]; `intensity` are the densities of 0 and 1. Values beyond are clipped."""
    low, high = intensity
    return ((density - low) / (high - low)).clip(0, 1)


def to_density(values: np.ndarray, intensity: tuple[float, float]) -> np.ndarray:
    """The inverse of `to_unit`."""
    low, high = intensity
    return values * (high - low) + low


def steps(volume: Volume, how: Preprocess, starts=None) -> Iterator[tuple[str, Volume]]:
    """The preprocessing of one scan, step by step: (name, volume) for Figure 2; the last one is the result.

    `starts` is the first voxel of the part to be kept, where it is known. Raises `InputError` for a scan that is too
    small, and a bone that does not fit into `how.shape`, unless `starts` are given.
    """
    if starts is None:
        starts, cut = place(volume, how.shape)
        if cut > MOST_CUT:
            raise InputError(f"{_cuts(how, cut)}, at most {MOST_CUT:.0%} are accepted; enlarge preprocess.shape")
    padded, mask = crop_or_mirror_pad(volume, how.shape, starts)
    yield "cropped or mirror-padded", padded
    noise = dct_noise(padded.voxels, clip_for(float(np.prod(volume.spacing)) ** (1 / 3), how.dct_clip))
    yield "DCT noise volume", padded.with_voxels(noise)
    filled = padded.with_voxels(np.where(mask, noise, padded.voxels))
    yield "padding replaced by noise", filled
    yield f"subsampled by {how.subsample}", subsample(filled, how.subsample)


def _cuts(how: Preprocess, share: float) -> str:
    return f"cropping to {how.shape[1:]} voxels cuts off {share:.1%} of the bone"


def preprocess(volume: Volume, how: Preprocess, starts=None) -> Volume:
    """The last of `steps`."""
    *_, (_, result) = steps(volume, how, starts)
    return result


def split_patients(patients: list[str], held_out: float, seed: int) -> dict[str, str]:
    """ "train" or "held-out" for every patient, at least two of them held out."""
    known = sorted(set(patients))
    count = max(2, round(held_out * len(known)))
    if count > len(known) - 1:
        raise InputError(f"{len(known)} patients are too few to hold {count} of them out; at least 3 are needed")
    away = set(numpy_rng(seed, "split").permutation(known)[:count])
    return {patient: "held-out" if patient in away else "train" for patient in known}


def preprocess_cohort(
    cohort: str | Path, folder: str | Path, how: Preprocess, voxel_mm: float, seed: int, say=print
) -> dict:
    """Preprocess every scan of `cohort`, split the patients, and write `folder`.

    Writes volumes.npy (scan, z, y, x) float16 in [0, 1], stacks.csv, which carries the motion grades along, and
    stacks.json, whose content is returned. Where users gave contours, their labels are in contours.npy, int8 of the
    same shape. Scans with flags, and those whose bones the constant shape cuts, are "left out" of the split. Memory
    does not grow with the cohort. Raises `InputError` naming a scan whose voxels are not of `voxel_mm`, or that cannot
    be preprocessed, and where the constant shape cuts too many.
    """
    cohort, folder = Path(cohort), Path(folder)
    scans = read_table(cohort / "scans.tsv")
    if not scans:
        raise InputError(f"{cohort / 'scans.tsv'}: the table lists no scan")
    folder.mkdir(parents=True, exist_ok=True)
    volumes, cut = _write_volumes(scans, cohort, folder, how, voxel_mm, say)
    fit = [scan for scan in scans if not scan.get("flags")]
    splits = split_patients([scan["patient"] for scan in fit], how.held_out, seed)
    split = {scan["scan"]: splits[scan["patient"]] for scan in fit if scan["scan"] not in cut}
    starts = slice_stacks(volumes.shape[1], how.stack_slices, how.stacks_per_scan)
    known = [
        dict(scan=s["scan"], patient=s["patient"], split=split.get(s["scan"], "left out"), grade=s.get("grade") or "")
        for s in scans
    ]
    rows = [own | dict(volume=i, start=start) for i, own in enumerate(known) for start in starts]
    write_table(folder / "stacks.csv", rows)
    inside = [i for i, s in enumerate(scans) if split.get(s["scan"]) == "train"]
    sample = np.asarray(volumes[inside[:: max(1, len(inside) // 50)]], np.float32)
    with open(folder / "volumes.npy", "rb") as file:
        data_hash = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    meta = dict(
        spacing_mm=[voxel_mm * how.subsample] * 3,
        intensity=list(how.intensity),
        stack_slices=how.stack_slices,
        shape=[how.stack_slices, *volumes.shape[2:]],
        unit="mgHA",
        mean=float(sample.mean()),
        sd=float(sample.std()),
        data_hash=data_hash,
    )
    write_json(folder / "stacks.json", meta)
    return meta


def _write_volumes(scans, cohort: Path, folder: Path, how: Preprocess, voxel_mm, say) -> tuple[np.ndarray, set[str]]:
    """volumes.npy and, where there are any, contours.npy, by worker processes; the volumes, and scans cut too much."""
    shape = tuple(n // how.subsample for n in how.shape)
    volumes = np.lib.format.open_memmap(folder / "volumes.npy", "w+", np.float16, (len(scans), *shape))
    (folder / "contours.npy").unlink(missing_ok=True)
    labels = None
    if any((cohort / contours_file(scan["scan"])).is_file() for scan in scans):
        labels = np.lib.format.open_memmap(folder / "contours.npy", "w+", np.int8, (len(scans), *shape))
    work, cuts = partial(_one, cohort=cohort, how=how, voxel_mm=voxel_mm), []
    with workers() as pool:
        for i, (voxels, own, cut) in enumerate(pool.map(work, scans)):
            volumes[i] = voxels
            cuts.append(cut)
            if own is not None:
                labels[i] = own
            if (i + 1) % 50 == 0 or i + 1 == len(scans):
                say(f"preprocessed {i + 1} of {len(scans)} scans", flush=True)
    volumes.flush()
    return volumes, _cut_too_much(cohort, scans, cuts, how, say)


def _cut_too_much(cohort: Path, scans: list[dict], cuts: list[float], how: Preprocess, say) -> set[str]:
    """Names of the scans of whose bones `cuts` too much is cut off; raises `InputError` where they are many."""
    if max(cuts) > 0:
        say(f"cropping cuts off something of {sum(c > 0 for c in cuts)} of {len(cuts)} scans", flush=True)
    found = {scan["scan"]: (scan["file"], cut) for scan, cut in zip(scans, cuts, strict=True) if cut > MOST_CUT}
    for file, cut in found.values():
        says = _cuts(how, cut)
        if len(found) > MOST_LEFT_OUT * len(scans):
            many = f"at most {MOST_CUT:.0%} are accepted, and {len(found)} of {len(scans)} scans have more"
            raise InputError(f"{cohort / file}: {says}; {many}; enlarge preprocess.shape")
        say(f"{file}: {says}; left out of training", flush=True)
    return set(found)


def _one(scan: dict, cohort: Path, how: Preprocess, voxel_mm: float) -> tuple[np.ndarray, np.ndarray | None, float]:
    """A preprocessed scan in [0, 1], the labels of its contours, and the share of its bone that was cut off."""
    volume = read_volume(cohort / scan["file"], unit="mgHA")
    if not np.allclose(volume.spacing, voxel_mm, rtol=SPACING_TOLERANCE):
        found = " x ".join(f"{s:.4f}" for s in volume.spacing)
        raise InputError(f"{cohort / scan['file']}: voxels of {found} mm, but params.yaml says voxel_mm {voxel_mm}")
    starts, cut = place(volume, how.shape)
    with of_file(cohort / scan["file"]):
        voxels = to_unit(preprocess(volume, how, starts).voxels, how.intensity).astype(np.float16)
    file = cohort / contours_file(scan["scan"])
    if not file.is_file():
        return voxels, None, cut
    labels, padded = crop_or_mirror_pad(read_volume(file, unit="native"), how.shape, starts)
    return voxels, subsample_labels(np.where(padded, 0, labels.voxels), how.subsample), cut
