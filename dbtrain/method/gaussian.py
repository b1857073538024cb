"""Gaussian noise: its levels, EDM's weighting and steps, and no noise at all for the end-to-end baseline."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Example, Noised, NoiseSettings, Target
from dbtrain.method.levels import LevelDistribution, read_distribution
from dbtrain.method.parametrisation import default_sigma_data, euler_step, expand
from dbtrain.method.ranges import Ranges, equal_shares
from dbtrain.method.sampler import karras_schedule, schedule

LEVEL_STREAM = 0
"""Stream of the draws that makes the levels."""
NOISE_STREAM = 1
"""Stream of the draws that makes the noise."""

Weighting = Literal["none", "edm", "clamp", "eps"]
MOST_WEIGHT = 5.0
"""Greatest weight under `clamp`, where it is 1 at the most noise."""


class GaussianNoise:
    """z = y + sigma * eps  # Karras et al. 2022 (EDM); paper, eq. (1).

    Args:
        distribution: distribution of the training levels over the whole range.
        sigma_data: standard deviation of one element of y, for the weights.
        weighting: `none`; `edm` (L2 losses only); `clamp` (edm times sigma_data^2, at most `MOST_WEIGHT`);
            `eps` (L2 losses of networks that predict eps).
        per_position: one sigma for each position of (N, L, D) instead of one a sample.
    """

    level_name = "sigma"
    noises: Noised = "vectors"
    policies = ("calibrated", "equal_information", "paper", "uniform", "explicit")
    own_settings: tuple[str, ...] = ()
    parametrisations: Mapping[str, str] = {}

    def __init__(
        self,
        distribution: LevelDistribution,
        sigma_data: float = 0.5,
        weighting: Weighting = "none",
        per_position: bool = False,
    ) -> None:
        self.distribution = distribution
        self.sigma_data = sigma_data
        self.weighting = weighting
        self.per_position = per_position

    @staticmethod
    def plan(settings: NoiseSettings, target: Target, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Log-normal, log-uniform, or what a pilot measures  # paper, section 3.2."""
        if settings.ranges not in GaussianNoise.policies:
            raise ConfigError(
                f"noise.ranges={settings.ranges} is for masking, and {target.arch} has Gaussian noise: try calibrated"
            )
        edges = {"sigma_min": settings.sigma_min, "sigma_max": settings.sigma_max}
        if settings.ranges == "explicit" and settings.edges:
            edges = {"sigma_min": settings.edges[-1], "sigma_max": settings.edges[0]}
        if settings.ranges in ("uniform", "explicit"):
            return {"kind": "loguniform", **edges}
        if settings.ranges == "paper":
            return {"kind": "lognormal", "p_mean": settings.p_mean, "p_std": settings.p_std, **edges}
        if target.code_dim is None:
            raise ConfigError(
                f"noise.ranges={settings.ranges} measures a codebook, and model.arch={target.arch} has none: choose "
                "noise.ranges=paper, uniform or explicit"
            )
        return measure()

    @staticmethod
    def make(spec: Mapping[str, Any], settings: NoiseSettings, target: Target) -> "GaussianNoise":
        """Make the process from run.json; sigma_data, if it is not given, follows from the target."""
        sigma_data = settings.sigma_data or default_sigma_data(target.code_dim)
        return GaussianNoise(read_distribution(spec), sigma_data, settings.weighting, target.per_position)

    def level_shape(self, example: Example) -> tuple[int, ...]:
        """() for one sigma a sample, (L,) for one a position."""
        return (example.clean.shape[1],) if self.per_position else ()

    def draw_uniforms(self, example: Example, draws: Draws) -> Tensor:
        """Uniforms that are independent of each other, (N, *level_shape)."""
        return draws.uniform(self.level_shape(example), LEVEL_STREAM)

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training levels at or below sigma."""
        return self.distribution.cdf(level.double())

    def quantile(self, share: Tensor) -> Tensor:
        """Sigmas at these quantiles of the training distribution, by inversion; float32, same shape."""
        return self.distribution.quantile(share.double()).float()

    def split(self, blocks: int) -> Ranges:
        """Equal shares of the training distribution."""
        return equal_shares(self.distribution, blocks)

    def schedule(self, ranges: Ranges, steps_per_block: int) -> list[float]:
        """Equal shares of the training distribution within each slice."""
        return schedule(ranges, self.distribution, steps_per_block)

    def whole_schedule(self, ranges: Ranges, steps: int) -> list[float]:
        """The schedule of EDM, from the top of the range to its end."""
        return karras_schedule(ranges.edges[-1], ranges.edges[0], steps)

    def in_other_terms(self, low: float, high: float) -> str:
        """An empty string: there are no other terms."""
        return ""

    def corrupt(self, clean: Tensor, level: Tensor, draws: Draws) -> Tensor:
        """y + sigma * eps  # paper, eq. (1)."""
        return clean + expand(level, clean) * draws.normal(tuple(clean.shape[1:]), NOISE_STREAM)

    def weight(self, level: Tensor) -> Tensor:
        """lambda = (sigma^2 + sigma_data^2)/(sigma * sigma_data)^2  # EDM, Table 1; ones under `none`.

        Under `clamp` lambda * sigma_data^2 = 1 + sigma_data^2/sigma^2, at most `MOST_WEIGHT`.
        Under `eps` it is 1/sigma^2, so that the loss of y is that of eps  # DDPM (Ho et al. 2020), eq. (14)
        """
        if self.weighting == "none":
            return torch.ones_like(level)
        if self.weighting == "eps":
            return level**-2
        if self.weighting == "clamp":
            # for codes, lambda itself would always exceed the bound: 1/sigma_data^2 is the width of a code
            return (1 + (self.sigma_data / level) ** 2).clamp(max=MOST_WEIGHT)
        return (level**2 + self.sigma_data**2) / (level * self.sigma_data) ** 2

    def prior(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """sigma_max * eps, (N, *shape)."""
        return self.distribution.high * draws.normal(shape, NOISE_STREAM)

    def centre(self, prior: Tensor) -> Tensor:
        """Zeros, the mean of the noise."""
        return torch.zeros_like(prior)

    def step(self, noisy: Tensor, denoised: Tensor, level: Tensor, next_level: Tensor, draws: Draws) -> Tensor:
        """Euler step of dz/dsigma = (z - D)/sigma."""
        return euler_step(noisy, denoised, level, next_level)


class NoNoise:
    """The network is shown nothing of the target: end-to-end training of the same layers, for the baseline.

    Args:
        per_position: whether levels (which say nothing) have the shape (N, L) instead of (N,), if the model
            expects that.
        spread: standard deviation of the noise that it is shown instead, from which a recurrent state starts;
            0 for zeros.
    """

    level_name = "level"

    def __init__(self, per_position: bool = False, spread: float = 0.0) -> None:
        self.per_position = per_position
        self.spread = spread

    def level_shape(self, example: Example) -> tuple[int, ...]:
        """() for one level a sample, (L,) for one a position, as the noise that it replaces has them."""
        return (example.clean.shape[1],) if self.per_position else ()

    def draw_uniforms(self, example: Example, draws: Draws) -> Tensor:
        """Uniforms that are independent of each other, (N, *level_shape)."""
        return draws.uniform(self.level_shape(example), LEVEL_STREAM)

    def cdf(self, level: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(level)

    def quantile(self, share: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(share)

    def split(self, blocks: int) -> Ranges:
        """Slices that tile: levels mean nothing, but a plan has a slice for each block."""
        return Ranges(tuple(float(edge) for edge in range(blocks, -1, -1)))

    def schedule(self, ranges: Ranges, steps_per_block: int) -> list[float]:
        """One level a slice: the prediction is the same however often it is asked for."""
        return schedule(ranges, None, 1)

    def whole_schedule(self, ranges: Ranges, steps: int) -> list[float]:
        """One level a slice."""
        return schedule(ranges, None, 1)

    def in_other_terms(self, low: float, high: float) -> str:
        """An empty string: there are no other terms."""
        return ""

    def corrupt(self, clean: Tensor, level: Tensor, draws: Draws) -> Tensor:
        """Noise alone: nothing of the target is seen."""
        return self.prior(tuple(clean.shape[1:]), draws)

    def weight(self, level: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(level)

    def prior(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """spread * eps, (N, *shape)."""
        if not self.spread:
            return torch.zeros(len(draws.positions), *shape, device=draws.positions.device)
        return self.spread * draws.normal(shape, NOISE_STREAM)

    def centre(self, prior: Tensor) -> Tensor:
        """The prior itself: a network that was trained to start from noise is evaluated from noise too."""
        return prior

    def step(self, noisy: Tensor, denoised: Tensor, level: Tensor, next_level: Tensor, draws: Draws) -> Tensor:
        """Unchanged: there is one step only."""
        return noisy
