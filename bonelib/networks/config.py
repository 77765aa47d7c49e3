"""The sections of params.yaml on networks. Defaults are published values (Angermann et al. 2023; Sun et al. 2022)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bonelib.core.config import Count, NotNegative, Positive, Section, Shape, Share

BASE = (1, 9, 7)  # (z, y, x) of the coarsest grid; every stage doubles it
PUBLISHED_WIDTHS = (128, 128, 128, 64, 32, 16)  # Tables A.2 and A.3


class _Generator(Section):
    """`widths`: channels of the coarsest grid (behind the dense layer, or of the constant) and behind each stage.

    `noise` starts the scales of the noise inputs. `base_convs` are convolutions before the first stage. Of Table 1 are
    `untruncated` and `truncation`, the two settings in which a model is compared; of Figures C.9 and C.10 is `sweep`.
    Not in the paper: `flat` draws slices, whose `base` has one: kernels are 1x3x3, and stages double the plane alone.
    """

    base: Shape = BASE
    flat: bool = False
    widths: tuple[Count, ...] = PUBLISHED_WIDTHS
    latent: Count = 512
    noise: NotNegative = 0.0
    padding: Literal["zeros", "replicate"] = "zeros"
    base_convs: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values):
        # A model folder may hold null under the keys of other kinds, which once shared this class
        return {key: value for key, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _one_slice(self):
        if self.flat and self.base[0] != 1:
            raise ValueError(f"base {self.base} of a flat network must begin with 1, its only slice")
        return self

    def slices(self, stages: int) -> int:
        """Of what is drawn after so many stages."""
        return self.base[0] if self.flat else self.base[0] << stages

    def network(self) -> dict:
        """What the network of this kind is made with; the rest is how it is sampled."""
        return self.model_dump(exclude={"kind", "untruncated", "truncation", "sweep"})


class ProGANConfig(_Generator):
    """Truncations bound the normal distribution of the latents. There are noise inputs where `noise` is above 0."""

    kind: Literal["progan"] = "progan"
    untruncated: Positive = 5.0
    truncation: Positive = 1.8
    sweep: tuple[Positive, ...] = (2.6, 1.8, 1.0, 0.2)

    @property
    def code(self) -> int:
        """Numbers of a code."""
        return self.latent


class StyleGANConfig(_Generator):
    """Truncations are shares of the way from the mean style. Noise inputs are learned from `noise` on.

    `style` is the width of W; `mapping_rate` and `affine_rate` multiply the learning rates of the mapping network and
    of the affine maps of the styles.
    """

    kind: Literal["stylegan"] = "stylegan"
    style: Count = 512
    mapping_rate: Positive = 0.02
    affine_rate: Positive = 1.0
    untruncated: Positive = 1.0
    truncation: Positive = 0.8
    sweep: tuple[Positive, ...] = (1.0, 0.7, 0.4, 0.1)

    @property
    def code(self) -> int:
        """Numbers of a code."""
        return self.style


class HAGANConfig(Section):
    """The published networks of HA-GAN for volumes of 128^3, but for their `base`, which is (4, 4, 4) there (see
    `networks.hagan.HAGAN`). `encoder` are the channels of E^G, `classes` those of the conditional variant. Truncations
    are those of a ProGAN."""

    kind: Literal["hagan"] = "hagan"
    base: Shape = BASE
    stages: Annotated[int, Field(ge=2)] = 5
    widths: tuple[Count, ...] = (512, 512, 256, 128, 64)
    fine: tuple[Count, ...] = (32,)
    low: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 16)
    encoder: tuple[Count, ...] = (64, 128, 256)
    latent: Count = 1024
    division: Count = 8
    halo: bool = True
    classes: Annotated[int, Field(ge=0)] = 0
    untruncated: Positive = 5.0
    truncation: Positive = 1.8
    sweep: tuple[Positive, ...] = (2.6, 1.8, 1.0, 0.2)

    @model_validator(mode="after")
    def _fit(self):
        doublings = self.stages - 1 - len(self.fine)
        if not 1 <= doublings <= len(self.widths) - 1:
            says = f"{self.stages} stages, of which {1 + len(self.fine)} follow A, need {1 + doublings} widths or more"
            raise ValueError(says if doublings > 0 else "stages must be two more than there are numbers in fine")
        if len(self.encoder) != doublings:
            raise ValueError(f"encoder must have {doublings} numbers, one for each halving from A to the base")
        if odd := [n for n in (*self.widths, *self.fine, *self.low, *self.encoder) if n > 8 and n % 8]:
            raise ValueError(f"{odd[0]} channels cannot be normed in 8 groups; give multiples of 8, or less than 8")
        return self

    @property
    def code(self) -> int:
        """Numbers of a code."""
        return self.latent + self.classes

    def network(self) -> dict:
        """What the generator is made with."""
        return self.model_dump(exclude={"kind", "encoder", "untruncated", "truncation", "sweep"})

    def parts(self) -> dict:
        """What encoder and discriminators share with the generator."""
        return self.model_dump(include={"base", "stages", "fine", "division"})


GENERATORS = {"progan": ProGANConfig, "stylegan": StyleGANConfig}
Generator = Annotated[ProGANConfig | StyleGANConfig, Field(discriminator="kind")]  # those that grow stage by stage


class CriticNet(Section):
    """`convs` 2, `whole`, `head` and `standardise` are not in the paper (see `networks.critic.Critic`)."""

    widths: tuple[Count, ...] = PUBLISHED_WIDTHS
    convs: Annotated[int, Field(ge=1, le=3)] = 1
    whole: bool = False
    head: tuple[Count, ...] = ()
    standardise: bool = False


class HAGANCriticNet(Section):
    """The discriminators of HA-GAN (see `networks.hagan_critic.HAGANCritic`), by default those for 128^3."""

    high: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 64, 128, 256, 512)
    head: tuple[Count, Count] = (128, 64)
    low: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 128, 256)


class SuperRes(Section):
    """The network that draws a generator's volumes `factor` times as fine; not in the paper.

    `texture` numbers of a bone may be asked for (0: none). `samples` windows of `window` (z, y, x) voxels of the given
    grid are seen (0: no network). `critic` are the critic's channels from its coarsest grid on; `penalty` holds its
    slope at zero; `lattice` keeps air free of the grid, and `obedience` the texture at what is asked for. `added` times
    the SD of what is missing in the given volume is the unit of the output; `corruption` is the largest SD of the noise
    on the volumes given in training.
    """

    samples: Annotated[int, Field(ge=0)] = 0
    factor: Literal[2, 4] = 4
    texture: Literal[0, 5] = 5  # as many as `scans.dataset.TEXTURE` has
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
