"""The progressive schedule as a pure function of the samples seen (Angermann et al. 2023, Appendix B)."""

import math
from itertools import accumulate
from typing import NamedTuple

from bonelib.training.config import Schedule


class Moment(NamedTuple):
    """What holds at one point of the training."""

    stage: int  # 1-based
    fade: float  # weight of the newest stage in (0, 1]
    batch: int
    rate: float  # factor on both learning rates
    into: int  # critic samples since the stage began
    decaying: bool  # whether the rate falls towards the end


def total(plan: Schedule) -> int:
    """Critic samples of the whole training."""
    return sum(plan.samples)


def at(plan: Schedule, seen: int) -> Moment:
    """The moment after `seen` critic samples; beyond the end it is the last stage's."""
    ends = list(accumulate(plan.samples))
    stage = next((i for i, end in enumerate(ends) if seen < end), len(ends) - 1)
    into = seen - (ends[stage] - plan.samples[stage])
    # Half a batch ahead, so that a new stage never begins with the weight zero, where its layers get no gradient.
    fade = min(1.0, (into + plan.batch[stage] / 2) / plan.fade[stage]) if plan.fade[stage] else 1.0
    rate = plan.rate_decay**stage
    decay_from = ends[-1] - plan.final_decay * plan.samples[-1]
    if decaying := plan.final_decay > 0 and seen > decay_from:
        rate *= max(0.02, (ends[-1] - seen) / (ends[-1] - decay_from))
    return Moment(stage + 1, fade, plan.batch[stage], rate, into, decaying)


def snapshots(plan: Schedule, number: int, part: float, seen: int) -> int:
    """How many of `number` snapshots are due after `seen` samples: evenly over the last `part` of the last stage."""
    share = 1 - (total(plan) - seen) / (part * plan.samples[-1])  # of the way from the first to the last
    return max(0, min(number, 1 + math.floor(share * (number - 1) + 1e-9))) if share >= 0 else 0


def seconds_left(plan: Schedule, seen: int, seconds_per_sample: float) -> float:
    """A guess of the time to the end, when a sample now costs `seconds_per_sample` and one of the next stage five times
    as much: less than its eight times as many voxels, since earlier layers and the fixed cost of a step do not grow."""
    stage = at(plan, seen).stage
    ends = list(accumulate(plan.samples))
    return sum(
        max(0, end - max(seen, end - samples)) * seconds_per_sample * 5.0 ** (i + 1 - stage)
        for i, (samples, end) in enumerate(zip(plan.samples, ends, strict=True))
    )
