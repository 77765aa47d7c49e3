"""The sections of params.yaml, typed and frozen; an unknown key is refused with the nearest known one."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from bonelib import InputError
from bonelib.core.config import Count, NotNegative, Positive, Section, Shape, Share, Voxel, section

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")]  # of a folder in dvc-store/


class Calibration(Section):
    """Of one scanner: native = mu_scaling * mu, mgHA = slope * mu + intercept, with mu and mu_water in 1/cm."""

    mu_scaling: Positive | None = None
    mu_water: Positive | None = None
    slope: Positive | None = None
    intercept: float | None = None


class Cohort(Section):
    """Where scans come from: the phantom generator, or a folder of one's own scans.

    `unit` and `calibration` hold for files that carry none; `mirror_left` makes right bones of left ones; a scan whose
    header says that it is of another bone than `site` is refused.
    """

    source: str
    calibration: Calibration | None = None
    unit: Literal["mgHA", "HU", "mu", "native"] | None = None
    participants: str | None = None
    mirror_left: bool = False
    site: Literal["radius", "tibia"] = "radius"

    @field_validator("unit")
    @classmethod
    def _can_be_converted(cls, unit, info):
        if unit not in (None, "mgHA") and not info.data.get("calibration"):
            raise ValueError("from this unit to mg HA/cm3 needs cohort.calibration")
        return unit


class Phantom(Section):
    """The phantom cohort: `visits` at most, `scans` in all (null: none is missed), shares of the motion grades 1-5.

    Patients are numbered from `first`; those of other numbers are other people.
    """

    patients: Annotated[int, Field(ge=3)]
    first: Count = 1
    visits: Count
    scans: Count | None = None
    grades: tuple[Share, Share, Share, Share, Share] = (1.0, 0.0, 0.0, 0.0, 0.0)

    @model_validator(mode="after")
    def _counts(self):
        if abs(sum(self.grades) - 1) > 1e-6:
            raise ValueError(f"grades {self.grades} must add up to 1")
        if self.scans is not None and not self.patients <= self.scans <= self.patients * self.visits:
            raise ValueError(f"scans {self.scans} do not fit {self.patients} patients of up to {self.visits} visits")
        return self


class Preprocess(Section):
    """From scans to slice stacks (section 3.1). Shapes are (z, y, x) in voxels of the cohort's grid."""

    shape: Shape
    subsample: Count = 1
    dct_clip: Positive = 1000.0
    stack_slices: Count = 32
    stacks_per_scan: Count = 4
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    intensity: tuple[float, float] = (-500.0, 1500.0)

    @model_validator(mode="after")
    def _fits(self):
        z, y, x = (n // self.subsample for n in self.shape)
        if any(n % self.subsample for n in self.shape):
            raise ValueError(f"shape {self.shape} must be divisible by subsample {self.subsample}")
        if y % 9 or x % 7 or y // 9 != x // 7 or (y // 9) & (y // 9 - 1) or self.stack_slices != y // 9:
            raise ValueError(
                f"after subsampling, a stack is {(self.stack_slices, y, x)}, but must be (1, 9, 7) times a power of two"
            )
        if self.stack_slices > z:
            raise ValueError(f"stack_slices {self.stack_slices} is more than the {z} slices of a subsampled scan")
        if self.intensity[0] >= self.intensity[1]:
            raise ValueError(f"intensity {self.intensity} must rise")
        return self


class Generator(Section):
    """`widths`: channels of the coarsest grid (behind the dense layer, or of the constant) and behind each stage.

    `noise` starts the scales of the noise inputs: a ProGAN has none where it is 0, and none in the paper; a StyleGAN
    always has them, and learns them from there. `base_convs` are convolutions before the first stage, none in the
    paper. `style` (the width of W, 512), `mapping_rate` (what multiplies the mapping network's learning rate, 0.02) and
    `affine_rate` (the same for the affine maps of the styles, 1) belong to a StyleGAN alone; left out, they are as
    published.
    """

    kind: Literal["progan", "stylegan"]
    widths: tuple[Count, ...]
    latent: Count = 512
    noise: Annotated[float, Field(ge=0)] = 0.0
    padding: Literal["zeros", "replicate"] = "zeros"
    base_convs: Annotated[int, Field(ge=0)] = 0
    style: Count | None = None
    mapping_rate: Positive | None = None
    affine_rate: Positive | None = None

    @field_validator("style", "mapping_rate", "affine_rate")
    @classmethod
    def _of_this_kind(cls, value, info):
        kind = info.data.get("kind", "stylegan")  # a wrong kind is an error of its own
        if value is not None and kind != "stylegan":
            raise ValueError(f"only kind stylegan has this key, and this kind is {kind}; take it out")
        return value


class CriticNet(Section):
    """`convs` 2, `whole`, `head` and `standardise` are not in the paper (see `networks.critic.Critic`)."""

    widths: tuple[Count, ...]
    convs: Annotated[int, Field(ge=1, le=3)] = 1
    whole: bool = False
    head: tuple[Count, ...] = ()
    standardise: bool = False


class Schedule(Section):
    """Appendix B. Lists have one entry a stage, in samples the critic has seen."""

    samples: tuple[Count, ...]
    fade: tuple[Annotated[int, Field(ge=0)], ...]
    batch: tuple[Count, ...]
    rate_decay: Share = 0.85
    final_decay: Share = 0.0

    @model_validator(mode="after")
    def _lengths(self):
        if not len(self.samples) == len(self.fade) == len(self.batch):
            raise ValueError("samples, fade and batch must have one entry a stage each")
        return self


class Augment(Section):
    """In-plane rotation in degrees and zoom, both uniform (section 3.1)."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    zoom: Annotated[float, Field(ge=1)] = 1.15


class Adaptive(Section):
    """Adaptive augmentation (see `training.adaptive`).

    The probability of every change is steered so that the critic's mean sign, of real over generated volumes in pairs,
    stays near `target`; it may rise from 0 to 1 in `ramp` samples.
    """

    target: Annotated[float, Field(gt=0, lt=1)] = 0.6
    ramp: Count


class Snapshots(Section):
    """From which weights a training's best are chosen, by measurement (see `studies.selection`).

    The generator, or its running average, is kept `number` times, evenly over the last `part` of the last stage and at
    its end. `samples` of each are compared with the bones of a share of the training patients, `validation`, who are
    set apart.
    """

    number: Annotated[int, Field(ge=2)]
    part: Annotated[float, Field(gt=0, le=1)] = 0.5
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    samples: Annotated[int, Field(ge=4)] = 200
    draws: Annotated[int, Field(ge=2)] = 200


class Train(Section):
    """One model and how it is trained.

    Not in the paper: `loss` relativistic, which pairs real and generated volumes and holds the critic's slope at both
    towards zero with the weight `penalty` (its gamma); `ema`, the half-life of the generator's running average in
    updates (0 is none); `haar`, which lets both networks work on the Haar bands of volumes, on grids half as fine;
    `autocorrelation`, the weight of `losses.autocorrelation_difference` in the generator's loss while the rate falls
    towards the end, and `histogram`, that of `losses.histogram_distance` all along; `adaptive` augmentation; and
    `snapshots` to choose from.
    """

    generator: Generator
    critic: CriticNet
    schedule: Schedule
    augment: Augment | None = Augment()
    n_critic: Count
    rate: Positive
    loss: Literal["wasserstein", "relativistic"] = "wasserstein"
    penalty: Annotated[float, Field(ge=0)] = 10.0
    drift: Annotated[float, Field(ge=0)] = 1e-3
    autocorrelation: NotNegative = 0.0
    histogram: NotNegative = 0.0
    clip: Positive = 2.0
    ema: Annotated[float, Field(ge=0)] = 0.0
    haar: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    adaptive: Adaptive | None = None
    snapshots: Snapshots | None = None

    @model_validator(mode="after")
    def _stages(self):
        n, plan = len(self.schedule.samples), self.schedule
        needed = n if self.haar else n + 1
        if not len(self.generator.widths) == len(self.critic.widths) == needed:
            raise ValueError(f"{n} stages{' of haar' * self.haar} need {needed} widths in generator and critic")
        if self.adaptive and self.loss != "relativistic":
            raise ValueError(f"adaptive is steered by pairs of scores, which loss relativistic has and {self.loss} not")
        if self.snapshots and plan.fade[-1] > (1 - self.snapshots.part) * plan.samples[-1]:
            raise ValueError(f"snapshots.part {self.snapshots.part} reaches into the fade-in of the last stage")
        return self


class Published(Section):
    """A model of the store in the repository, by its hash (see `bonelib.published`), in place of a `Train` section."""

    published: Hash


class SuperRes(Section):
    """The network that draws a generator's volumes four times as fine; not in the paper, where there is none.

    `samples` windows of `window` (z, y, x) voxels of the given grid are seen (0: no network). `width`, `depth`,
    `fine_width` and `fine_depth` describe the network, `critic` the critic's channels from its coarsest grid on;
    `penalty` holds the critic's slope at zero; `lattice`, where it is not 0, keeps air free of the grid, and
    `obedience` the texture at what is asked for. `added` times the SD of what is missing in the given volume is the
    unit of the output; `corruption` is the largest SD of the noise on the volumes given in training.
    """

    samples: Annotated[int, Field(ge=0)] = 0
    window: Shape = (4, 12, 12)
    width: Count = 96
    depth: Count = 4
    fine_width: Count = 32
    fine_depth: Count = 2
    critic: tuple[Count, ...] = (96, 64, 48)
    batch: Count = 4
    rate: Positive = 4e-3
    critic_rate: Positive = 5e-3
    penalty: NotNegative = 3e-4
    lattice: NotNegative = 0.0
    obedience: NotNegative = 0.0
    added: Positive = 1.0
    corruption: NotNegative = 0.02
    clip: Positive = 2.0
    ema: NotNegative = 100.0
    final_decay: Share = 0.4
    precision: Literal["float32", "bfloat16"] = "float32"

    @field_validator("window")
    @classmethod
    def _can_be_halved(cls, window):
        if any(n % 2 for n in window):
            raise ValueError(f"window {window} must be even")
        return window


class Grading(Section):
    """The network that grades motion (section 3.3), by default a ResNet-18 in 3D, and how it is trained.

    Scans are averaged over blocks of 2^`halvings` voxels a side first; motion shows on a coarse grid as well.
    `samples` windows of `depth` slices are seen by each of the `folds` networks and by the last one, trained on all
    scans. `mirror` reflects windows at random along all axes, `decay` is the weight decay, `draws` are those of the
    intervals. With `published`, a hash (see `bonelib.published`), nothing is trained: the grader of the repository
    grades all scans.
    """

    published: Hash | None = None
    widths: tuple[Count, ...] = (64, 128, 256, 512)
    blocks: tuple[Count, ...] = (2, 2, 2, 2)
    halvings: Annotated[int, Field(ge=0)] = 0
    folds: Annotated[int, Field(ge=2)] = 5
    depth: Count = 32
    samples: Count = 30_000
    batch: Count = 8
    rate: Positive = 1e-3
    decay: Annotated[float, Field(ge=0)] = 0.05
    mirror: bool = True
    augment: Augment | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    draws: Count = 1000

    @model_validator(mode="after")
    def _stages(self):
        if len(self.widths) != len(self.blocks):
            raise ValueError("widths and blocks must have one entry a stage each")
        return self


TRUNCATION = {"progan": 1.8, "stylegan": 0.8}  # Table 1: bound of the normal distribution; share of the way to w


class Quality(Section):
    """How image quality is measured: `samples` of each model and setting, of which the first `measured` by morphometry.

    A setting is a model at a truncation of its codes: of Table 1 the two in `untruncated` and `truncation`, of Figures
    C.9 and C.10 those of `sweep`: bounds of the normal distribution for a ProGAN, shares of the way from the mean style
    for a StyleGAN. A model without entry takes that of its kind. `draws` are those of the intervals, `pairs` those
    compared by MS-SSIM; the classifier of patches learns for `classifier` updates, from `classified` patients at most;
    `inception` and `medicalnet` are files of weights, looked for in the usual cache if null.
    """

    samples: Annotated[int, Field(ge=8)] = 1000
    measured: Annotated[int, Field(ge=2)] = 200
    untruncated: dict[str, Positive] = {"progan": 5.0, "stylegan": 1.0}
    truncation: dict[str, Positive] = TRUNCATION
    sweep: dict[str, tuple[Positive, ...]] = {"progan": (2.6, 1.8, 1.0, 0.2), "stylegan": (1.0, 0.7, 0.4, 0.1)}
    draws: Annotated[int, Field(ge=2)] = 1000
    pairs: Count = 1000
    classifier: Count = 2000
    classified: Count = 200
    inception: str | None = None
    medicalnet: str | None = None


class Transition(Section):
    """Morphs between bones of low density (section 4.2).

    `weights` of the second bone are those of Figure 5, at which `pairs` of each density are measured, both of them
    among the lowest share `low` of the bones. A path stays within its ends to `tolerance` times the SD of that
    density over the bones, and its densities are trusted where `closed` of the slices have a closed cortex.
    `frames` has the film, `points` a path whose smoothness is measured. `geodesics` of so many pairs have
    `geodesic_points` each and are found in `steps` iterations at most. A surrogate of morphometry, fitted to
    `scans` training scans, reads bones on the generator's own grid where `ring` of their outline has cortex, and
    holds densities on a path; their ranges are those of `samples` of the model, `truncation` as in `quality`.
    `draws` are those of the intervals.
    """

    weights: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    low: Share = 0.25
    pairs: Count = 200
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    closed: Share = 0.5
    scans: Count = 60
    ring: Share = 0.8
    samples: Annotated[int, Field(ge=20)] = 2000
    truncation: dict[str, Positive] = TRUNCATION
    frames: Annotated[int, Field(ge=3)] = 48
    points: Annotated[int, Field(ge=3)] = 65
    geodesics: Count = 16
    geodesic_points: Annotated[int, Field(ge=3)] = 17
    steps: Count = 100
    draws: Count = 1000

    @field_validator("weights")
    @classmethod
    def _from_end_to_end(cls, weights):
        if len(weights) < 3 or (weights[0], weights[-1]) != (0, 1) or sorted(weights) != list(weights):
            raise ValueError("weights must rise from 0 to 1 and have one between them at least")
        return weights


class Mixing(Section):
    """Styles of two bones in one (section 4.3), for models whose codes have several styles.

    `crossings` are the published ones, the first styles of `of` that are the source's, and are scaled to the number of
    styles there are. `pairs` run from bones among the lowest share `extreme` of a density to those among the highest.
    `swaps` bones get one style at a time of another bone. `twins` phantoms are drawn twice, the second time with
    `mineral` times the density of both compartments. `draws` are those of the intervals.
    """

    crossings: tuple[Count, ...] = (3, 7, 12)
    of: Count = 15
    extreme: Share = 0.25
    pairs: Count = 100
    swaps: Count = 100
    twins: Annotated[int, Field(ge=2)] = 50
    mineral: Positive = 0.8
    draws: Count = 1000


class Editing(Section):
    """Attributes of bones edited in latent space (section 4.4), and bones drawn to measure.

    A surrogate of morphometry is fitted to `scans` training scans; a bone is read where `closed` of its rays meet
    cortex. Ranges come from `samples` of the model, `truncation` as in `quality`. Effects are measured at `codes`
    bones over +-`step`, responses up to the largest of `alphas`; `alpha` is that of Figure 7. `targets` can be met,
    `impossible` ones not; `verified` of the former are measured by morphometry too, and counted apart where `shut`
    of the slices have a closed cortex. The classifiers of `tries` random networks each learn for `epochs`;
    curvature is taken at `points`, over `tangents` directions. `draws` are those of the intervals.
    """

    scans: Count = 400
    closed: Share = 0.8
    samples: Annotated[int, Field(ge=20)] = 2000
    truncation: dict[str, Positive] = TRUNCATION
    codes: Annotated[int, Field(ge=4)] = 100
    step: Positive = 1.0
    alpha: Positive = 4.0
    alphas: tuple[Positive, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
    targets: Count = 200
    impossible: Count = 20
    verified: Count = 100
    shut: Share = 0.5
    tries: Count = 40
    epochs: Count = 150
    points: Count = 1000
    tangents: Count = 512
    draws: Count = 1000


class EncoderTraining(Section):
    """How the encoder of a model is trained (section 3.5), with the published rates.

    `prior` "normal" is eq. (5), "discriminator" eq. (8); `weights` are those of distortion, perceptual and latent loss
    in eq. (6) or (9). `dense` adds fully connected layers, two for a StyleGAN. `pairs` "sampled" trains on drawn
    volumes, whose codes are known, as Fetty et al. 2020 with `norm` "instance", four dense layers, radam, betas (0,
    0.99) and truncation 0.7. Not in the paper: `final_decay`, the share of the training over which the rate falls,
    `ema`, the half-life of a running average of the weights in updates (0 is none), and `clip`. With `published`, a
    hash (see `bonelib.published`), nothing is trained: the encoder of the repository is taken, with its refinement.
    """

    published: Hash | None = None
    prior: Literal["normal", "discriminator"]
    weights: tuple[NotNegative, NotNegative, NotNegative] = (1.0, 1.0, 1.0)
    dense: Annotated[int, Field(ge=0)] = 0
    norm: Literal["none", "instance"] = "none"
    pairs: Literal["real", "sampled"] = "real"
    truncation: Positive | None = None
    samples: Count = 180_000
    batch: Count = 3
    optimiser: Literal["adam", "radam"] = "adam"
    rate: Positive = 3e-3
    betas: tuple[Share, Share] = (0.5, 0.9)
    clip: Positive = 2.0
    ema: NotNegative = 0.0
    final_decay: Share = 0.0


class Refinement(Section):
    """How codes are refined. `loss` "squares" is eq. (7) with weights (1, 1, 1) and eq. (10) with (0, 1, 0); "norms" is
    eq. (1) of Fetty et al. 2020, with radam, rate 1e-3, betas (0.9, 0.999) and 350 steps. `space` "w+" gives every
    layer a style of its own.
    """

    steps: Count = 100
    loss: Literal["squares", "norms"] = "squares"
    weights: tuple[NotNegative, NotNegative, NotNegative] = (1.0, 1.0, 1.0)
    optimiser: Literal["adam", "radam"] = "adam"
    rate: Positive = 7e-3
    betas: tuple[Share, Share] = (0.5, 0.9)
    space: Literal["w", "w+"] = "w"


class RefinementGrid(Section):
    """Weights and rates of a refinement, all combined, of which the best is taken: not in the paper.

    It is chosen on `stacks` stacks of a share `apart` of the training patients, whom the encoder does not learn from
    either; with the share of `Snapshots.validation` they are those whom the generator has not seen.
    """

    weights: tuple[tuple[NotNegative, NotNegative, NotNegative], ...]
    rates: tuple[Positive, ...]
    stacks: Count = 12
    apart: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Inversion(Section):
    """How real bones get codes (section 3.5): `held_out_stacks` of the held-out stacks, spread evenly over patients
    (null: all), and `train_stacks` of the training stacks.

    `refine` is how, but for what is `tried`. Reconstructions are compared on the held-out stacks, and `measured` of
    them, of as many patients, at full size.
    """

    encoder: EncoderTraining
    refine: Refinement = Refinement()
    tried: RefinementGrid | None = None
    held_out_stacks: Count | None = None
    train_stacks: Annotated[int, Field(ge=0)] = 1000
    measured: Annotated[int, Field(ge=0)] = 10
    draws: Count = 1000


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


TIMED = (128, 128, 128, 64, 32, 16)  # widths of Tables A.2 and A.3


class Cost(Section):
    """What is timed: both precisions in turns at `stage`, `rounds` times, and each of `stages` once."""

    generators: dict[str, Generator] = {kind: Generator(kind=kind, widths=TIMED) for kind in ("progan", "stylegan")}
    critic: CriticNet = CriticNet(widths=TIMED)
    stage: Count = 3
    stages: tuple[Count, ...] = (1, 2, 3, 4)
    batch: Count = 1
    n_critic: Count = 5
    rounds: Count = 3


class Trials(Section):
    """Short trainings of variants of one model (see `studies.ablation`).

    `base` is a `Train` section, `variants` are changes of it, nested alike; each is trained with `seeds` seeds, for
    `seconds` of CPU time, and judged by `samples`; `draws` are those of the intervals.
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
            section(Train, changed(self.base, changes), name)
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


def _which(values: Any) -> str:
    return (
        " published" if "published" in (values if isinstance(values, dict) else values.model_fields_set) else " train"
    )


TrainOrPublished = Annotated[
    Annotated[Train, Tag(" train")] | Annotated[Published, Tag(" published")], Discriminator(_which)
]


class Profile(Section):
    """All sections of a profile; `voxel_mm` is the voxel size that all scans must have."""

    voxel_mm: Voxel
    phantom: Phantom
    phantom_check: PhantomCheck
    preprocess: Preprocess
    grading: Grading
    superres: SuperRes
    train: dict[str, TrainOrPublished]
    quality: Quality
    metric_sensitivity: Ladder
    privacy: Privacy
    transition: Transition
    mixing: Mixing
    editing: Editing
    inversion: dict[str, Inversion]
    cost: Cost
    ablation: Trials
    experts: Experts

    @model_validator(mode="after")
    def _depths_agree(self):
        for name, how in self.train.items():
            if isinstance(how, Train):
                reached = 2 ** (len(how.schedule.samples) + 2 * bool(self.superres.samples))
                if reached != self.preprocess.stack_slices:
                    says = f"end at {reached} slices, but preprocess.stack_slices is {self.preprocess.stack_slices}"
                    raise ValueError(f"train.{name}: its stages and the super-resolution {says}")
        return self


class File(Section):
    """The whole of params.yaml."""

    seed: int
    profile: str
    cohort: Cohort
    models: list[str]
    profiles: dict[str, Profile]

    @model_validator(mode="after")
    def _choices_exist(self):
        if self.profile not in self.profiles:
            raise ValueError(f"profile {self.profile!r} does not exist; accepted are {', '.join(self.profiles)}")
        known = self.profiles[self.profile].train
        if missing := [model for model in self.models if model not in known]:
            has = f"has no {missing[0]!r} in its section train; accepted are {', '.join(known) or 'none yet'}"
            raise ValueError(f"models: profile {self.profile!r} {has}")
        if not Path(self.cohort.source).exists():
            says = f"{self.cohort.source} does not exist; give a folder of scans or bonelib/scans/phantom/cohort.py"
            raise ValueError(f"cohort.source: {says}")
        return self


def check_file(path: str | Path = "params.yaml") -> dict[str, Any]:
    """Read params.yaml and check all of it, also the profiles that are not in use; returns it as plain values."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    section(File, values, "", str(path))
    return values


if __name__ == "__main__":
    try:
        check_file()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
