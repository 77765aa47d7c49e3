"""The sections of params.yaml on HA-GAN's studies."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bonelib.core.config import Count, Hash, Positive, Section, Share
from bonelib.networks.config import GENERATORS, CriticNet, Generator, SuperRes
from bonelib.scans.config import Preprocess
from bonelib.studies.config import Trials
from bonelib.training.config import HierarchicalTrain


class HAGANCost(Section):
    """What is measured of HA-GAN's cost: `networks` at each of `stages` (cubes of 4 x 2^stage voxels where the base is
    the published one) beside `generators` and their `critic` at the same, which are boxes of nearly as many voxels.

    At stage `timed`, an iteration is timed `rounds` times in turns with a plain implementation. `networks` null are the
    published ones.
    """

    networks: HierarchicalTrain | None = None
    generators: dict[str, Generator] = {kind: config() for kind, config in GENERATORS.items()}
    critic: CriticNet = CriticNet()
    stages: Annotated[tuple[Count, ...], Field(min_length=2)] = (3, 4, 5)
    timed: Count = 5
    rounds: Count = 3


class SecondFamily(Section):
    """Volumes of another kind: the soft-tissue contrast of `patients` phantoms, cut into `stacks` each, from which a
    HA-GAN learns for `seconds` of CPU time."""

    patients: Annotated[int, Field(ge=8)] = 60
    stacks: Annotated[int, Field(ge=3)] = 3  # which cover the field
    seconds: Positive = 150


class HAGANStudy(Section):
    """HA-GAN at the size that is trained in a notebook.

    `train` is the model that is shown, `trials` are short trainings of what it has and what is left out, the first
    variant as it is; `blank` is the share of slices, at either end of a stack, that are made empty for one more trial,
    and `second` another family of volumes. `real` stacks, of held-out patients and as many of training patients, are
    what all samples are compared with, and `samples` are drawn of the model that is shown.
    """

    train: HierarchicalTrain
    trials: Trials
    blank: Share = 0.3
    second: SecondFamily = SecondFamily()
    real: Annotated[int, Field(ge=8)] = 320
    samples: Annotated[int, Field(ge=8)] = 320
    draws: Annotated[int, Field(ge=2)] = 200
    cost: HAGANCost = HAGANCost()


class Conditional(Section):
    """A conditional HA-GAN: its classes are motion grades, or fifths of the training scans `by` an attribute.

    It is trained further from the unconditional one, for `samples` real volumes, or is the `published` one.
    """

    by: Literal["motion grade", "Tt.Ar", "Tt.BMD", "Tb.BMD", "BV/TV", "Tb.N", "Tb.Sp", "Ct.BMD", "Ct.Th"] = (
        "motion grade"
    )
    samples: Count = 12000
    published: Hash | None = None


class HAGANUses(Section):
    """What the codes of HA-GAN's encoder are used for, and its conditional variant.

    `patients` are phantoms that no network has seen; the last `walked` of them are left out of what the walks go by. Of
    each of `walks`, an attribute, `points` values are asked, from its quantile `reach` among the bones to that of 1 -
    `reach`. Of every network of `conditional` so many samples are `drawn`. `draws` are those of the intervals.
    """

    patients: Annotated[int, Field(ge=8)] = 240
    walked: Annotated[int, Field(ge=2)] = 16
    points: Annotated[int, Field(ge=2)] = 5
    walks: Annotated[tuple[str, ...], Field(min_length=1)] = ("Tt.Ar", "Tb.BMD", "Ct.Th")
    reach: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    conditional: dict[str, Conditional] = {}
    drawn: Annotated[int, Field(ge=5)] = 100
    draws: Annotated[int, Field(ge=2)] = 1000

    @model_validator(mode="after")
    def _fits(self):
        if self.patients - self.walked < 5:
            raise ValueError(f"walked {self.walked} of {self.patients} patients leaves fewer than 5 to learn from")
        return self


class Native(Section):
    """Whole scans at the scanner's own voxels, of `voxel_mm`, cut as `preprocess` says.

    A HA-GAN, trained as `train` says, draws them eight times as coarse; it learns from two visits each of
    `patients` phantoms, of which every eighth is held out. The super-resolution of the model `middle` of the run draws
    the next two halvings, and `finer` the last one, from scans of `scanned` phantoms; or all three are the `published`
    ones. Beside it `direct`, a HA-GAN that draws every voxel itself, learns from those scans; null leaves it out. So
    many samples are
    `drawn`, and compared with `real` scans of other phantoms; `coarse` samples of the HA-GAN with those it did not
    learn from.
    """

    voxel_mm: Positive = 0.0607
    preprocess: Preprocess = Preprocess(shape=(168, 576, 448), stack_slices=160, stacks_per_scan=1)
    halvings: ClassVar[int] = 3  # two by super-resolution, one by the last network
    patients: Annotated[int, Field(ge=2)] = 400
    scanned: Annotated[int, Field(ge=2)] = 24
    train: HierarchicalTrain
    middle: str = "progan"
    finer: SuperRes
    published: Hash | None = None
    direct: HierarchicalTrain | None = None
    drawn: Count = 4
    real: Annotated[int, Field(ge=2)] = 4
    coarse: Annotated[int, Field(ge=4)] = 200
    draws: Annotated[int, Field(ge=2)] = 200

    @model_validator(mode="after")
    def _last_halving(self):
        if self.finer.factor != 2 or self.finer.texture or not self.finer.samples:
            raise ValueError("finer: accepted are factor 2, texture 0 and some samples")
        return self
