"""The sections of params.yaml on latent codes: inversion, morphs, style mixing and editing."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from bonelib.core.config import Count, Hash, NotNegative, Positive, Section, Share


class Transition(Section):
    """Morphs between bones of low density (section 4.2).

    `weights` of the second bone are those of Figure 5, at which `pairs` of each density are measured, both of them
    among the lowest share `low` of the bones. A path stays within its ends to `tolerance` times the SD of that
    density over the bones, and its densities are trusted where `closed` of the slices have a closed cortex.
    `frames` has the film, `points` a path whose smoothness is measured. `geodesics` of so many pairs have
    `geodesic_points` each and are found in `steps` iterations at most. A surrogate of morphometry, fitted to
    `scans` training scans, reads bones on the generator's own grid where `ring` of their outline has cortex, and
    holds densities on a path; their ranges are those of `samples` of the model, `truncated` as in its section.
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
    truncated: bool = True
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
    cortex. Ranges come from `samples` of the model, `truncated` as in its section. Effects are measured at `codes`
    bones over +-`step`, responses up to the largest of `alphas`; `alpha` is that of Figure 7. `targets` can be met, by
    up to `starts` walks each, `impossible` ones not; `verified` of the former are measured by morphometry too, and
    counted apart where `shut` of the slices have a closed cortex. The classifiers of `tries` random networks each learn
    for `epochs`; curvature is taken at `points`, over `tangents` directions. `draws` are those of the intervals.
    """

    scans: Count = 400
    closed: Share = 0.8
    samples: Annotated[int, Field(ge=20)] = 2000
    truncated: bool = True
    codes: Annotated[int, Field(ge=4)] = 100
    step: Positive = 1.0
    alpha: Positive = 4.0
    alphas: tuple[Positive, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
    targets: Count = 200
    starts: Count = 8
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
