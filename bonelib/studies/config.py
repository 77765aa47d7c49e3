"""The sections of params.yaml on studies."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from bonelib.core.config import Count, Hash, NotNegative, Positive, Section, Shape, Share, Voxel
from bonelib.latent.config import EncoderTraining, Refinement
from bonelib.networks.config import GENERATORS, CriticNet, Generator
from bonelib.training.config import Grading, Train, training_section


class Quality(Section):
    """How image quality is measured: `samples` of each model and setting, of which the first `measured` by morphometry,
    and `swept` at each level of truncation that is only shown.

    A setting is a model at a truncation of its codes, which its own section gives (`networks.config`). `draws` are
    those of the intervals, `pairs` those compared by MS-SSIM; the classifier of patches learns for `classifier`
    updates (null: there is none), from `classified` patients at most; `inception` and `medicalnet` are files of
    weights, looked for in the usual cache if null.
    """

    samples: Annotated[int, Field(ge=8)] = 1000
    measured: Annotated[int, Field(ge=2)] = 200
    swept: Count = 8
    draws: Annotated[int, Field(ge=2)] = 1000
    pairs: Count = 1000
    classifier: Count | None = 2000
    classified: Count = 200
    inception: str | None = None
    medicalnet: str | None = None


class Experts(Section):
    """The rating form: `samples` of a model, `controls` real ones, of a patient each, and `repeats` of all these.

    `reference` real stacks are what the realism score compares with, bones of `degraded` patients calibrate it; `draws`
    are those of the intervals.
    """

    samples: Count = 64
    controls: Annotated[int, Field(ge=0)] = 16
    repeats: Annotated[int, Field(ge=0)] = 16
    reference: Annotated[int, Field(ge=5)] = 400
    degraded: Annotated[int, Field(ge=4)] = 32
    draws: Count = 400


class Ladder(Section):
    """The corruption ladder: `volumes` of `pool` held-out stacks are spoiled and compared with `reference` stacks.

    `draws` sets of real stacks say how much a metric varies by itself.
    """

    volumes: Annotated[int, Field(ge=8)] = 200
    reference: Annotated[int, Field(ge=8)] = 400
    pool: Annotated[int, Field(ge=8)] = 400
    draws: Annotated[int, Field(ge=2)] = 100
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.2, 0.4, 0.6, 0.8, 1.0)


class Privacy(Section):
    """The privacy audit: `stacks` of each of `members` training patients and of all held-out ones, `samples` drawn.

    The leak is planted with `planted` patients: copies with noise of `copy_noise` of the intensities, and a critic that
    is trained `overtraining` updates too long. Voxels are compared after `halvings`, codes fitted in `steps` of Adam at
    `rate`. `tolerated` is the share of members that may be recognised at 1 % false alarms.
    """

    samples: Annotated[int, Field(ge=4)] = 1000
    members: Annotated[int, Field(ge=4)] = 80
    planted: Annotated[int, Field(ge=2)] = 20
    stacks: Count = 8
    copy_noise: NotNegative = 0.005
    overtraining: Count = 600
    halvings: Annotated[int, Field(ge=0)] = 2
    steps: Count = 300
    rate: Positive = 0.05
    tolerated: Annotated[float, Field(gt=0, lt=1)] = 0.05
    draws: Annotated[int, Field(ge=2)] = 1000


class Augmentation(Section):
    """Graders trained with and without generated bones, which are `share` of a training set; `seeds` of each.

    `draws` are those of the intervals.
    """

    grading: Grading
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seeds: Count = 5
    draws: Annotated[int, Field(ge=2)] = 1000


class InverseProblems(Section):
    """Bones from degraded observations: `held_out` stacks and `known` training stacks, of those that have codes.

    On the generator's grid voxels are `factors` times as long, noise has an SD of `noise`, and the arm moves as for
    `grade`, where it is not known of `trajectories` that are tried; all but the noisy observations have noise of SD
    `least_noise` (both in mg HA/cm3). Codes take `steps` of Adam, at the rate of their refinement, deviations
    `filter_steps` of conjugate gradients. At full size there are `full` stacks, `full_known` training stacks, and
    `measured` by morphometry. `draws` are those of the intervals.
    """

    held_out: Annotated[int, Field(ge=2)] = 24
    known: Annotated[int, Field(ge=2)] = 30
    factors: tuple[Annotated[int, Field(ge=2)], ...] = (2, 4)
    noise: Positive = 150.0
    least_noise: Positive = 10.0
    grade: Annotated[int, Field(ge=2, le=5)] = 4
    trajectories: Count = 100
    steps: Count = 60
    filter_steps: Count = 20
    full: Annotated[int, Field(ge=2)] = 8
    full_known: Annotated[int, Field(ge=2)] = 8
    measured: Annotated[int, Field(ge=0)] = 4
    draws: Annotated[int, Field(ge=2)] = 1000


class VisitsAndAtlases(Section):
    """Visits to come, mean bones, and a test set to a histogram (`studies.visits`, `studies.atlases`, `.target_set`).

    `patients` phantoms have `visits`, one a year; their trabecular density changes by `change` of the first a year, SD
    over patients `spread`; the last visit is predicted from the first `known`. Codes are refined in `steps`, as in
    05_inversion but for that. `pair` are two scans of one patient of the cohort; null: the first who has two. Atlases
    are of `bones`, a stack each. A surrogate of morphometry is fitted to `scans` training scans and reads bones where
    `ring` of their rays meet cortex; `samples` of the model are its range. Atlases of a number are drawn at `points`
    quantiles; the intrinsic mean is of `intrinsic` bones, by paths of `path` codes in `iterations`. A set of `set`
    bones has the histogram of `density`, edges in mg HA/cm3, with `shares`; `verified` are measured by morphometry.
    `draws` are those of the intervals.
    """

    patients: Annotated[int, Field(ge=3)] = 40
    visits: Annotated[int, Field(ge=4)] = 6
    known: Annotated[int, Field(ge=2)] = 4
    change: float = -0.05
    spread: NotNegative = 0.02
    steps: Count = 100
    pair: tuple[str, str] | None = None
    bones: Annotated[int, Field(ge=5)] = 80
    scans: Count = 60
    ring: Share = 0.5
    samples: Annotated[int, Field(ge=20)] = 600
    points: Annotated[int, Field(ge=2)] = 5
    intrinsic: Annotated[int, Field(ge=2)] = 8
    path: Annotated[int, Field(ge=3)] = 6
    iterations: Count = 30
    set: Annotated[int, Field(ge=4)] = 60
    density: Annotated[tuple[Positive, ...], Field(min_length=2)] = (100.0, 130.0, 160.0, 190.0, 220.0)
    shares: tuple[Positive, ...] = (1.0, 1.0, 1.0, 1.0)
    verified: Annotated[int, Field(ge=0)] = 24
    draws: Annotated[int, Field(ge=2)] = 1000

    @model_validator(mode="after")
    def _fits(self):
        if self.known >= self.visits:
            raise ValueError(f"known {self.known} leaves no visit of {self.visits} to be predicted")
        if (self.visits - 1) * (abs(self.change) + 4 * self.spread) > 0.9:
            says = f"{self.change} with an SD of {self.spread} over {self.visits - 1} years may leave no bone"
            raise ValueError(f"change {says}; accepted is less than 0.9 in all, with 4 SDs")
        rising = all(a < b for a, b in zip(self.density, self.density[1:], strict=False))
        if not rising or len(self.shares) != len(self.density) - 1:
            raise ValueError("density must rise, and shares have one entry between every two of it")
        return self


class Cost(Section):
    """What is timed: both precisions in turns at `stage`, `rounds` times, and each of `stages` once."""

    generators: dict[str, Generator] = {kind: config() for kind, config in GENERATORS.items()}
    critic: CriticNet = CriticNet()
    stage: Count = 3
    stages: tuple[Count, ...] = (1, 2, 3, 4)
    batch: Count = 1
    n_critic: Count = 5
    rounds: Count = 3


class Trials(Section):
    """Short trainings of variants of one model (see `studies.ablation`).

    `base` is a section on a training, `variants` are changes of it, nested alike; each is trained with `seeds` seeds,
    for `seconds` of CPU time, and judged by `samples`; `draws` are those of the intervals.
    """

    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: Count = 2
    seconds: Positive
    samples: Annotated[int, Field(ge=8)] = 320
    draws: Annotated[int, Field(ge=2)] = 200

    @model_validator(mode="after")
    def _trains(self):
        for name, changes in self.variants.items():
            training_section(changed(self.base, changes), name)
        return self


class TwoContrasts(Section):
    """Slices of phantoms in two contrasts (`studies.two_contrasts`).

    `patients` phantoms, every fourth held out and the share `women` of them women, have paired slices of `shape`
    (z, y, x) each. `train` is the generator of
    slices, `encoder` its encoder; with `published`, a hash (see `bonelib.published`), both come with the repository,
    and `trials`, short trainings of other losses, with them. Codes are of `known` training patients at `positions`
    heights, and of `unknown` held-out ones, refined as `refine` says. `samples` are drawn for distances, with and
    without `truncation`, which is also that of formula (3); networks are the best of `tries`, trained for `epochs`;
    curvature is taken at `points`, over `tangents`. `walks` have `walk_points` each. `pair` are two registered scans of
    one's own, the first in mg HA/cm3. `draws` are those of the intervals.
    """

    published: Hash | None = None
    patients: Annotated[int, Field(ge=8)] = 100
    women: Annotated[float, Field(gt=0, lt=1)] = 0.15
    shape: Shape = (23, 80, 64)
    train: Train
    trials: Trials | None = None
    encoder: EncoderTraining
    refine: Refinement = Refinement(loss="norms", optimiser="radam", rate=1e-3, betas=(0.9, 0.999), steps=350)
    known: Annotated[int, Field(ge=4)] = 75
    unknown: Annotated[int, Field(ge=2)] = 25
    positions: Annotated[int, Field(ge=3)] = 9
    samples: Annotated[int, Field(ge=8)] = 1000
    truncation: Annotated[float, Field(gt=0, le=1)] = 0.7
    tries: Count = 20
    epochs: Count = 60
    points: Count = 1000
    tangents: Count = 512
    walks: Annotated[int, Field(ge=2)] = 1000
    walk_points: Annotated[int, Field(ge=2)] = 8
    pair: tuple[str, str] | None = None
    draws: Annotated[int, Field(ge=2)] = 1000

    @model_validator(mode="after")
    def _voxels_are_cubes(self):
        z, y, x = self.shape
        if abs(y / z - 80 / 23) > 0.2 or abs(x / y - 0.8) > 0.01:
            raise ValueError(f"shape {self.shape} must be about 23 : 80 : 64, the field of the wrist in cubic voxels")
        return self


def changed(base: dict, changes: dict) -> dict:
    """A nested dictionary with some values replaced; `changes` is nested alike, and an empty one replaces all."""
    both = dict(base)
    for key, value in changes.items():
        inner = value and isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = changed(both[key], value) if inner else value
    return both


class PhantomCheck(Section):
    """How many phantoms are drawn and measured on each grid, from many coarse ones to few on the scanner's own."""

    phantoms: Annotated[tuple[Annotated[int, Field(ge=4)], ...], Field(min_length=2)]
    voxel_mm: tuple[Voxel, ...]

    @model_validator(mode="after")
    def _lengths(self):
        if len(self.phantoms) != len(self.voxel_mm):
            raise ValueError("phantoms and voxel_mm must have one entry a grid each")
        return self
