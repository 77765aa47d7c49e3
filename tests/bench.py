"""What single steps cost on this machine: a phantom and its scan, the ruler, the metrics. Nothing is judged.

python tests/bench.py [--features 10000 512]

A bone is drawn and scanned at the scanner's own size, then measured at that size and at half of it, the paper's. Run it
where nothing else runs: wall seconds are of all cores.
"""

import argparse
import time

import numpy as np

from bonelib.core.parallel import peak_memory
from bonelib.core.random import numpy_rng
from bonelib.evaluation import metrics
from bonelib.evaluation.morphometry import measure
from bonelib.scans.phantom import make_radius, scanner
from bonelib.scans.preprocessing import subsample
from bonelib.scans.volumes import regrid

rows = []


def timed(name, make):
    wall, own = time.monotonic(), time.process_time()
    found = make()
    rows.append((name, time.monotonic() - wall, time.process_time() - own, peak_memory()))
    print("{:<44} {:8.1f} s wall {:8.1f} s of cores {:8.0f} MB at most so far".format(*rows[-1]), flush=True)
    return found


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--features", nargs=2, type=int, default=[10_000, 512])
    n, d = cli.parse_args().features
    rng = np.random.default_rng(0)
    real, fake = (rng.normal(size=(n, d)).astype(np.float32) for _ in range(2))
    # First, so that the memory is theirs: it is the most that the process ever took
    timed(f"Frechet distance of {n} x {d}", lambda: metrics.frechet_distance(real, fake))
    timed(f"kernel distance of {n} x {d}", lambda: metrics.kernel_distance(real, fake))
    timed(f"precision to coverage of {n} x {d}", lambda: metrics.manifold(real, fake))
    del real, fake
    bone, truth = timed("a radius at .0607 mm", lambda: make_radius(1))
    print(f"  of {bone.voxels.shape} voxels")
    seen = timed("its scan", lambda: scanner.scan(bone, numpy_rng(1, "noise"), noise_sd=truth["noise_sd"]))
    timed("its morphometry", lambda: measure(seen))
    even = regrid(seen, seen.voxels[tuple(slice(k // 2 * 2) for k in seen.shape)], (0, 0, 0))
    half = subsample(even, 2)
    print(f"  of {half.voxels.shape} voxels")
    for _ in range(2):
        timed("morphometry at half of the size", lambda: measure(half))
