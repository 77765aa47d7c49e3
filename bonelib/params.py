"""params.yaml as a whole: the sections of every package, assembled into profiles.

python -m bonelib.params checks the file of the working folder.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag, model_validator

from bonelib.core.cli import command
from bonelib.core.config import Section, Voxel, read_params, section
from bonelib.latent.config import Editing, Inversion, Mixing, Transition
from bonelib.networks.config import SuperRes
from bonelib.scans.config import Cohort, Phantom, Preprocess
from bonelib.studies.config import (
    Augmentation,
    Cost,
    Experts,
    InverseProblems,
    Ladder,
    PhantomCheck,
    Privacy,
    Quality,
    Trials,
    TwoContrasts,
    VisitsAndAtlases,
)
from bonelib.studies.hagan_config import HAGANStudy, HAGANUses, Native
from bonelib.training.config import TRAININGS, Grading, HierarchicalTrain, Published, Train, training_kind


def _published(values: Any) -> str:
    keys = values if isinstance(values, dict) else values.model_fields_set
    if "published" in keys:
        return "published"
    hierarchical = isinstance(values, HierarchicalTrain) or TRAININGS.get(training_kind(values)) is HierarchicalTrain
    return "hierarchical" if hierarchical else "train"


TrainOrPublished = Annotated[
    Annotated[Train, Tag("train")]
    | Annotated[HierarchicalTrain, Tag("hierarchical")]
    | Annotated[Published, Tag("published")],
    Discriminator(_published),
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
    inverse_problems: InverseProblems
    visits_and_atlases: VisitsAndAtlases
    two_contrasts: TwoContrasts
    native: Native
    cost: Cost
    ablation: Trials
    hagan_study: HAGANStudy
    hagan_uses: HAGANUses
    augmentation: Augmentation
    experts: Experts

    @model_validator(mode="after")
    def _depths_agree(self):
        if (self.superres.factor, self.superres.texture) != (4, 5):
            raise ValueError("superres: accepted are factor 4 and texture 5, which models of train are drawn with")
        for name, how in self.train.items():
            if isinstance(how, Published):
                continue
            wanted, reached = self.preprocess.stack_slices, how.slices << 2 * bool(self.superres.samples)
            whole = isinstance(how, HierarchicalTrain) and how.slices == wanted  # it draws every voxel itself
            if reached != wanted and not whole:
                says = f"end at {reached} slices, but preprocess.stack_slices is {wanted}"
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
    values = read_params(path)
    section(File, values, "", str(path))
    return values


if __name__ == "__main__":
    sys.exit(command(check_file)())
