"""Whole scans at the scanner's own voxels: a generator of whole coarse scans, super-resolution by four and by two, and
beside it a HA-GAN that draws every voxel itself."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from bonelib import InputError
from bonelib.core.config import fingerprint
from bonelib.core.parallel import map_large_blocks, peak_memory, workers
from bonelib.core.random import numpy_rng, torch_rng
from bonelib.evaluation.contours import closed_slices, contours
from bonelib.evaluation.features import random3d, standardised
from bonelib.evaluation.metrics import frechet_distance
from bonelib.evaluation.morphometry import measure
from bonelib.evaluation.statistics import FEWEST, Interval, half_interval, of_rows, patient_mean
from bonelib.latent.models import Model, calibrated, draw_code, load_model, read_config, sampled_code
from bonelib.networks.registry import build_generator
from bonelib.scans.config import Preprocess
from bonelib.scans.dataset import Stacks
from bonelib.scans.phantom.cohort import make_radius
from bonelib.scans.phantom.population import COURSE
from bonelib.scans.phantom.stacks import draw_visits, middle_stack
from bonelib.studies.hagan_config import Native
from bonelib.training import checkpoint, loop, superres
from bonelib.training.config import training_section

FIRST, UNSEEN = 400_000, 450_000  # numbers of the phantoms to learn from and to compare with, whom no cohort holds
VISITS = (1, 2)  # of every patient that the coarse generator learns from
COARSE_MM = 0.25  # voxels on which these are drawn, at most
HELD_OUT = 8  # every so many patients of a training one is not learned from
TRAITS = ("Tt.Ar", "Tt.BMD", "Tb.BMD", "Ct.BMD", "BV/TV", "Tb.Th", "Tb.Sp", "Tb.N", "Ct.Th", "Ct.Po")
ENDS = ("value", "low", "high")
FOUND, CLOSED = "contours found", "closed slices"
REAL, DRAWN, BY_HAGAN = "scans of phantoms", "samples", "samples, HA-GAN alone"
MIDDLE = ("superres.safetensors", "superres-critic.safetensors", "superres-record.json")
DIRECT = "direct.safetensors"  # of the HA-GAN that draws every voxel, in the model's folder
SECONDS, MOST_MB = 120, 4096  # that a sample may take on two cores


def data_of(how: Native, volumes: np.ndarray, patients: Sequence[int], spacing_mm: float) -> Stacks:
    """Whole scans (n, z, y, x) of patients as `Stacks` of one stack each; every eighth patient is held out, of fewer
    the last one."""
    held = {p for p in patients if (p - FIRST) % HELD_OUT == HELD_OUT - 1} or {patients[-1]}
    rows = [
        {"patient": f"phantom {p}", "scan": f"phantom {p}, {i}", "volume": i, "start": 0}
        | {"split": "held-out" if p in held else "train"}
        for i, p in enumerate(patients)
    ]
    meta = {
        "spacing_mm": [spacing_mm] * 3, "intensity": list(how.preprocess.intensity), "shape": list(volumes.shape[1:]),
        "stack_slices": volumes.shape[1], "unit": "mgHA", "phantoms": True,
        "data_hash": fingerprint(volumes.shape, [float(v.sum(dtype=np.float64)) for v in volumes]),
    }  # fmt: skip
    return Stacks(volumes, rows, meta)


def coarse_scans(how: Native, seed: int) -> Stacks:
    """Whole scans on the grid of the coarse generator, two visits of every patient."""
    patients = range(FIRST, FIRST + how.patients)
    grid = (how.preprocess, how.voxel_mm, how.halvings, COARSE_MM)
    drawn, _ = draw_visits(patients, VISITS, COURSE, *grid, seed)
    volumes = drawn.flatten(0, 1)[:, 0].numpy().astype(np.float16)
    return data_of(how, volumes, np.repeat(patients, len(VISITS)), how.voxel_mm * 2**how.halvings)


def fine_scans(how: Native, patients: Sequence[int], seed: int) -> Stacks:
    """Whole scans of patients, a visit each, at the scanner's own voxels."""
    with workers() as pool:
        jobs = [pool.submit(_fine_scan, number, how.preprocess, how.voxel_mm, seed) for number in patients]
        volumes = np.stack([job.result() for job in jobs])
    return data_of(how, volumes, patients, how.voxel_mm)


