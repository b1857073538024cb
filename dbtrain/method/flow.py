"""Flow matching (Lipman et al. 2023; Liu et al. 2023): z = (1 - t) y + t eps, with levels t from 1 down to 0.

Edges and levels are t after the shift everywhere: in run.json, in training, in the sampler, in `noise.edges`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import LEVEL_STREAM, NOISE_STREAM
from dbtrain.method.interface import Example, Noised, NoiseSettings, Target
from dbtrain.method.levels import LevelDistribution
from dbtrain.method.parametrisation import euler_step, expand
from dbtrain.method.ranges import Ranges, equal_shares
from dbtrain.method.sampler import schedule


def shifted(t: Tensor, shift: float) -> Tensor:
    """t' = k t / (1 + (k - 1) t)  # Esser et al. 2024 (SD3), eq. (23)

    With sigma = t/(1 - t) this is sigma' = k sigma.
    """
    # k t + (1 - t) is the same as 1 + (k - 1) t, but neither term is negative, so that t = 1 gives exactly 1
    return shift * t / (shift * t + (1 - t))


class LogitNormal:
    """logit t ~ N(mean, std^2) before the shift  # Esser et al. 2024 (SD3), eq. (19).

    After the shift k its mean is mean + ln k: a log-normal in sigma = t/(1 - t). Tensors are float64.

    Raises:
        ConfigError: std or shift is not positive.
    """

    low, high = 0.0, 1.0

    def __init__(self, mean: float, std: float, shift: float) -> None:
        if not (std > 0 and 0 < shift < math.inf):
            raise ConfigError(f"noise.logit_std={std:g} and noise.shift={shift:g} must be positive")
        self.mean, self.std = mean + math.log(shift), std

    def cdf(self, level: Tensor) -> Tensor:
        """Normal distribution function of logit t."""
        return torch.special.ndtr((torch.logit(level.clamp(0, 1)) - self.mean) / self.std)

    def quantile(self, share: Tensor) -> Tensor:
        """The logistic of mean + std * Phi^-1(q)."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(share))


class ShiftedUniform:
    """t uniform on [0, 1] before the shift. Tensors are float64.

    Raises:
        ConfigError: shift is not positive.
    """

    low, high = 0.0, 1.0

    def __init__(self, shift: float) -> None:
        if not 0 < shift < math.inf:
            raise ConfigError(f"noise.shift={shift:g} must be positive")
        self.shift = shift

    def cdf(self, level: Tensor) -> Tensor:
        """The t before the shift, which the inverse shift gives."""
        return shifted(level.clamp(0, 1), 1 / self.shift)

    def quantile(self, share: Tensor) -> Tensor:
        """The shifted share."""
        return shifted(share, self.shift)


