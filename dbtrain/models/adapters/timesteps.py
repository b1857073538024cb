"""The steps of a DDPM: the sigma of each index, and the index of a sigma."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.parametrisation import Betas, VpEps, log_sigmas

KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
SCHEDULES = ("linear", "scaled_linear")


@dataclass(frozen=True)
class TimeSteps:
    """A schedule of betas, by the keys of diffusers' DDPMScheduler.

    Args:
        count: number of the steps.
        start, end: the first beta and the last.
        schedule: `linear` in beta, or `scaled_linear`, in its square root.
    """

    count: int = 1000
    start: float = 1e-4
    end: float = 0.02
    schedule: Betas = "linear"

    @staticmethod
    def of(value: Any) -> "TimeSteps":
        """Read the keys of a scheduler's configuration; keys other than `KEYS` are for sampling, and not
        read.

        Raises:
            ConfigError: the betas do not rise from above 0 to below 1, or the schedule is unknown.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"model.config.scheduler={value} must be keys of diffusers' DDPMScheduler: {', '.join(KEYS)}"
            )
        count, start, end = (value.get(k, d) for k, d in zip(KEYS, (1000, 1e-4, 0.02), strict=False))
        schedule = value.get(KEYS[3], "linear")
        if schedule not in SCHEDULES:
            raise ConfigError(
                f"model.config.scheduler.beta_schedule={schedule} is none of {', '.join(SCHEDULES)}: of others dbtrain "
                "does not know the sigmas"
            )
        if not (isinstance(count, int) and count > 1 and 0 < start < end < 1):
            raise ConfigError(
                f"model.config.scheduler: beta_start={start}, beta_end={end} and num_train_timesteps={count} must be "
                "betas that rise from above 0 to below 1, over at least 2 steps"
            )
        return TimeSteps(count, float(start), float(end), schedule)

    def sigmas(self) -> Tensor:
        """The sigma of each index, rising, (count,) float64."""
        return log_sigmas(self.schedule, self.start, self.end, self.count, torch.device("cpu")).exp()

    def index(self, level: Tensor) -> Tensor:
        """Index of each sigma (N,), between two steps by its logarithm; at most `count` - 1, at least 0."""
        return VpEps(steps=self.count, betas=self.schedule, beta_start=self.start, beta_end=self.end).time(level)
