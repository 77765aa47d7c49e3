"""The sections of params.yaml on trainings. Defaults are published values (Angermann et al. 2023, Appendix B)."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bonelib import InputError
from bonelib.core.config import Count, Hash, NotNegative, Positive, Section, Share, section
from bonelib.networks.config import CriticNet, Generator, HAGANConfig, HAGANCriticNet
from bonelib.scans.config import Augment


class Schedule(Section):
    """Appendix B. Lists have one entry a stage, in samples the critic has seen."""

    samples: tuple[Count, ...] = (180_000, 360_000, 360_000, 360_000, 360_000)
    fade: tuple[Annotated[int, Field(ge=0)], ...] = (0, 180_000, 180_000, 180_000, 180_000)
    batch: tuple[Count, ...] = (24, 24, 12, 6, 3)
    rate_decay: Share = 0.85
    final_decay: Share = 0.0

    @model_validator(mode="after")
    def _lengths(self):
        if not len(self.samples) == len(self.fade) == len(self.batch):
            raise ValueError("samples, fade and batch must have one entry a stage each")
        return self


class Adaptive(Section):
    """Adaptive augmentation (see `training.adaptive`).

    The probability of every change is steered so that the critic's mean sign, of real over generated volumes in pairs,
    stays near `target`; it may rise from 0 to 1 in `ramp` samples.
    """

    target: Annotated[float, Field(gt=0, lt=1)] = 0.6
    ramp: Count


class Snapshots(Section):
    """From which weights a training's best are chosen (see `studies.selection`): the generator, or its running average,
    is kept `number` times, evenly over the last `part` of the last stage and at its end; `samples` of each are compared
    with the bones of a share of the training patients, `validation`, who are set apart."""

    number: Annotated[int, Field(ge=2)]
    part: Annotated[float, Field(gt=0, le=1)] = 0.5
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    samples: Annotated[int, Field(ge=4)] = 200
    draws: Annotated[int, Field(ge=2)] = 200


class Train(Section):
    """One model and how it is trained.

    Not in the paper: `loss` relativistic and nonsaturating (see `losses.of_critic`), with the weight `penalty`; `ema`,
    the half-life of the generator's running average in updates (0 is none); `haar`, which lets both networks work on
    the Haar bands of volumes, on grids half as fine; `autocorrelation`, the weight of
    `losses.autocorrelation_difference` while the rate falls towards the end, and `histogram`, that of
    `losses.histogram_distance` all along; of a StyleGAN `mixing`, the share of volumes drawn with the styles of two
    latents, and `path_length`, the weight of its regulariser (Karras et al. 2019 and 2020); `adaptive` augmentation;
    and `snapshots` to choose from.
    """

    generator: Generator
    critic: CriticNet = CriticNet()
    schedule: Schedule = Schedule()
    augment: Augment | None = Augment()
    n_critic: Count = 5
    rate: Positive = 4e-3
    loss: Literal["wasserstein", "relativistic", "nonsaturating"] = "wasserstein"
    penalty: Annotated[float, Field(ge=0)] = 10.0
    drift: Annotated[float, Field(ge=0)] = 1e-3
    autocorrelation: NotNegative = 0.0
    histogram: NotNegative = 0.0
    mixing: Share = 0.0
    path_length: NotNegative = 0.0
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
        if self.haar and self.generator.flat:
            raise ValueError("haar halves the grid along z, which a flat generator has not")
        if (self.mixing or self.path_length) and self.generator.kind != "stylegan":
            raise ValueError(f"mixing and path_length are of styles; a {self.generator.kind} has none")
        if self.adaptive and self.loss != "relativistic":
            raise ValueError(f"adaptive is steered by pairs of scores, which loss relativistic has and {self.loss} not")
        if self.snapshots and plan.fade[-1] > (1 - self.snapshots.part) * plan.samples[-1]:
            raise ValueError(f"snapshots.part {self.snapshots.part} reaches into the fade-in of the last stage")
        return self

    @property
    def plan(self) -> Schedule:
        """How long each stage takes."""
        return self.schedule

    @property
    def slices(self) -> int:
        """Of the volumes that the generator draws in the end."""
        return self.generator.slices(len(self.schedule.samples))

    @property
    def step(self) -> int:
        """Samples that a step of the last stage takes."""
        return self.n_critic * self.schedule.batch[-1]

    def lasting(self, samples: int) -> "Train":
        """The same for `samples` in all, shared out over the stages alike, without snapshots."""
        plan, share = self.schedule, samples / sum(self.schedule.samples)
        lengths = tuple(max(1, round(n * share)) for n in plan.samples)
        fades = tuple(round(n * share) for n in plan.fade)
        plan = plan.model_copy(update={"samples": lengths, "fade": fades})
        return self.model_copy(update={"schedule": plan, "snapshots": None})


class HierarchicalTrain(Section):
    """A HA-GAN and how it is trained; defaults are the published values (Sun et al. 2022, section III-E).

    `samples` real volumes are seen in all. `lambdas` weigh eqs. (6) and (7), `class_weight` the loss of the auxiliary
    classifier of a conditional generator. `low` False leaves out G^L and D^L, `encode` False the encoder, `random`
    False draws r of the partition T_v alone: the ablations of Table IV. Not in the paper: `clip`, `ema` and `snapshots`
    as in a `Train`; `final_decay`, the part at the end in which all rates fall; `augment`.
    """

    generator: HAGANConfig
    critic: HAGANCriticNet = HAGANCriticNet()
    samples: Count = 320_000
    batch: Count = 4
    rate: Positive = 1e-4
    critic_rate: Positive = 4e-4
    encoder_rate: Positive = 1e-4
    betas: tuple[Share, Share] = (0.0, 0.999)
    lambdas: tuple[NotNegative, NotNegative] = (5.0, 5.0)
    class_weight: NotNegative = 0.1
    low: bool = True
    encode: bool = True
    random: bool = True
    augment: Augment | None = None
    clip: Positive | None = None
    ema: NotNegative = 0.0
    final_decay: Share = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    snapshots: Snapshots | None = None

    haar: ClassVar[bool] = False  # what a `Train` section has and this one has not

    @model_validator(mode="after")
    def _halvings(self):
        doublings = self.generator.stages - 1 - len(self.generator.fine)
        if len(self.critic.low) > doublings:
            raise ValueError(f"critic.low must have at most {doublings} numbers, one for each halving of A's grid")
        return self

    @property
    def plan(self) -> Schedule:
        """All of it, as one stage."""
        return Schedule(samples=(self.samples,), fade=(0,), batch=(self.batch,), final_decay=self.final_decay)

    @property
    def slices(self) -> int:
        """Of the volumes that the generator draws."""
        return self.generator.base[0] << self.generator.stages

    @property
    def step(self) -> int:
        """Samples that a step takes."""
        return self.batch

    def lasting(self, samples: int) -> "HierarchicalTrain":
        """The same for `samples` in all, without snapshots."""
        return self.model_copy(update={"samples": samples, "snapshots": None})


TRAININGS = {"progan": Train, "stylegan": Train, "hagan": HierarchicalTrain}  # by the kind of their generator


def training_kind(values: Any) -> str | None:
    """The kind of the generator of a section of params.yaml on a training, where it says one."""
    generator = values.get("generator") if isinstance(values, dict) else None
    return generator.get("kind") if isinstance(generator, dict) else None


def training_section(values: dict[str, Any], name: str, file: str = "params.yaml") -> Train | HierarchicalTrain:
    """A training's section, checked as what its generator needs; errors as those of `core.config.section`."""
    kind = training_kind(values)
    if kind is not None and kind not in TRAININGS:
        raise InputError(f"{file}: {name}.generator.kind is {kind!r}; accepted are {', '.join(TRAININGS)}")
    return section(TRAININGS.get(kind, Train), values, name, file)


class Published(Section):
    """A model of the store in the repository, by its hash (see `bonelib.published`), in place of a `Train` section."""

    published: Hash


class Grading(Section):
    """The network that grades motion (section 3.3), by default a ResNet-18 in 3D, and how it is trained.

    Scans are averaged over blocks of 2^`halvings` voxels a side first. `samples` windows of `depth` slices are seen by
    each of the `folds` networks and by the last one, trained on all scans. `mirror` reflects windows at random along
    all axes, `decay` is the weight decay. With `published`, a hash, the grader of the repository grades all scans.
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