class FlowNoise:
    """z = (1 - t) y + t eps, t = 1 being noise alone  # Liu et al. 2023, eq. (1), with time reversed.

    Args:
        distribution: distribution of the training levels, after the shift.
        shift: k, by which steps of a sampler are moved too.
        velocity: whether the loss is a square; it is then weighted so that it equals the square loss of the
            velocity v = eps - y.
        per_position: one t for each position of (N, L, D) instead of one a sample.
    """

    level_name = "t"
    noises: Noised = "vectors"
    policies = ("logit_normal", "uniform", "explicit")
    own_settings = ("shift", "logit_mean", "logit_std")
    parametrisations: Mapping[str, str] = {
        "edm": "velocity", "flow_v": "velocity", "vp_eps": "velocity", "vp_eps_linear": "velocity",
        "vp_eps_scaled_linear": "velocity", "logits": "flow_x0", "x0": "flow_x0",
    }  # fmt: skip

    def __init__(
        self, distribution: LevelDistribution, shift: float = 1.0, velocity: bool = True, per_position: bool = False
    ) -> None:
        self.distribution = distribution
        self.shift = shift
        self.velocity = velocity
        self.per_position = per_position

    @staticmethod
    def plan(settings: NoiseSettings, target: Target, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Logit-normal, or uniform before the shift; `explicit` gives edges alone, and is logit-normal."""
        if settings.ranges not in FlowNoise.policies:
            raise ConfigError(
                f"noise.ranges={settings.ranges} is not for noise.process=flow: set logit_normal, uniform, or explicit "
                "with noise.edges from 1 down to 0"
            )
        if settings.edges and (settings.edges[0] != 1 or settings.edges[-1] != 0):
            raise ConfigError(
                f"noise.edges={list(settings.edges)} are t of a flow, after the shift: they must fall from 1 to 0"
            )
        others = {"weighting": "none", "input_scaling": "unit", "sigma_data": None}
        wrong = [key for key, value in others.items() if getattr(settings, key) != value]
        if wrong:
            raise ConfigError(
                f"noise.{wrong[0]}={getattr(settings, wrong[0])} is for Gaussian noise: leave it out under "
                "noise.process=flow, whose loss is that of the velocity"
            )
        if settings.ranges == "uniform":
            return {"kind": "uniform_t", "shift": settings.shift}
        numbers = {"logit_mean": settings.logit_mean, "logit_std": settings.logit_std, "shift": settings.shift}
        return {"kind": "logit_normal", **numbers}

    @staticmethod
    def make(spec: Mapping[str, Any], settings: NoiseSettings, target: Target) -> "FlowNoise":
        """Make the process from run.json. Without a codebook the loss is a square, with one a
        cross-entropy."""
        shift = spec["shift"]
        distribution: LevelDistribution = ShiftedUniform(shift)
        if spec["kind"] == "logit_normal":
            distribution = LogitNormal(spec["logit_mean"], spec["logit_std"], shift)
        return FlowNoise(distribution, shift, target.code_dim is None, target.per_position)

    def level_shape(self, example: Example) -> tuple[int, ...]:
        """() for one t a sample, (L,) for one a position."""
        return (example.clean.shape[1],) if self.per_position else ()

    def draw_uniforms(self, example: Example, draws: Draws) -> Tensor:
        """Uniforms that are independent of each other, (N, *level_shape)."""
        return draws.uniform(self.level_shape(example), LEVEL_STREAM)

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training levels at or below t."""
        return self.distribution.cdf(level.double())

    def quantile(self, share: Tensor) -> Tensor:
        """Values of t at these quantiles of the training distribution; float32, same shape."""
        return self.distribution.quantile(share.double()).float()

    def split(self, blocks: int) -> Ranges:
        """Equal shares of the training distribution."""
        return equal_shares(self.distribution, blocks)

    def schedule(self, ranges: Ranges, steps_per_block: int) -> list[float]:
        """Equal shares of the training distribution within each slice."""
        return schedule(ranges, self.distribution, steps_per_block)

    def whole_schedule(self, ranges: Ranges, steps: int) -> list[float]:
        """Equal steps before the shift, from t = 1 down to one step above 0, where the last one ends."""
        return shifted(torch.arange(steps, 0, -1, dtype=torch.float64) / steps, self.shift).tolist()

    def in_other_terms(self, low: float, high: float) -> str:
        """The slice in sigma = t/(1 - t)."""
        ends = [t / (1 - t) if t < 1 else math.inf for t in (low, high)]
        return f"sigma {ends[0]:.4g}-{ends[1]:.4g}"

    def corrupt(self, clean: Tensor, level: Tensor, draws: Draws) -> Tensor:
        """(1 - t) y + t eps."""
        t = expand(level, clean)
        return (1 - t) * clean + t * draws.normal(tuple(clean.shape[1:]), NOISE_STREAM)

    def weight(self, level: Tensor) -> Tensor:
        """1/t^2 for square losses, so that the loss of the estimate D = z - t F is that of the velocity F."""
        return level**-2 if self.velocity else torch.ones_like(level)

    def prior(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """eps, (N, *shape): z at t = 1."""
        return draws.normal(shape, NOISE_STREAM)

    def centre(self, prior: Tensor) -> Tensor:
        """Zeros, the mean of the noise."""
        return torch.zeros_like(prior)

    def step(self, noisy: Tensor, denoised: Tensor, level: Tensor, next_level: Tensor, draws: Draws) -> Tensor:
        """Euler step of dz/dt = v = (z - D)/t."""
        return euler_step(noisy, denoised, level, next_level)
