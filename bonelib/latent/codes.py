"""Load latent codes and decode them to volumes with fixed noise."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from bonelib import InputError
from bonelib.core.parallel import workers
from bonelib.core.random import torch_rng
from bonelib.evaluation.cohort_morphometry import COARSE_MM
from bonelib.latent.models import Model, calibrated
from bonelib.networks.encoder import trunk
from bonelib.scans.dataset import Stacks
from bonelib.scans.preprocessing import subsample
from bonelib.scans.tables import read_table
from bonelib.scans.volumes import Volume

PROGRESS_S = 20.0
KEPT_BYTES = 256 << 20  # of the volumes drawn last: 32 at laptop size
_kept: WeakKeyDictionary[Module, dict[tuple, np.ndarray]] = WeakKeyDictionary()


def load_codes(folder: str | Path, which: str = "refined") -> tuple[Tensor, list[dict]]:
    """The codes (n, *code) of a folder of `05_inversion` and the scans they belong to, one row a code.

    Raises `InputError` naming a file that is missing or damaged, or that does not fit the other.
    """
    folder = Path(folder)
    file, rows = folder / "codes.safetensors", read_table(folder / "codes.csv")
    if not file.is_file():
        raise InputError(f"{file}: no such file; a folder of codes holds it beside codes.csv")
    try:
        codes = load_file(file)[which]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{file}: holds no codes under the name {which!r} ({error})") from None
    if len(codes) != len(rows):
        raise InputError(f"{file}: holds {len(codes)} codes, but codes.csv lists {len(rows)}")
    return codes, rows


def mean_code(model: Model) -> Tensor:
    """The code at the middle of the latent space, (code,), where the model's generator is."""
    generator = model.generator
    place = next(generator.parameters(), torch.zeros(1)).device
    return generator.to_styles(generator.sample_latent(1, torch_rng(0, "any code")).to(place), 0.0)[0].detach()


def choose_pairs(
    values, patients, share: float, count: int, rng: np.random.Generator, *, opposite: bool = False
) -> list[tuple[int, int]]:
    """`count` pairs (all, if there are fewer) of codes of two patients, in random order.

    `values` (n,) is an attribute of every code, NaN where it is not known. Both codes are among the lowest `share` of
    it, or, `opposite`, the second among the highest. Raises `InputError` if there are none.
    """
    values = np.asarray(values, float)
    known = np.flatnonzero(np.isfinite(values))
    least, most = np.quantile(values[known], [share, 1 - share]) if len(known) else (np.nan, np.nan)
    low = known[values[known] <= least]
    others = known[values[known] >= most] if opposite else low
    pairs = [
        (int(i), int(j))
        for i in low
        for j in others
        if patients[i] != patients[j] and (values[i] < values[j] if opposite else i < j)
    ]
    if not pairs:
        wanted = "low and high one" if opposite else "two low ones"
        raise InputError(f"{len(known)} known values hold no {wanted} of two patients; take more codes")
    pairs = [pairs[k] for k in rng.permutation(len(pairs))[:count]]
    return pairs if opposite else [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]


def scan_of(data: Stacks, row: dict) -> Volume:
    """The stack of slices, in mg HA/cm3, that a row of codes.csv names by its scan and first slice."""
    found = [r for r in data.rows if r["scan"] == row["scan"] and r["start"] == int(row["start"])]
    if not found:
        raise InputError(f"codes.csv: scan {row['scan']} with first slice {row['start']} is not among the stacks")
    return calibrated(data.pooled(found[:1], 0)[0, 0].float().numpy(), {"unit": "mgHA"} | data.meta)


def decode(model: Model, code: Tensor, seed: int, voxel_mm: float = 0.0) -> Volume:
    """The bone of one code in mg HA/cm3, on the grid of the scans or, up to `voxel_mm`, on a coarser one, without the
    super-resolution, which keeps the means of blocks. All bones of a seed get the same noise."""
    data = model.config["data"]
    halvings = int(math.log2(max(1.0, voxel_mm / min(data["spacing_mm"]))))
    enlarged = model.generator.stages - trunk(model.generator).stages
    skipped = enlarged if halvings >= enlarged else 0
    values = _drawn(model, code, seed, skipped)
    volume = calibrated(values, data | {"spacing_mm": [mm * 2**skipped for mm in data["spacing_mm"]]})
    return subsample(volume, 2 ** (halvings - skipped))


def _drawn(model: Model, code: Tensor, seed: int, skipped: int) -> np.ndarray:
    """The volume (z, y, x) of a code in [0, 1]; the last `KEPT_BYTES` are kept, as paths and figures share bones."""
    kept, key = _kept.setdefault(model.generator, {}), (code.numpy().tobytes(), seed, skipped)
    if key not in kept:
        with torch.inference_mode():
            noise = torch_rng(seed, "noise of codes")
            found = model.generator.synthesize(code[None], model.generator.stages - skipped, noise=noise)
        kept[key] = found[0, 0].numpy()
        while len(kept) > 1 and sum(volume.nbytes for volume in kept.values()) > KEPT_BYTES:
            del kept[next(iter(kept))]
    return kept[key]


def each_measured(
    model: Model, codes: Tensor, seed: int, measure: Callable[[Volume], object], voxel_mm: float = COARSE_MM
) -> list:
    """`measure` of the bone of every code (n, *code), a list: drawn here, measured by worker processes."""
    last = time.monotonic()
    with workers() as pool:
        jobs = []
        for i, code in enumerate(codes):
            jobs.append(pool.submit(measure, decode(model, code, seed, voxel_mm)))
            if time.monotonic() - last > PROGRESS_S:
                last = time.monotonic()
                print(f"{i + 1} of {len(codes)} bones drawn", flush=True)
        return [job.result() for job in jobs]


def along(
    model: Model, codes: Tensor, pairs: list[tuple[int, int]], between: list[Tensor], seed: int, measure: Callable
) -> list[list]:
    """`measure` along one path of bones a pair: [of the first bone, of those `between` (k, *code), of the last].
    `pairs` are places in `codes` (n, *code); bones that end several paths are drawn and measured once."""
    ends = sorted({i for pair in pairs for i in pair})
    found = each_measured(model, torch.cat([codes[ends], *between]), seed, measure)
    at, rest = dict(zip(ends, found, strict=False)), iter(found[len(ends) :])
    return [[at[i], *(next(rest) for _ in inner), at[j]] for (i, j), inner in zip(pairs, between, strict=True)]
