"""The one resumable loop: what is common to every training, whatever a step of it is."""

import contextlib
import csv
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
AGAIN = "run it again to go on"
HALVINGS = 2  # of the rate, before a training that diverges is given up


@dataclass
class Progress:
    """How far a training is: with the tensors, all that the rest of it depends on. `own` holds JSON of the trainer."""

    end: int  # samples
    seen: int = 0
    steps: int = 0
    updates: int = 0  # of all networks
    left_out: int = 0  # updates without a finite gradient
    late: int = 0  # of these, in the last fifth
    in_a_row: int = 0
    seconds: float = 0.0  # that all of it took, interruptions left out
    halved: int = 0  # how often the rate was halved after a divergence
    curves: list[list[float]] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def point_due(self) -> bool:
        """Whether the step that is under way, and has counted its samples, is a point of the curves."""
        return (self.steps + 1) % CURVE_EVERY == 0 or self.seen >= self.end

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


class _Training(NamedTuple):
    """What stays the same over one training: where its states lie, what they hold, and what it says."""

    objects: dict[str, Any]
    state: Path | None
    fingerprint: str
    name: str
    say: Callable[[str], None]
    ranks: Ranks
    brief: bool = False

    def worth_a_line(self, at: Progress) -> bool:
        return not self.brief or at.seconds > SAY_EVERY_S

    def save(self, at: Progress, *, mark: bool = False) -> None:
        if self.state and self.ranks.rank == 0:
            meta = asdict(at) | dict(fingerprint=self.fingerprint, mark=mark)
            checkpoint.save_state(self.state, checkpoint.pack(**self.objects), meta)

    def load(self, *, marked: bool = False) -> Progress | None:
        """Fill the objects from the newest state, or the last mark; None where rank 0 has none."""
        here = self.state and self.ranks.rank == 0
        found = checkpoint.load_state(self.state, self.fingerprint, marked=marked) if here else None
        if not (found := distributed.broadcast(found, self.ranks)):
            return None
        checkpoint.unpack(found[0], **self.objects)
        return Progress(**{key.name: found[1][key.name] for key in fields(Progress)})

    def begin(self, first: Progress, marks: int) -> Progress:
        if at := self.load():
            self.say(f"{self.name}: continues at {at.seen} of {at.end} samples")
            return at
        if self.state and any(self.state.glob("state-*.json")):
            self.say(f"{self.state}: no state in it fits these parameters, data and code; {self.name} starts anew")
        if marks:
            self.save(first, mark=True)
        return first

    def rollback(self, lost: Progress) -> Progress:
        """Go back to the last mark, with half the rate; `InputError` where there is none, or it was halved enough."""
        at = self.load(marked=True) if lost.halved < HALVINGS else None
        if not at:
            tried = f", even with 1/{2**lost.halved} of the rate" if lost.halved else ""
            raise InputError(
                f"{self.state}: the training diverged at {lost.seen} samples{tried}; a lower rate may help"
            )
        at.halved = lost.halved + 1
        self.save(at, mark=True)
        self.say(f"diverged at {lost.seen} samples; goes back to {at.seen}, with 1/{2**at.halved} of the rate")
        return at

    def keep_point(self, at: Progress, values: dict[str, float], all_taken: bool) -> None:
        """Add a point to the curves when it is due. Raises `InputError` for values that no update left out explains."""
        wrong = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
        if wrong and all_taken:
            raise InputError(f"{self.state}: at {at.seen} samples {', '.join(wrong)}, though the update was taken")
        if wrong:
            self.say(f"{self.name}: ALARM at {at.seen} samples: {', '.join(wrong)}; the update was left out")
        elif at.point_due:
            at.curves.append([at.seen, *values.values()])


