"""Choose refinement settings on validation patients only."""

import json
from itertools import product
from pathlib import Path

import numpy as np
from torch import Tensor

from bonelib import InputError
from bonelib.core.config import section
from bonelib.core.files import write_json
from bonelib.evaluation import differentiable as gauge
from bonelib.evaluation.similarity import psnr
from bonelib.latent.config import Refinement, RefinementGrid
from bonelib.latent.inversion import Inverter, draw_codes, encode, further_measures, refine
from bonelib.latent.models import Model
from bonelib.networks.encoder import trunk

FILE = "refinement.json"


def morphometric_error(model: Model, real: Tensor, drawn: Tensor) -> np.ndarray:
    """Error of reconstructions (n,): RMS over `differentiable.FEATURES`, of which no loss of an inversion knows, each
    in SDs over the real volumes. `real` and `drawn` (n, 1, z, y, x) are on the generator's grid. NaN where no bone is
    found."""
    low, high = model.config["data"]["intensity"]
    levels = model.generator.stages - trunk(model.generator).stages
    spacing = [mm * 2**levels for mm in model.config["data"]["spacing_mm"]]
    seen = [gauge.features(low + (high - low) * v, spacing, 0.0)[:, : len(gauge.FEATURES)] for v in (real, drawn)]
    a, b = (found.clamp(min=1).log().double().numpy() for found in seen)
    return np.sqrt((((b - a) / (np.nanstd(a, 0) + 1e-9)) ** 2).mean(1))


def choose(
    volumes: Tensor, model: Model, inverter: Inverter, how: Refinement, tried: RefinementGrid
) -> tuple[Refinement, list[dict]]:
    """`how` with the weights and the rate of `tried` whose reconstructions of `volumes` measure most like them.

    Rows: weights, rate, PSNR, latent loss, share of bones whose loss was lowered, `morphometric_error` (mean over the N
    bones that can be read in all of them), whether it was chosen. If no bone can be read, `how` stays as it is.
    """
    start, rows, ways, wrong = encode(inverter.encoder, volumes), [], [], []
    for weights, rate in product(tried.weights, tried.rates):
        way = how.model_copy(update=dict(weights=weights, rate=rate))
        codes = refine(start, volumes, model, way, latent_discriminator=inverter.latent_discriminator).codes
        before, after = (
            further_measures(way, model, volumes, c, inverter.latent_discriminator) for c in (start, codes)
        )
        drawn = draw_codes(model, codes)
        wrong.append(morphometric_error(model, volumes, drawn))
        latent = next(float(v.mean()) for key, v in after.items() if key.startswith("latent"))
        lowered = float((after["refinement loss"] < before["refinement loss"]).mean())
        quality = float(psnr(volumes[:, 0].numpy(), drawn[:, 0].numpy()).mean())
        named = {"weights": " ".join(f"{w:g}" for w in weights), "rate": rate}
        rows.append(named | {"PSNR, dB": quality, "latent": latent, "loss lowered": lowered})
        ways.append(way)
    read = np.isfinite(wrong).all(0)
    scores = [float(values[read].mean()) if read.any() else None for values in wrong]
    best = int(np.argmin(scores)) if read.any() else None
    for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
        row |= {"attributes, SDs off": score, "N": int(read.sum()), "chosen": i == best}
    return how if best is None else ways[best], rows


def save_refinement(folder: str | Path, how: Refinement) -> None:
    """Write how the codes in a folder were refined, for `load_refinement`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / FILE, how.model_dump(mode="json"))


def load_refinement(folder: str | Path) -> Refinement:
    """How the codes of a folder of `05_inversion` were refined. Raises `InputError` if that is not there."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; 05_inversion writes it beside codes.safetensors")
    return section(Refinement, json.loads(path.read_text(encoding="utf-8")), str(path))
