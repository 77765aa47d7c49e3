"""The one resumable loop: what is common to every training, whatever a step of it is."""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bonelib import InputError
from bonelib.training import checkpoint, distributed
from bonelib.training.distributed import Ranks

SAVE_EVERY_S = 20.0
SAY_EVERY_S = 10.0
CURVE_EVERY = 5  # steps between two points of the curves
MAX_IN_A_ROW = 20  # updates without a finite gradient after which a training has diverged
MAX_LEFT_OUT = 0.01  # of all updates
LATE = 0.8  # of a training; from here on no update may be left out


@dataclass
class Progress:
    """How far a training is: with the tensors, all that the rest of it depends on."""

    end: int  # samples
    seen: int = 0
    steps: int = 0
    updates: int = 0  # of all networks
    left_out: int = 0  # updates without a finite gradient
    late: int = 0  # of these, in the last fifth
    in_a_row: int = 0
    seconds: float = 0.0  # that all of it took, interruptions left out
    curves: list[list[float]] = field(default_factory=list)

    def count(self, taken: bool) -> None:
        """Count one update, taken or left out."""
        self.updates += 1
        self.left_out += not taken
        self.late += not taken and self.seen >= LATE * self.end
        self.in_a_row = 0 if taken else self.in_a_row + 1

    def account(self, place: object) -> str:
        """One line on the updates left out. Raises `InputError` where they are too many to trust what was trained."""
        says = f"{self.left_out} of {self.updates} updates were left out, as their gradient was not finite"
        if self.late or self.left_out > MAX_LEFT_OUT * self.updates:
            allowed = f"accepted are {MAX_LEFT_OUT:.0%}, and none in the last fifth, where {self.late} were"
            raise InputError(f"{place}: {says}; {allowed}; a lower rate may help")
        return says


def record(at: Progress, seed: int, device: torch.device | str = "cpu") -> dict[str, object]:
    """How a training went and on what machine: what is written beside its weights as record.json."""
    return {
        "seed": seed,
        "samples": at.seen,
        "updates": at.updates,
        "updates left out": at.left_out,
        "seconds": round(at.seconds),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "processor": _processor(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    if not (file := Path("/proc/cpuinfo")).is_file():  # Linux alone has it
        return platform.processor()
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())


def update(adam: torch.optim.Optimizer, loss: Tensor, clip: float, ranks: Ranks | None = None) -> bool:
    """One update with the gradient's norm clipped (Appendix B); False, and none, where the gradient is not finite.

    Of several ranks the gradient is the mean, so that all of them clip, step or leave out alike.
    """
    adam.zero_grad(set_to_none=True)
    loss.backward()
    if ranks:
        distributed.average_gradients(adam.param_groups[0]["params"], ranks)
    norm = torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], clip)
    if finite := bool(torch.isfinite(norm)):
        adam.step()
    return finite


def update_ema(average: torch.nn.Module, network: torch.nn.Module, half_life: float, updates: int) -> None:
    """Move the running average of the weights; it starts afresh with each stage, whose new layers are random."""
    keep = min(0.5 ** (1 / half_life), (1 + updates) / (10 + updates)) if half_life else 0.0
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def rate_at(share: float, final_decay: float) -> float:
    """Factor on the learning rate at a share of the training: falls to 2 % over the last `final_decay` of it."""
    return 1.0 if share <= 1 - final_decay else max(0.02, (1 - share) / final_decay)


def run(
    step: Callable[[Progress], dict[str, float]],
    objects: dict[str, torch.nn.Module | torch.optim.Optimizer],
    *,
    end: int,
    state: Path,
    fingerprint: str,
    name: str,
    say=print,
) -> Progress:
    """Call `step(progress)` until `end` samples are seen, from the newest state in `state` on, bit for bit.

    A step trains `objects`, advances `progress.seen`, counts its updates, and returns the values of its curves; all its
    random numbers are keyed by `progress.seen`. Raises `InputError` when it is asked to stop, after saving; when a
    value is not finite; and where too many updates were left out.
    """
    say = partial(say, flush=True)
    with checkpoint.locked(state), checkpoint.asked_to_stop() as asked:
        at = Progress(end)
        if found := checkpoint.load_state(state, fingerprint):
            tensors, meta = found
            checkpoint.unpack(tensors, **objects)
            at = Progress(**{key.name: meta[key.name] for key in fields(Progress)})
            say(f"{name}: continues at {at.seen} of {end} samples")
        saved = said = time.monotonic()
        said_seen = at.seen
        while at.seen < end:
            begun = time.monotonic()
            values = step(at)
            at.steps += 1
            at.seconds += time.monotonic() - begun
            wrong = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
            if at.in_a_row > MAX_IN_A_ROW:
                raise InputError(f"{state}: the training diverged at {at.seen} samples; a lower rate may help")
            if wrong and not at.in_a_row:
                raise InputError(f"{state}: at {at.seen} samples {', '.join(wrong)}, though the update was taken")
            if wrong:
                say(f"{name}: ALARM at {at.seen} samples: {', '.join(wrong)}; the update was left out")
            elif at.seen >= end or at.steps % CURVE_EVERY == 1:
                at.curves.append([at.seen, *values.values()])
            clock = time.monotonic()
            if clock - said > SAY_EVERY_S or at.seen >= end:
                pace = (clock - said) / max(1, at.seen - said_seen)
                shown = " ".join(f"{key} {value:.2f}" for key, value in values.items())
                left = f"about {(end - at.seen) * pace / 60:.1f} min left"
                say(f"{name} | {at.seen}/{end} samples | {1 / max(pace, 1e-9):.1f}/s | {shown} | {left}")
                said, said_seen = clock, at.seen
            if asked or clock - saved > SAVE_EVERY_S or at.seen >= end:
                saved = clock
                checkpoint.save_state(state, checkpoint.pack(**objects), asdict(at) | dict(fingerprint=fingerprint))
            if asked and at.seen < end:
                raise InputError(f"{state}: stopped on request at {at.seen} of {end} samples; run it again to go on")
    say(f"{name}: {at.account(state)}")
    return at