def _fine_scan(patient: int, how: Preprocess, voxel_mm: float, seed: int) -> np.ndarray:
    bone, truth = make_radius(seed, voxel_mm=voxel_mm, patient=patient)
    return middle_stack(bone, truth["noise_sd"], how, seed, "noise of whole scans", patient).astype(np.float16)


# Training


def train_model(how: Native, superres_of: str | Path, folder: str | Path, *, state: str | Path, seed: int, say=print):
    """Train the coarse generator and the last super-resolution network, and write the model of all three to `folder`;
    the network between them is that of the model folder `superres_of`. Raises `InputError` where that has none."""
    _check_middle(how, Path(superres_of))
    state, own = Path(state), dict(seed=seed, say=say)
    loop.train(how.train, coarse_scans(how, seed), state / "coarse", state=state / "train", **own)
    scans = fine_scans(how, range(FIRST, FIRST + how.scanned), seed)
    none = np.zeros((len(scans.volumes), 0), np.float32)  # no texture is asked of the last network
    superres.train_superres(how.finer, scans, none, state / "finer", state=state / "train-finer", **own)
    assemble(how, state / "coarse", superres_of, state / "finer", folder)
    if how.direct:
        loop.train(how.direct, scans, state / "direct", state=state / "train-direct", **own)
        add_direct(state / "direct", folder)


def _check_middle(how: Native, model: Path) -> None:
    """Raise `InputError` where the super-resolution of a model folder does not fit between the other two networks."""
    if missing := [name for name in MIDDLE if not (model / name).is_file()]:
        raise InputError(f"{model / missing[0]}: no such file; native.middle must name a model with super-resolution")
    data = read_config(model, "data")["data"]
    wanted = {"spacing_mm": [2 * how.voxel_mm] * 3, "intensity": list(how.preprocess.intensity)}
    for key, value in wanted.items():
        if not np.allclose(data[key], value):
            raise InputError(f"{model / 'config.json'}: {key} is {data[key]}, but native needs {value}")


def add_direct(source: str | Path, folder: str | Path) -> None:
    """Put the generator of the model folder `source` beside the model, with how it was trained and for how long."""
    source, folder = Path(source), Path(folder)
    shutil.copyfile(source / "generator.safetensors", folder / DIRECT)
    shutil.copyfile(source / "record.json", folder / "direct-record.json")
    content = read_config(folder, "sha256")
    content["direct"] = read_config(source, "train")["train"]
    content["sha256"]["direct"] = checkpoint.digest(folder / DIRECT)
    checkpoint.write_json(folder / "config.json", content)


def assemble(how: Native, coarse: str | Path, superres_of: str | Path, finer: str | Path, folder: str | Path) -> Path:
    """Write the model folder of a coarse generator and two networks behind it."""
    coarse, middle, finer, folder = Path(coarse), Path(superres_of), Path(finer), Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(coarse, folder, ignore=shutil.ignore_patterns("candidates", "encoder*"))
    copies = {name: middle / name for name in MIDDLE} | {"finer-record.json": finer / "record.json"}
    copies |= {f"finer{end}.safetensors": finer / f"superres{end}.safetensors" for end in ("", "-critic")}
    for name, source in copies.items():
        shutil.copyfile(source, folder / name)
    content, behind = (json.loads((one / "config.json").read_text(encoding="utf-8")) for one in (coarse, middle))
    last = json.loads((finer / "config.json").read_text(encoding="utf-8"))
    content |= {"superres": behind["superres"], "finer": last["superres"]}
    shape = [how.preprocess.stack_slices, *how.preprocess.shape[1:]]
    content["data"] |= {"spacing_mm": [how.voxel_mm] * 3, "shape": shape, "stack_slices": shape[0]}
    names = ("generator", "critic", "superres", "superres-critic", "finer", "finer-critic")
    content["sha256"] = {name: checkpoint.digest(folder / f"{name}.safetensors") for name in names}
    checkpoint.write_json(folder / "config.json", content)
    return folder


# What is drawn