def run(
    step: Callable[[Progress], dict[str, float]],
    objects: dict[str, Any],
    *,
    end: int,
    begin: int = 0,
    state: Path | None,
    fingerprint: str,
    name: str,
    say=print,
    ranks: Ranks | None = None,
    marks: int = 0,
    seconds: float | None = None,
    shown: Sequence[str] = (),
    time_left: Callable[[int, float], float] | None = None,
    brief: bool = False,
) -> Progress:
    """Call `step(progress)` from `begin` to `end` samples seen, or from the newest state in `state` on, bit for bit.

    Without `state` nothing is kept. A step trains `objects` (networks, optimisers, and whatever else has a state_dict
    of tensors), advances `progress.seen`, counts its updates, and returns the values of its curves; its random numbers
    are keyed by `progress`. Of several `ranks` rank 0 alone reads and writes states and says anything.

    A training that diverges goes back to the last of `marks` states, saved evenly over it, with half the rate; without
    marks it ends. After `seconds` of training in this call it is saved and left as it is. A progress line shows the
    values `shown` (default all), and the minutes left by `time_left(seen, seconds a sample)`; a `brief` training says
    nothing of its end.

    Raises `InputError` when it is asked to stop, after saving; when it diverges for good; when a value is not finite
    though all updates were taken; and where too many updates were left out.
    """
    ranks = ranks or distributed.single_process()
    say = partial(say, flush=True) if ranks.rank == 0 else lambda *_: None
    training = _Training(objects, state, fingerprint, name, say, ranks, brief)
    lock = checkpoint.locked(state) if state and ranks.rank == 0 else contextlib.nullcontext()
    with lock, checkpoint.stop_requested() as asked:
        at = _advance(
            training, step, training.begin(Progress(end, begin), marks), asked, marks, seconds, shown, time_left
        )
    account = at.account(state)
    if at.left_out or training.worth_a_line(at):
        say(f"{name}: {account}")
    return at


def _advance(training: _Training, step, at: Progress, asked, marks, seconds, shown, time_left) -> Progress:
    """The loop of `run`, from `at` on."""
    ranks, say, end = training.ranks, training.say, at.end
    weights = _weights(training.objects)
    distributed.assert_replicas_equal(weights, ranks, at.steps)
    saved = said = time.monotonic()
    said_seen, spent = at.seen, 0.0
    while at.seen < end:
        begun, left_out, clock = at.seen, at.left_out, time.monotonic()
        values = step(at)
        if at.in_a_row > MAX_IN_A_ROW:
            at = training.rollback(at)
            said, said_seen = time.monotonic(), at.seen
            continue
        training.keep_point(at, values, at.left_out == left_out)
        at.steps += 1
        distributed.assert_replicas_equal(weights, ranks, at.steps)
        now = time.monotonic()
        at.seconds, spent = at.seconds + now - clock, spent + now - clock
        if now - said > SAY_EVERY_S or (at.seen >= end and training.worth_a_line(at)):
            say(_progress_line(training.name, at, values, (now - said) / max(1, at.seen - said_seen), shown, time_left))
            said, said_seen = now, at.seen
        # A request, or a clock, that stops one rank stops all of them
        stop, over = distributed.all_reduce_mean((bool(asked), spent >= seconds if seconds else False), ranks)
        mark = at.seen * marks // end > begun * marks // end and not at.in_a_row
        if stop or over or mark or now - saved > SAVE_EVERY_S or at.seen >= end:
            saved = now
            training.save(at, mark=mark)
        if (stop or over) and at.seen < end:
            distributed.barrier(ranks)  # when the state is saved
            if stop:
                raise InputError(f"{training.state}: stopped on request at {at.seen} of {end} samples; {AGAIN}")
            say(f"{training.name}: stopped after {spent:.0f} s at {at.seen} of {end} samples; {AGAIN}")
            break
    return at


def _weights(objects: dict[str, Any]) -> list[Tensor]:
    networks = [thing for thing in objects.values() if isinstance(thing, torch.nn.Module)]
    return [weight for network in networks for weight in network.parameters() if weight.requires_grad]


def _progress_line(name: str, at: Progress, values: dict[str, float], pace: float, shown, time_left) -> str:
    text = " ".join(f"{key} {values[key]:.2f}" for key in shown or values)
    left = time_left(at.seen, pace) if time_left else (at.end - at.seen) * pace
    speed = f"{1 / max(pace, 1e-9):.1f}/s"
    return f"{name} | {at.seen}/{at.end} samples | {speed} | {text} | about {left / 60:.1f} min left"


def write_curves(path: Path, columns: Sequence[str], at: Progress) -> None:
    """The curves of a training as a table."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *at.curves])
