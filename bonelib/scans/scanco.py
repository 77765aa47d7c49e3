"""Scanco AIM and ISQ: counts of the scanner, with the calibration, bone and side that the header names."""

import re
import struct
from pathlib import Path

import numpy as np

from bonelib import InputError
from bonelib.core.files import of_file
from bonelib.scans.grids import LPS, Calibration, Found, check_grid, grid, hashed, is_mgha

SITES = {20: ("radius", "left"), 21: ("radius", "right"), 38: ("tibia", "left"), 39: ("tibia", "right")}  # of Scanco
LEAST_MU_SCALING = 100  # scanners have 4096 or 8192; 1 stands for counts that were rescaled to another unit


def _scanco(path, shape, spacing, origin, offset, calibration, site, owner) -> Found:
    """int16 counts, read straight into place: the peak is the voxels themselves. No file says how the patient lay;
    the axes of the grid are taken as ITK takes them."""
    affine = LPS @ grid(np.eye(3), spacing, origin)
    check_grid(path, shape, spacing, affine, (path.stat().st_size - offset) // 2)
    voxels = np.fromfile(path, "<i2", int(np.prod(shape)), offset=offset).reshape(shape[::-1])
    bone, side = SITES.get(site, (None, None))
    return Found(voxels, tuple(spacing[::-1]), affine, "native", calibration, side, bone, hashed(owner))


def read_aim(path: Path) -> Found:
    """Grey Scanco AIM: int16 counts, calibration and site from its processing log. The header is read by py_aimio."""
    import py_aimio

    # aimio trusts the block sizes, and reads beyond the file where they are wrong
    with open(path, "rb") as file:
        head = file.read(64)
    start, word = (16, "q") if head.startswith(b"AIMDATA_V030   \0") else (0, "i")
    (first,) = struct.unpack_from(f"<{word}", head, start)
    blocks = first // struct.calcsize(f"<{word}")
    if not 4 <= blocks <= 5:
        raise InputError(f"{path}: not a readable AIM file; its header has no list of blocks")
    sizes = struct.unpack_from(f"<{blocks}{word}", head, start)
    if min(sizes[:4]) < 0 or sizes[2] > 1 << 24 or start + sum(sizes[:4]) > path.stat().st_size:
        raise InputError(f"{path}: not a readable AIM file; it is cut off")
    info = py_aimio.aim_info(str(path))
    shape = tuple(int(n) for n in info["dimensions"])
    if info["aim_type"] != 0x20002:
        raise InputError(f"{path}: a grey AIM has 16-bit counts, but this one is of another type, as masks are")
    if sizes[3] != 2 * np.prod(shape, dtype=float):
        raise InputError(f"{path}: not a readable AIM file; {shape} voxels do not fit its {sizes[3]} bytes of data")

    def number(key):
        found = re.search(rf"^{re.escape(key)}\s+([-+.\deE]+)\s*$", info["processing_log"], re.MULTILINE)
        return float(found[1]) if found else None

    unit = re.search(r"^Density: unit[^\S\n]+(\S.*)$", info["processing_log"], re.MULTILINE)
    density = (number("Density: slope"), number("Density: intercept")) if not unit or is_mgha(unit[1]) else (None,) * 2
    calibration = _calibration(path, number("Mu_Scaling"), number("HU: mu water"), *density)
    spacing, origin = _placed(info)
    bone, patient = number("Site"), number("Index Patient")
    return _scanco(path, shape, spacing, origin, info["byte_offset"], calibration, bone, patient)


def _placed(info: dict) -> tuple[list[float], np.ndarray]:
    """Spacing, stored in nm or as float32, and the place of voxel 0 in mm."""
    spacing = [round(float(s), 6) for s in info["element_size"]]
    return spacing, np.add(info["position"], info["offset"]) * spacing


def read_aim_mask(path: Path) -> Found:
    """The voxels of an AIM as they are, also of 8 bits, as masks have."""
    import py_aimio

    voxels, info = py_aimio.read_aim(str(path))
    spacing, origin = _placed(info)
    affine = LPS @ grid(np.eye(3), spacing, origin)
    check_grid(path, voxels.shape[::-1], spacing, affine, voxels.size)
    return Found(voxels, tuple(spacing[::-1]), affine)


def read_isq(path: Path) -> Found:
    """Scanco ISQ: int16 counts, mu_scaling, and the rest of the calibration where the header is extended."""
    import py_aimio

    with open(path, "rb") as file:
        head = file.read(512)
    kind, index, blocks = (struct.unpack_from("<i", head, at)[0] for at in (16, 28, 508))
    if not head.startswith(b"CTDATA-HEADER_V1") or kind != 3:
        raise InputError(f"{path}: not a readable ISQ file; its header is of another kind")
    if not 0 <= blocks <= 4096 or 512 * (blocks + 1) > path.stat().st_size:
        raise InputError(f"{path}: not a readable ISQ file; it is cut off")
    info = py_aimio.isq_info(str(path))
    # As ITK and the AIM log have it, the slope is per mu; aimio's own conversion takes it per count
    unit = info.get("rescale_units")
    density = (info.get("rescale_slope"), info.get("rescale_intercept")) if not unit or is_mgha(unit) else (None,) * 2
    calibration = _calibration(path, info["mu_scaling"], info.get("mu_water"), *density)
    shape, size_um = info["dimensions"], info["dimensions_um"]
    spacing = [um / n / 1000 if n > 0 else 0.0 for um, n in zip(size_um, shape, strict=True)]
    return _scanco(path, shape, spacing, np.zeros(3), 512 * (blocks + 1), calibration, info["site"], index)


def _calibration(path, mu_scaling, mu_water, slope, intercept) -> Calibration:
    """Of a Scanco header, in which 0 stands for a number that is not there."""
    if not slope:
        slope = intercept = None
    if mu_scaling and mu_scaling < LEAST_MU_SCALING:
        raise InputError(f"{path}: Mu_Scaling is {mu_scaling:g}, so that its counts are of another unit; write it anew")
    values = [v if v and np.isfinite(v) else None for v in (mu_scaling, mu_water, slope)]
    with of_file(path):
        return Calibration(*values, intercept if intercept is not None and np.isfinite(intercept) else None)
