"""Sections `codebook` and `noise`: the targets, and how they are made noisy."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dbtrain.config.section import Count, Positive, Section
from dbtrain.method.noise_processes import policies


def _known(policy: str) -> str:
    if policy not in policies():
        raise ValueError(f"is none of {', '.join(policies())}")
    return policy


class CodebookConfig(Section):
    """Target codes, made once, frozen, common to all blocks."""

    source: Literal["random", "orthogonal", "corpus"] = "orthogonal"
    """`corpus`: from which tokens stand near each other in the training text (PPMI, then SVD)."""
    dim: Count = 64


class NoiseConfig(Section):
    """Noise range, its distribution and its split over the blocks."""

    process: str | None = None
    """How the target is made noisy: `gaussian` or `flow` (codes, images and latents), or `masking` (token
    ids); by default what the architecture is made for."""
    ranges: Annotated[str, AfterValidator(_known)] = "calibrated"
    """Where the range and its edges come from: `calibrated` and `equal_information` measure the data with a
    pilot, `paper`, `uniform` and `explicit` do not. Architectures without a codebook take another by default,
    see `noise_defaults`. For a flow: `logit_normal` or `uniform`, the density of t before the shift, of which
    every block gets an equal share, or `explicit`, t from 1 down to 0 after the shift. For masking: `alpha`,
    equal decrements of alpha, or `explicit` masked shares from 1 down to 0."""
    p_mean: float = -1.2
    p_std: Positive = 1.2
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive | None = None
    """Standard deviation of one element of the clean target; by default that of a unit-norm code,
    1/sqrt(dim), or 0.5 for images and latents."""
    edges: tuple[float, ...] | None = None
    """Falling levels, blocks + 1, for `explicit`."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.05
    """A block trains on levels beyond both ends of its slice, by this share of its (log) width."""
    weighting: Literal["none", "edm", "clamp", "eps"] = "none"
    """Weight of the loss by level: `edm`, for square losses; `clamp`: 1 + sigma_data^2/sigma^2, which is
    edm's but for a factor, at most 5; `eps`: 1/sigma^2, for networks that predict eps."""
    input_scaling: Literal["unit", "signal"] = "unit"
    shift: Positive = 1.0
    """Shift of a flow: k in t' = k t/(1 + (k - 1) t), which moves levels and steps towards the noise."""
    logit_mean: float = 0.0
    """Mean of logit t before the shift, for a flow."""
    logit_std: Positive = 1.0
    """Standard deviation of logit t before the shift, for a flow."""

    @model_validator(mode="after")
    def _edges_are_for_explicit(self) -> "NoiseConfig":
        if (self.edges is not None) != (self.ranges == "explicit"):
            raise ValueError(
                f"noise.edges and noise.ranges=explicit go together (ranges={self.ranges}): give both or none"
            )
        return self

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "NoiseConfig":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"noise.sigma_min={self.sigma_min:g} is not below noise.sigma_max={self.sigma_max:g}: the noise falls "
                "from sigma_max to sigma_min"
            )
        return self
