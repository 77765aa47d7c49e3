"""The texture of trabecular bone in a few numbers: what differs between two bones of the same density."""

from pathlib import Path

import numpy as np
from scipy import ndimage, stats

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.evaluation.contours import contours
from bonelib.evaluation.morphometry import trabecular
from bonelib.scans.dataset import TEXTURE, Stacks
from bonelib.scans.preprocessing import subsample, to_density
from bonelib.scans.tables import write_table
from bonelib.scans.volumes import Volume

MARGIN_MM = 0.5  # from the cortex, so that none of it is seen
SLICES = 16  # in the middle of the volume, on which thickness and spacing are measured


def texture(volume: Volume) -> dict[str, float]:
    """The numbers of `TEXTURE` of a volume of an even number of voxels (z, y, x), in mg HA/cm3.

    Tb.Th and Tb.Sp (mm) as of `morphometry.measure`; the skewness of the trabecular density, and its autocorrelations
    at .12 mm in plane and at .24 mm along the bone. Raises `InputError` where there are no contours.
    """
    _, inner = contours(subsample(volume, 2))
    inner = np.kron(inner, np.ones((2, 2, 2), bool))
    inner = ndimage.distance_transform_edt(np.pad(inner, ((1, 1), (0, 0), (0, 0)), "edge"), volume.spacing)[1:-1]
    mask = inner > MARGIN_MM
    if not mask.any():
        raise InputError(f"no trabecular bone farther than {MARGIN_MM} mm from the cortex")
    z = max(0, (volume.shape[0] - SLICES) // 2)
    middle = slice(z, z + SLICES)
    sizes = trabecular(Volume(volume.voxels[middle], volume.spacing), mask[middle], anisotropy=False)
    values = volume.voxels.astype(np.float32)
    step = [max(1, round(mm / s)) for mm, s in zip((0.24, 0.12, 0.12), volume.spacing, strict=True)]
    return {
        "Tb.Th": sizes["Tb.Th"],
        "Tb.Sp": sizes["Tb.Sp"],
        "skewness": float(stats.skew(values[mask])),
        "in plane": float(np.mean([_autocorrelation(values, mask, axis, step[axis]) for axis in (1, 2)])),
        "along z": _autocorrelation(values, mask, 0, step[0]),
    }


def texture_or_none(volume: Volume) -> dict[str, float] | None:
    """`texture`, or None where it cannot be measured."""
    try:
        return texture(volume)
    except InputError:
        return None


def measure_textures(stacks: Stacks, folder: str | Path, *, path: str | Path) -> list[dict]:
    """`texture` of the middle stack of each scan of `stacks` in `folder`: one row a scan, also written to `path`.

    A scan that cannot be measured has empty numbers. In parallel.
    """
    scans = {row["volume"]: row["scan"] for row in stacks.rows}
    where = (Path(folder) / "volumes.npy", stacks.meta)
    with workers() as pool:
        jobs = [pool.submit(_measured, index, *where) for index in scans]
        rows = [{"scan": scan} | job.result() for scan, job in zip(scans.values(), jobs, strict=True)]
    write_table(path, rows)
    return rows


def _measured(index, path, meta):
    volumes = np.load(path, mmap_mode="r")
    z = (volumes.shape[1] - meta["stack_slices"]) // 2
    voxels = volumes[index, z : z + meta["stack_slices"]].astype(np.float32)
    volume = Volume(to_density(voxels, meta["intensity"]), tuple(meta["spacing_mm"]))
    return texture_or_none(volume) or dict.fromkeys(TEXTURE)


def _autocorrelation(values, mask, axis, lag):
    """Of voxels `lag` apart along an axis, both in the mask."""
    a, b = np.moveaxis(values, axis, 0)[:-lag], np.moveaxis(values, axis, 0)[lag:]
    both = np.moveaxis(mask, axis, 0)[:-lag] & np.moveaxis(mask, axis, 0)[lag:]
    return float(np.corrcoef(a[both], b[both])[0, 1]) if both.sum() > 2 else float("nan")
