"""The sections of params.yaml on scans: cohort, phantom, preprocessing and augmentation."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bonelib.core.config import Count, Positive, Section, Shape, Share


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
        least = max(1, min(8, y // 9))
        if y % 9 or x % 7 or y // 9 != x // 7 or (y // 9) & (y // 9 - 1) or self.stack_slices % least:
            says = f"but must be 9 x 7 times a power of two in plane, and a multiple of {least} slices"
            raise ValueError(f"after subsampling, a stack is {(self.stack_slices, y, x)}, {says}")
        if self.stack_slices > z:
            raise ValueError(f"stack_slices {self.stack_slices} is more than the {z} slices of a subsampled scan")
        if self.intensity[0] >= self.intensity[1]:
            raise ValueError(f"intensity {self.intensity} must rise")
        return self


class Augment(Section):
    """In-plane rotation in degrees and zoom, both uniform (section 3.1)."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    zoom: Annotated[float, Field(ge=1)] = 1.15
