"""Distributions of the noise level: they say how often a level is trained, and so where equal shares lie.

Masking is the exception: there `Uniform` only places the edges of the slices, and `MaskingNoise.quantile`
says how often a level is trained.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dbtrain.errors import ConfigError


class LevelDistribution(Protocol):
    """A continuous distribution on [low, high]; tensors are float64."""

    low: float
    high: float

    def cdf(self, level: Tensor) -> Tensor:
        """Share at or below `level`, 0 at `low` and 1 at `high`."""

    def quantile(self, share: Tensor) -> Tensor:
        """Inverse of `cdf`."""


def _check_range(low: float, high: float) -> None:
    if not (0 < low < high < math.inf):
        raise ConfigError(f"sigma_min={low} and sigma_max={high} must be finite with 0 < sigma_min < sigma_max")


class LogNormal:
    """log sigma ~ N(p_mean, p_std^2) truncated to [sigma_min, sigma_max]  # EDM, Table 1; paper, section 3.2.

    Raises:
        ConfigError: the range is empty, p_std is not positive, or the range holds none of the mass.
    """

    def __init__(self, p_mean: float, p_std: float, sigma_min: float, sigma_max: float) -> None:
        _check_range(sigma_min, sigma_max)
        if p_std <= 0:
            raise ConfigError(f"p_std={p_std} must be positive")
        self.low, self.high, self.p_mean, self.p_std = sigma_min, sigma_max, p_mean, p_std
        self.q_min, self.q_max = self._normal_cdf(torch.tensor([sigma_min, sigma_max], dtype=torch.float64)).tolist()
        if self.q_max - self.q_min < 1e-6:
            raise ConfigError(
                f"[{sigma_min}, {sigma_max}] holds a share of {self.q_max - self.q_min:.1e} of "
                f"N({p_mean}, {p_std}^2): move p_mean or widen the range"
            )

    def _normal_cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)

    def cdf(self, level: Tensor) -> Tensor:
        """Truncated normal distribution function of log sigma."""
        return ((self._normal_cdf(level) - self.q_min) / (self.q_max - self.q_min)).clamp(0, 1)

    def quantile(self, share: Tensor) -> Tensor:
        """exp(p_mean + p_std * Phi^-1(q))  # paper, section 3.2."""
        normal = torch.special.ndtri(self.q_min + share * (self.q_max - self.q_min))
        return (self.p_mean + self.p_std * normal).exp().clamp(self.low, self.high)


class LogUniform:
    """log sigma uniform on [log sigma_min, log sigma_max].

    Raises:
        ConfigError: the range is empty.
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        _check_range(sigma_min, sigma_max)
        self.low, self.high = sigma_min, sigma_max

    def cdf(self, level: Tensor) -> Tensor:
        """Share at or below `level`, which is linear in log sigma."""
        return ((level.log() - math.log(self.low)) / math.log(self.high / self.low)).clamp(0, 1)

    def quantile(self, share: Tensor) -> Tensor:
        """Level at a share: the geometric interpolation between both ends of the range."""
        return (self.low * (share * math.log(self.high / self.low)).exp()).clamp(self.low, self.high)


class Uniform:
    """Uniform on [0, 1]: masked shares under the linear schedule,
    where equal shares are equal decrements of alpha."""

    low, high = 0.0, 1.0

    def cdf(self, level: Tensor) -> Tensor:
        """The level itself."""
        return level.clamp(0, 1)

    def quantile(self, share: Tensor) -> Tensor:
        """The share itself."""
        return share.clamp(0, 1)


class Tabulated:
    """A measured distribution: its function at increasing levels, linear in log sigma between them.

    Args:
        levels: increasing sigmas, the first and last being the range.
        shares: as many numbers as levels, strictly increasing from 0 to 1.

    Raises:
        ConfigError: the table is not of that form.
    """

    def __init__(self, levels: Sequence[float], shares: Sequence[float]) -> None:
        rising = all(a < b for a, b in zip(levels, levels[1:], strict=False)) and all(
            a < b for a, b in zip(shares, shares[1:], strict=False)
        )
        if len(levels) != len(shares) or len(levels) < 2 or not rising or shares[0] != 0 or shares[-1] != 1:
            raise ConfigError(
                f"a table of {len(levels)} levels and {len(shares)} shares must rise strictly, the shares from 0 to 1"
            )
        _check_range(levels[0], levels[-1])
        self.low, self.high = levels[0], levels[-1]
        self.levels, self.shares = tuple(levels), tuple(shares)
        table = torch.tensor(levels, dtype=torch.float64).log(), torch.tensor(shares, dtype=torch.float64)
        self._tables = {table[0].device: table}

    def cdf(self, level: Tensor) -> Tensor:
        """Linear interpolation in log sigma."""
        logs, shares = self._table(level.device)
        return _interpolate(level.double().log(), logs, shares)

    def quantile(self, share: Tensor) -> Tensor:
        """Inverse of the interpolation."""
        logs, shares = self._table(share.device)
        return _interpolate(share.double(), shares, logs).exp().clamp(self.low, self.high)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logarithms of the levels, and the shares. A GPU gets them once: sending waits for its work."""
        if device not in self._tables:
            logs, shares = self._tables[torch.device("cpu")]
            self._tables[device] = logs.to(device), shares.to(device)
        return self._tables[device]


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    x = x.clamp(xs[0], xs[-1])
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


def read_distribution(spec: Mapping[str, Any]) -> LevelDistribution:
    """A level distribution from its description in run.json: `lognormal`, `loguniform` or `uniform`.

    Any other kind is taken for a table and must have `levels` and `shares`.

    Raises:
        ConfigError: its numbers make no distribution.
    """
    if spec["kind"] == "lognormal":
        return LogNormal(spec["p_mean"], spec["p_std"], spec["sigma_min"], spec["sigma_max"])
    if spec["kind"] == "loguniform":
        return LogUniform(spec["sigma_min"], spec["sigma_max"])
    if spec["kind"] == "uniform":
        return Uniform()
    return Tabulated(spec["levels"], spec["shares"])
