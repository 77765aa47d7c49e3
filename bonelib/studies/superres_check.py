"""Whether super-resolution draws what real scans have: the same bones, once real and once drawn from their means."""

import numpy as np
import torch

from bonelib.core.parallel import workers
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.morphometry import measure_or_none
from bonelib.evaluation.statistics import of_rows, patient_interval
from bonelib.evaluation.texture import texture_or_none
from bonelib.latent.models import calibrated, enlarge
from bonelib.scans.dataset import TEXTURE
from bonelib.scans.volumes import Volume

SHOWN = ("Tb.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "DA", "Conn.D", "Ct.BMD", "Ct.Th")
ASKED = ("Tb.Th", "Tb.Sp")
RANGE = 1.5  # SDs of the training bones, from which thickness and spacing are asked for
BONE = 600.0  # mg HA/cm3; blocks of voxels that stay below it are air or soft tissue


def codes(superres, coarse: np.ndarray, textures: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardised texture codes (n, 5) of coarse volumes (n, z, y, x): those of `textures` (n, 5), and drawn ones."""
    given, (mean, sd) = torch.from_numpy(np.asarray(coarse, np.float32))[:, None], superres.texture_scaling
    own = ((torch.from_numpy(np.asarray(textures, np.float32)) - mean) / sd).nan_to_num()
    draws = torch.randn(len(given), superres.texture, generator=torch_rng(seed, "texture draws"))
    return own.numpy(), superres.prior(given, draws).numpy()


def traits(real: list[Volume], others: dict[str, list[Volume]], *, seed: int, draws: int) -> list[dict]:
    """Morphometry of real volumes, one a patient, and of the same bones in `others`: one row a trait, with the means
    and, of each of `others`, the difference to `real` in percent with its interval by patient, and the correlation.
    Volumes that have no contours in any of the groups are left out of all."""
    found = {name: _all(measure_or_none, volumes) for name, volumes in {"real": real, **others}.items()}
    kept = [i for i, of_bone in enumerate(zip(*found.values(), strict=True)) if all(of_bone)]
    rows = []
    for trait in SHOWN if kept else ():
        values = {name: np.array([of_group[i][trait] for i in kept]) for name, of_group in found.items()}
        true = values.pop("real")
        row = {"trait": trait, "N": len(kept), "real": true.mean()}
        for name, drawn in values.items():
            rng = numpy_rng(seed, "superres interval", trait, name)
            change = patient_interval(of_rows(_relative, drawn, true), range(len(kept)), rng=rng, draws=draws)
            r = float(np.corrcoef(drawn, true)[0, 1]) if len(kept) > 2 else None
            row |= {name: drawn.mean(), f"{name}, difference %": change.value}
            row |= {f"{name}, low": change.low, f"{name}, high": change.high, f"{name}, r": r}
        rows.append(row)
    return rows


def spread(groups: dict[str, list[Volume]]) -> list[dict]:
    """Median and 10th to 90th percentile of the texture of groups of volumes: one row a number of `TEXTURE`."""
    found = {name: [one for one in _all(texture_or_none, volumes) if one] for name, volumes in groups.items()}
    rows = []
    for number in TEXTURE if all(found.values()) else ():
        row = {"number": number}
        for name, textures in found.items():
            low, middle, high = np.quantile([one[number] for one in textures], [0.1, 0.5, 0.9])
            row |= {f"{name}, N": len(textures), f"{name}, median": middle, f"{name}, spread": high - low}
        rows.append(row)
    return rows


def obedience(superres, coarse: np.ndarray, data: dict, *, seed: int, count: int) -> list[dict]:
    """How the thickness and spacing of trabeculae that are asked for are met, over `count` volumes: a row a number with
    the correlation of asked and measured.

    Coarse volumes (n, z, y, x) in turn are drawn with texture codes whose two numbers are uniform over `RANGE` SDs, and
    whose others follow as among the bones of the prior.
    """
    given = torch.from_numpy(np.asarray(coarse, np.float32))[[i % len(coarse) for i in range(count)], None]
    asked = torch.rand(count, len(ASKED), generator=torch_rng(seed, "asked textures")) * 2 * RANGE - RANGE
    code = completed(superres, given, asked)
    drawn = enlarge(superres, given[:, 0].numpy(), seed, code.numpy())
    found = _all(texture_or_none, [calibrated(v, data) for v in drawn])
    rows = []
    for i, number in enumerate(ASKED):
        pairs = [(float(asked[k, i]), one[number]) for k, one in enumerate(found) if one]
        r = float(np.corrcoef(np.array(pairs).T)[0, 1]) if len(pairs) > 2 else None
        rows.append({"number": number, "N": len(pairs), "r": r})
    return rows


def completed(superres, given: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Texture codes (n, 5) whose first numbers are `asked` (n, k), the others expected of such bones."""
    mean = superres.prior(given, given.new_zeros(len(given), superres.texture))
    return mean + superres.prior.completed(asked - mean[:, : asked.shape[1]])


def lines(volumes: np.ndarray) -> dict[str, float | None]:
    """Power at a period of two voxels in air and soft tissue, over that of its neighbours, along each axis.

    `volumes` (n, z, y, x) in mg HA/cm3 are looked at in blocks of 16 x 32 x 32 voxels without bone. 1 is no line.
    """
    z, y, x = volumes.shape[1] // 16, volumes.shape[2] // 32, volumes.shape[3] // 32
    cut = volumes[:, : 16 * z, : 32 * y, : 32 * x].reshape(-1, z, 16, y, 32, x, 32).transpose(0, 1, 3, 5, 2, 4, 6)
    blocks = cut.reshape(-1, 16, 32, 32)
    blocks = blocks[blocks.max((1, 2, 3)) < BONE]
    if not len(blocks):
        return {"N": 0, "z": None, "y": None, "x": None}
    found = {"N": len(blocks)}
    for name, axis in (("z", 1), ("y", 2), ("x", 3)):
        others = tuple(a for a in (1, 2, 3) if a != axis)
        profile = np.abs(np.fft.rfft((blocks - blocks.mean((1, 2, 3), keepdims=True)).mean(others), axis=1)) ** 2
        power = profile.mean(0)
        found[name] = float(power[-1] / power[-4:-1].mean())
    return found


def _all(function, volumes: list[Volume]) -> list:
    """`function` of every volume, in parallel."""
    with workers() as pool:
        return list(pool.map(function, volumes))


def _relative(a, b):
    return float(100 * (a.mean() - b.mean()) / b.mean())
