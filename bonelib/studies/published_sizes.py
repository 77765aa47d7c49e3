"""What the published trainings would take on this machine: updates timed at every stage of a profile, nothing kept.

python -m bonelib.studies.published_sizes PROFILE [MODEL ...] [--updates N] [--to FILE]

times N updates of each model of the profile on each of its grids, on a GPU if there is one, and writes a table: seconds
an update, peak memory, power (of an NVIDIA GPU), and the hours and kWh that the whole schedule would take.
"""

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from bonelib import InputError
from bonelib.core.cli import command
from bonelib.core.config import section
from bonelib.core.parallel import peak_memory
from bonelib.core.random import torch_rng
from bonelib.params import check_file
from bonelib.scans.tables import write_table
from bonelib.studies.cost import prepared, update
from bonelib.training.config import Train

WARM_UP = 2  # updates that are not timed
POWER_EVERY_S = 0.5


def measure(params: Train, *, updates: int, seed: int, device: torch.device) -> list[dict]:
    """One row a stage: grid, batch, seconds an update, peak memory in GB, watts (None without a GPU's own reading),
    updates of the schedule, hours and kWh that they take. An update is one of the generator after `n_critic` of the
    critic."""
    plan, rows = params.schedule, []
    for stage, samples in enumerate(plan.samples, 1):
        batch = plan.batch[stage - 1]
        torch.manual_seed(torch_rng(seed, "published sizes").initial_seed())
        how, draws = dict(haar=params.haar, precision=params.precision), torch_rng(seed, "published sizes", stage)
        given = prepared(params.generator, params.critic, stage, batch, draws, device, **how)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP):
            update(*given, stage, params.n_critic, draws)
        _finish(device)
        with _Power(device) as power:
            began = time.perf_counter()
            for _ in range(updates):
                update(*given, stage, params.n_critic, draws)
            _finish(device)
            seconds = (time.perf_counter() - began) / updates
        wanted = samples / (batch * params.n_critic)
        hours, watts = wanted * seconds / 3600, power.mean()
        row = {"stage": stage, "grid": "x".join(map(str, given[-1].shape[2:])), "batch": batch}
        row |= {"seconds an update": seconds, "updates a second": 1 / seconds, "peak memory, GB": _peak(device)}
        row |= {"power, W": watts, "updates of the schedule": round(wanted), "hours": hours}
        rows.append(row | {"kWh": None if watts is None else hours * watts / 1000})
    return rows


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    """Of the GPU since the stage began; of the whole process, so far, without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_memory() * 2**20 / 1e9


class _Power:
    """The mean power of a GPU while the block lasts, as nvidia-smi reads it; None on any other device."""

    def __init__(self, device: torch.device):
        self.device, self.readings, self.over = device, [], threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self):
        if self.device.type == "cuda":
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        if self.device.type == "cuda":
            self.thread.join()

    def _read(self):
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        while not self.over.wait(POWER_EVERY_S):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
                self.readings.append(float(said.split()[self.device.index or 0]))
            except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
                return

    def mean(self) -> float | None:
        return sum(self.readings) / len(self.readings) if self.readings else None


@command
def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("profile")
    cli.add_argument("models", nargs="*", metavar="MODEL", help="all of the profile, if none is named")
    cli.add_argument("--updates", type=int, default=20)
    cli.add_argument("--to", type=Path, default=Path("scratch/published_sizes.csv"))
    args = cli.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = check_file()
    trained = values["profiles"].get(args.profile, {}).get("train")
    if not trained or not set(args.models) <= set(trained):
        raise InputError(
            f"params.yaml: profile {args.profile!r} has no such models; accepted are {trained and [*trained]}"
        )
    rows = []
    for name in args.models or trained:
        how = section(Train, trained[name], f"profiles.{args.profile}.train.{name}")
        for row in measure(how, updates=args.updates, seed=values["seed"], device=device):
            rows.append({"model": name, "device": _name(device)} | row)
            print(rows[-1], flush=True)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    write_table(args.to, rows)
    print(f"the table is {args.to}")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
