"""Slice stacks of the preprocessed scans; order and augmentation are functions of the sample's number."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bonelib import InputError
from bonelib.core.pyramid import downsample, haar
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.scans.config import Augment
from bonelib.scans.tables import read_table

TEXTURE = ("Tb.Th", "Tb.Sp", "skewness", "in plane", "along z")  # of the trabecular density, and its autocorrelations
TEXTURE_FILE = "texture.csv"
EXCLUDED_GRADES = (4, 5)  # motion so strong that a network would learn it (section 3.3)


@dataclass(frozen=True)
class Stacks:
    """Preprocessed scans in [0, 1], and the overlapping slice stacks they are cut into.

    `volumes` (scan, z, y, x) float16 on disk; `rows` one dictionary a stack (scan, patient, volume, start, split);
    `meta` what `01_preprocess` wrote: spacing in mm, intensity map, slices of a stack, hash of the data.
    """

    volumes: np.ndarray
    rows: list[dict]
    meta: dict

    def of(self, split: str) -> list[dict]:
        """The rows of "train" or "held-out" (or "validation", see `set_apart`)."""
        rows = [row for row in self.rows if row["split"] == split]
        if not rows:
            raise InputError(f"stacks.csv holds no stacks with split {split!r}")
        return rows

    def pooled(self, rows: list[dict], halvings: int) -> Tensor:
        """The stacks of `rows` (n, 1, z, y, x) as float16, averaged over blocks of 2^halvings voxels a side."""
        depth = self.meta["stack_slices"]
        stacks = (self.volumes[row["volume"], row["start"] : row["start"] + depth] for row in rows)
        return torch.cat([_pooled(stack, halvings).half() for stack in stacks])


def load_stacks(folder: str | Path, grades: str | Path | None = None) -> Stacks:
    """Open what `01_preprocess` wrote, without the scans that `grades`, the table of `02_motion_grading`, excludes.

    Those are graded 4 or 5, by hand or by the grader (column grade). Raises `InputError` naming the missing file,
    or a table that leaves nothing.
    """
    folder = Path(folder)
    for name in ("volumes.npy", "stacks.csv", "stacks.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; run `make repro` first, or give another folder of stacks")
    rows = [row | {key: int(row[key]) for key in ("volume", "start")} for row in read_table(folder / "stacks.csv")]
    meta = json.loads((folder / "stacks.json").read_text(encoding="utf-8"))
    if grades is not None:
        excluded = {r["scan"] for r in read_table(grades) if r["grade"] in map(str, EXCLUDED_GRADES)}
        rows = [row for row in rows if row["scan"] not in excluded]
        if not rows:
            raise InputError(f"{grades}: every scan is graded 4 or 5, and none is left to learn from")
        used = json.dumps([meta["data_hash"], [[row["scan"], row["start"]] for row in rows]])
        meta["data_hash"] = hashlib.sha256(used.encode()).hexdigest()[:16]
    return Stacks(np.load(folder / "volumes.npy", mmap_mode="r"), rows, meta)


def load_textures(folder: str | Path, stacks: Stacks) -> np.ndarray:
    """The numbers of `TEXTURE` of every volume of the stacks, (volumes, 5), NaN where a scan could not be measured."""
    path = Path(folder) / TEXTURE_FILE
    found = {row["scan"]: [float(row[name] or "nan") for name in TEXTURE] for row in read_table(path)}
    values = np.full((len(stacks.volumes), len(TEXTURE)), np.nan, np.float32)
    for row in stacks.rows:
        if row["scan"] not in found:
            raise InputError(f"{path}: holds no scan {row['scan']}, which stacks.csv lists")
        values[row["volume"]] = found[row["scan"]]
    return values


def halved(stacks: Stacks, times: int) -> Stacks:
    """The same scans averaged over blocks of 2^times voxels a side; odd voxels at the end are left out."""
    if times == 0:
        return stacks
    block, (_, *shape) = 2**times, stacks.volumes.shape
    slices = tuple(slice(n // block * block) for n in shape)
    halves = np.empty((len(stacks.volumes), *(n // block for n in shape)), np.float16)
    for scan, half in zip(stacks.volumes, halves, strict=True):
        half[:] = _pooled(scan[slices], times)[0, 0]
    rows = [{**row, "start": row["start"] // block} for row in stacks.rows]
    meta = stacks.meta | dict(
        spacing_mm=[mm * block for mm in stacks.meta["spacing_mm"]],
        stack_slices=stacks.meta["stack_slices"] // block,
        shape=[n // block for n in stacks.meta["shape"]],
    )
    return Stacks(halves, rows, meta)


def _pooled(voxels: np.ndarray, halvings: int) -> Tensor:
    return downsample(torch.from_numpy(voxels.astype(np.float32))[None, None], halvings)


def set_apart(stacks: Stacks, share: float) -> Stacks:
    """The same stacks with a share of the training patients, at least one, in the split "validation" instead.

    Who they are depends on their names alone. Raises `InputError` if nobody would be left to learn from.
    """
    patients = {row["patient"] for row in stacks.of("train")}
    ordered = sorted(patients, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(ordered[: max(1, round(share * len(patients)))])
    if chosen == patients:
        raise InputError(f"stacks.csv: of {len(patients)} training patients, none is left beside those set apart")
    moved = [row["split"] == "train" and row["patient"] in chosen for row in stacks.rows]
    rows = [row | {"split": "validation"} if move else row for row, move in zip(stacks.rows, moved, strict=True)]
    return Stacks(stacks.volumes, rows, stacks.meta)


def band_statistics(stacks: Tensor, bands: bool) -> Tensor:
    """Mean and SD (2, bands) of stacks (n, 1, z, y, x), or of each of their eight Haar bands."""
    values = haar(stacks.float()) if bands else stacks.float()
    # The floor keeps bands that are nearly empty on smooth coarse grids from being blown up to pure noise.
    return torch.stack([values.mean(dim=(0, 2, 3, 4)), values.std(dim=(0, 2, 3, 4)).clamp(min=0.02)])


def order(n: int, first: int, count: int, seed: int, every: int = 1) -> list[int]:
    """Which of `n` stacks are `count` samples, every `every`th from number `first`: a new permutation every epoch."""
    wanted = range(first, first + count * every, every)
    epochs = {k // n: numpy_rng(seed, "order", k // n).permutation(n) for k in wanted}
    return [int(epochs[k // n][k % n]) for k in wanted]


def augmented(stacks: Tensor, first: int, seed: int, how: Augment | None, every: int = 1) -> Tensor:
    """Rotate and zoom each stack (n, 1, z, y, x) in plane, every `every`th sample from number `first` (section 3.1).

    Bicubic, with the mirrored image beyond the edge; the slices along z stay as they are.
    """
    if how is None:
        return stacks
    n, _, _, height, width = stacks.shape
    draws = torch.cat([torch.rand(1, 2, generator=torch_rng(seed, "augment", first + i * every)) for i in range(n)])
    angle = (2 * draws[:, 0] - 1) * math.radians(how.rotation)
    zoom = 1 + draws[:, 1] * (how.zoom - 1)
    cos, sin, none = torch.cos(angle) / zoom, torch.sin(angle) / zoom, torch.zeros(n)
    # affine_grid counts in half widths and half heights, so that the off-diagonal terms carry the aspect ratio
    lines = [cos, -sin * height / width, none], [sin * width / height, cos, none]
    theta = torch.stack([torch.stack(line, 1) for line in lines], 1)
    grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False).to(stacks)
    moved = F.grid_sample(stacks[:, 0], grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return moved[:, None].clamp(0, 1)
