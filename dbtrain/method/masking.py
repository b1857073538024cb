"""Masking: tokens are hidden instead of blurred (MD4, Shi et al.
2024; MDLM, Sahoo et al. 2024), linear schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import LEVEL_STREAM, NOISE_STREAM
from dbtrain.method.interface import Example, Noised, NoiseSettings, Target
from dbtrain.method.levels import Uniform
from dbtrain.method.ranges import Ranges, equal_shares
from dbtrain.method.sampler import schedule

TOKEN_STREAM = 2
"""Stream of the draws that picks the tokens which a step reveals."""


class MaskingNoise:
    """Each token is replaced by the mask with probability t = 1 - alpha, independently  # MD4, section 2.

    The level is t, the expected masked share: 1 hides all, 0 nothing. `denoised` is,
    for each position, a distribution over the tokens, and a step draws from it.

    The ELBO is an integral over t. At level t about t L tokens are masked, each with the weight 1/t, so that
    the estimate has a variance of about L/t. The best density of levels for such a variance is
    1/(2 sqrt(t)): it halves the gradient noise of the block with the least masked slice. The weight divides
    by the density, so that the expected loss is still the ELBO.

    Args:
        mask: id of the mask, the first after the vocabulary.
    """

    level_name = "masked share"
    noises: Noised = "tokens"
    policies = ("alpha", "explicit")
    own_settings: tuple[str, ...] = ()
    parametrisations: Mapping[str, str] = {}

    def __init__(self, mask: int) -> None:
        self.mask = mask

    @staticmethod
    def plan(settings: NoiseSettings, target: Target, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Uniform masked shares, of which equal parts are equal decrements of alpha."""
        if settings.ranges not in MaskingNoise.policies:
            raise ConfigError(
                f"noise.ranges={settings.ranges} is for Gaussian noise, and {target.arch} masks tokens: set "
                "noise.ranges=alpha for equal decrements of alpha, or explicit with noise.edges from 1 down to 0"
            )
        if settings.edges and (settings.edges[0] != 1 or settings.edges[-1] != 0):
            raise ConfigError(f"noise.edges={list(settings.edges)} are masked shares: they must fall from 1 to 0")
        if settings.weighting != "none":
            raise ConfigError(
                f"noise.weighting={settings.weighting} is for Gaussian noise; the masked ELBO has its own: none"
            )
        return {"kind": "uniform"}

    @staticmethod
    def make(spec: Mapping[str, Any], settings: NoiseSettings, target: Target) -> "MaskingNoise":
        """The mask is the first id after the data's vocabulary."""
        return MaskingNoise(mask=target.shape["vocabulary"])

    def level_shape(self, example: Example) -> tuple[int, ...]:
        """(): one level a sample."""
        return ()

    def draw_uniforms(self, example: Example, draws: Draws) -> Tensor:
        """Uniforms (N,) spread evenly over the batch, because the loss varies with the level  # MDLM,
        appendix (low discrepancy)."""
        return draws.spread(LEVEL_STREAM)

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training levels at or below t, sqrt(t)."""
        return level.double().clamp(0, 1).sqrt()

    def split(self, blocks: int) -> Ranges:
        """Slices with equal decrements of alpha."""
        return equal_shares(Uniform(), blocks)

    def schedule(self, ranges: Ranges, steps_per_block: int) -> list[float]:
        """Levels with equal decrements of alpha within each slice."""
        return schedule(ranges, Uniform(), steps_per_block)

    def whole_schedule(self, ranges: Ranges, steps: int) -> list[float]:
        """Levels with equal decrements of alpha; the last is one above 0, where nothing is masked."""
        return [(steps - step) / steps for step in range(steps)]

    def in_other_terms(self, low: float, high: float) -> str:
        """An empty string: there are no other terms."""
        return ""

    def quantile(self, share: Tensor) -> Tensor:
        """Masked shares at these quantiles of the training distribution, t = q^2; float32, same shape."""
        return share.double().square().float()

    def corrupt(self, clean: Tensor, level: Tensor, draws: Draws) -> Tensor:
        """(N, L) token ids with the mask in about a share `level` of the places."""
        hidden = draws.uniform(tuple(clean.shape[1:]), NOISE_STREAM) < level[:, None]
        return clean.masked_fill(hidden, self.mask)

    def weight(self, level: Tensor) -> Tensor:
        """2/sqrt(t), which is the weight of the ELBO divided by the density with which levels are drawn.

        The weight is -alpha'/(1 - alpha) = 1/t  # MD4, eq. (4); the density is 1/(2 sqrt(t)).
        """
        return 2 * level.rsqrt()

    def prior(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """(N, *shape) masks."""
        return torch.full((len(draws.positions), *shape), self.mask, device=draws.positions.device)

    def centre(self, prior: Tensor) -> Tensor:
        """The masks themselves: nothing about them is random."""
        return prior

    def step(self, noisy: Tensor, denoised: Tensor, level: Tensor, next_level: Tensor, draws: Draws) -> Tensor:
        """Ancestral step from t to s: a mask is revealed with probability (t - s)/t  # MDLM, eq. (6).

        Args:
            noisy: (N, L) token ids.
            denoised: (N, L, V) probabilities.
            level, next_level: (N,) t and s; s = 0 reveals all that is left.
        """
        reveal = draws.uniform(tuple(noisy.shape[1:]), NOISE_STREAM) < (1 - next_level / level)[:, None]
        picks = draws.uniform(tuple(noisy.shape[1:]), TOKEN_STREAM)[..., None]
        # inverse distribution function; scaled by the last sum, which rounding may leave below 1
        sums = denoised.double().cumsum(dim=-1)
        tokens = (sums <= picks * sums[..., -1:]).sum(dim=-1)
        return torch.where((noisy == self.mask) & reveal, tokens, noisy)