def parts(model: Model) -> list[dict]:
    """The networks of a model, in order: voxels that each draws, their length in mm, and its parameters."""
    cascade, (z, y, x), mm = model.generator, model.config["data"]["shape"], model.config["data"]["spacing_mm"][0]
    left, rows = cascade.stages - cascade.generator.stages, []
    names = ("HA-GAN", *("super-resolution" for _ in cascade.finer), "super-resolution")
    for name, network in zip(names, (cascade.generator, cascade.superres, *cascade.finer), strict=True):
        left -= getattr(network, "halvings", 0)
        voxels = " x ".join(str(n >> left) for n in (z, y, x))
        count = sum(p.numel() for p in network.parameters())
        rows.append({"network": name, "voxels": voxels, "mm": mm * 2**left, "parameters": count})
    return rows


class Drawn(NamedTuple):
    """Volumes (n, z, y, x) in [0, 1], float16; seconds a sample, and the most memory in MB beyond the start."""

    volumes: np.ndarray
    seconds: float
    memory: float


def drawn(folder: str | Path, n: int, seed: int, threads: int) -> Drawn:
    """`n` samples of a model folder, drawn in a process of its own."""
    with workers(1) as pool:
        return pool.submit(_drawn, folder, n, seed, threads).result()


def _drawn(folder, n: int, seed: int, threads: int) -> Drawn:
    map_large_blocks()
    torch.set_num_threads(threads)
    model, start, began = load_model(folder), peak_memory(), time.perf_counter()
    truncation, volumes = model.how.generator.truncation, []
    for i in range(n):
        code = sampled_code(model, seed, truncation, i)
        volumes.append(draw_code(model, code, seed, number=i).astype(np.float16))
    return Drawn(np.stack(volumes), (time.perf_counter() - began) / n, peak_memory() - start)


def cost(found: Drawn, threads: int) -> dict:
    """What a sample costs, as a row."""
    return {"voxels": found.volumes[0].size, "threads": threads, "seconds": found.seconds, "MB": found.memory}


def direct(folder: str | Path, n: int, seed: int) -> np.ndarray:
    """`n` samples of the HA-GAN that draws every voxel itself, (n, z, y, x) in [0, 1], float16."""
    how = training_section(read_config(Path(folder), "direct")["direct"], "direct", str(Path(folder) / "config.json"))
    generator = build_generator(how.generator, precision=how.precision)
    generator.load_state_dict(load_file(Path(folder) / DIRECT))
    generator.requires_grad_(False).eval()
    volumes = []
    for i in range(n):
        latent = generator.sample_latent(1, torch_rng(seed, "sample", i))
        with torch.inference_mode():
            volumes.append(generator.synthesize(generator.to_styles(latent, how.generator.truncation))[0, 0].half())
    return torch.stack(volumes).numpy()


def coarse_quality(model: Model, how: Native, n: int, *, seed: int, draws: int) -> dict:
    """The Frechet distance on random3d of `n` samples of the coarse generator to whole scans of `n` patients whom it
    has not seen, with its interval by halves of the patients; and that of scans of other such patients."""
    cascade, truncation = model.generator, model.how.generator.truncation
    with torch.inference_mode():
        codes = (sampled_code(model, seed, truncation, i) for i in range(n))
        fake = torch.cat([cascade.coarse(code) for code in codes])[:, 0].float().numpy()
    patients, grid = range(UNSEEN, UNSEEN + 2 * n), (how.preprocess, how.voxel_mm, how.halvings, COARSE_MM)
    scans = draw_visits(patients, VISITS[:1], COURSE, *grid, seed)[0][:, 0, 0].numpy()
    raw = random3d(scans[n:])
    (others, real), samples = standardised(raw, random3d(scans[:n])), standardised(raw, random3d(fake))[1]
    rng = numpy_rng(seed, "interval", "native")
    found = half_interval(of_rows(frechet_distance, real, samples), range(n), range(n), rng=rng, draws=draws)
    return {"N": n, "patients": n} | _ends(found) | {"real against real": frechet_distance(real, others)}


def _ends(found: Interval) -> dict[str, float | None]:
    return dict(zip(ENDS, found[:3], strict=True))


# What is measured


def measured(groups: dict[str, np.ndarray], data: dict) -> dict[str, list[dict | None]]:
    """Morphometry at their own voxels of volumes (n, z, y, x) in [0, 1], and the share of closed slices; None where no
    contours are found."""
    with workers() as pool:
        jobs = {name: [pool.submit(_measured, v, data) for v in volumes] for name, volumes in groups.items()}
        return {name: [job.result() for job in of_group] for name, of_group in jobs.items()}


def _measured(values: np.ndarray, data: dict) -> dict | None:
    volume = calibrated(values.astype(np.float32), data)
    try:
        outer, inner = contours(volume)
        traits = measure(volume, compartments=(outer, inner), anisotropy=False)
    except InputError:
        return None
    return traits | {CLOSED: closed_slices(volume, outer)}


def table(found: dict[str, list[dict | None]], *, seed: int, draws: int) -> list[dict]:
    """The share of bones in which contours are found, then morphometry of these: a row a trait and group, with the
    mean, its interval by bone where there are `FEWEST`, and the SD."""
    rows = []
    for trait in (FOUND, CLOSED, *TRAITS):
        for name, bones in found.items():
            kept = [bone for bone in bones if bone is not None]
            values = [float(bone is not None) for bone in bones] if trait == FOUND else [bone[trait] for bone in kept]
            mean = patient_mean(values, range(len(values)), rng=numpy_rng(seed, "native", trait, name), draws=draws)
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            ends = _ends(mean) if len(values) >= FEWEST else {"value": mean.value, "low": None, "high": None}
            rows.append({"trait": trait, "group": name, "N": len(values), **ends, "SD": sd})
    return rows


def readable(rows: list[dict]) -> list[dict]:
    """The rows of `table`, a line a trait and a column a group: mean, interval, SD."""
    lines = {}
    for row in rows:
        value, low, high = (row[key] for key in ENDS)
        between = "" if low is None else f" ({low:.4g} to {high:.4g})"
        spread = "" if row["SD"] is None or row["trait"] in (FOUND, CLOSED) else f", SD {row['SD']:.3g}"
        cell = f"{value:.4g}{between}{spread}" if row["N"] else "none"
        lines.setdefault(row["trait"], {"trait": row["trait"]})[f"{row['group']}, N {_bones(rows, row['group'])}"] = (
            cell
        )
    return list(lines.values())


def _bones(rows: list[dict], group: str) -> int:
    return next(row["N"] for row in rows if row["group"] == group)


def trained_directly(folder: str | Path) -> dict:
    """How long the HA-GAN that draws every voxel itself was trained, beside the coarse one; empty without it."""
    files = {name: Path(folder) / f"{name}record.json" for name in ("", "direct-")}
    if not files["direct-"].is_file():
        return {}
    coarse, own = (json.loads(file.read_text(encoding="utf-8")) for file in files.values())
    keys = ("samples", "seconds")
    return {key: own[key] for key in keys} | {f"{key} of the coarse one": coarse[key] for key in keys}


def verdict(rows: list[dict], spent: dict, alone: dict) -> list[str]:
    """Sentences on what was asked: whether a sample keeps to `SECONDS` and `MOST_MB`, which traits agree and how much
    they vary, and what the HA-GAN alone (`trained_directly`) draws."""
    of = {(row["trait"], row["group"]): row for row in rows}
    limits, said = {"seconds": SECONDS, "MB": MOST_MB}, []
    for key, limit in limits.items():
        met = "met" if spent[key] <= limit else "not met"
        how = f"A sample takes {spent[key]:,.0f} {key} with {spent['threads']} threads"
        said.append(f"{how}; at most {limit:,} were asked on two cores: {met}.")
    for trait in (CLOSED, *TRAITS):
        real, fake = of[trait, REAL], of[trait, DRAWN]
        if real["N"] and fake["N"]:
            spread = f"; its SD is {fake['SD'] / real['SD']:.0%} of theirs" if real["SD"] and fake["SD"] else ""
            said.append(f"{trait}: {fake['value'] / real['value'] - 1:+.0%} beside scans{spread}.")
    if alone:
        says = f"{alone['samples']:,} volumes in {alone['seconds']:,.0f} s"
        coarse = "{samples of the coarse one:,} in {seconds of the coarse one:,.0f} s".format(**alone)
        said.append(
            f"The HA-GAN alone has seen {says}, the coarse one {coarse}: they are not compared at equal training."
        )
    return said
