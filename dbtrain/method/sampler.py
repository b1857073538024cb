"""The sampler leads from noise to a prediction: Euler and Heun along falling levels, each of which goes to
the block that owns it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.interface import NoiseProcess
from dbtrain.method.levels import LevelDistribution
from dbtrain.method.ranges import Ranges

Solver = Literal["euler", "heun"]

Spacing = Literal["karras", "slices"]
"""`karras`: over the whole range, EDM's levels or what the noise process has instead; `slices`: as many
steps in every slice."""

Denoise = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(block, noisy (N, ...), level (N, *level_shape)) -> (raw output such as logits,
denoised estimate like `noisy`)."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a block along the chain."""

    block: int
    level: float
    output: Tensor
    """Raw output: logits or image."""
    denoised: Tensor
    noisy: Tensor
    """What the block was given."""


def schedule(ranges: Ranges, distribution: LevelDistribution | None, steps_per_block: int) -> list[float]:
    """Falling levels: in each slice its upper edge first, then equal shares of the distribution.

    Without a distribution a slice is cut geometrically. The lower end of the last slice is not in the list:
    after the last evaluation the prediction is the denoised estimate itself.
    """
    levels: list[float] = []
    for block in range(ranges.blocks):
        low, high = ranges.of(block)
        levels.append(high)
        parts = torch.arange(1, steps_per_block, dtype=torch.float64) / steps_per_block
        if distribution is None:
            levels += (high * (low / high) ** parts).tolist()
        else:
            q_low, q_high = distribution.cdf(torch.tensor([low, high], dtype=torch.float64))
            levels += distribution.quantile(q_high + parts * (q_low - q_high)).tolist()
    return levels


def karras_schedule(low: float, high: float, steps: int, rho: float = 7.0) -> list[float]:
    """Falling levels evenly spaced in sigma^(1/rho)  # EDM, eq. (5)."""
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    return ((high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist()


def spaced_levels(noise: NoiseProcess, ranges: Ranges, steps: int, spacing: Spacing) -> tuple[float, ...]:
    """Falling levels of `steps` evaluations from the top of the whole range.

    Raises:
        ConfigError: the steps cannot be shared by the slices.
    """
    if spacing == "karras":
        return tuple(noise.whole_schedule(ranges, steps))
    if steps % ranges.blocks:
        raise ConfigError(
            f"{steps} steps cannot be shared evenly by {ranges.blocks} slices: take a multiple of {ranges.blocks}, "
            "or the spacing karras"
        )
    return tuple(noise.schedule(ranges, steps // ranges.blocks))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: 1 is the conditional estimate,
    0 the unconditional  # Ho & Salimans 2022, eq. (6).

    Their w is `scale` - 1; a denoised estimate is linear in their score, so that the formula is the same.
    """
    return unconditional + scale * (conditional - unconditional)


def chain(
    denoise: Denoise,
    noise: NoiseProcess,
    ranges: Ranges,
    levels: Sequence[float],
    start: Tensor,
    solver: Solver = "euler",
    level_shape: tuple[int, ...] = (),
    draws: Draws | None = None,
) -> Iterator[Evaluation]:
    """Walk from `start` (N, ...) at ``levels[0]`` down the levels, yielding every evaluation.

    Levels have the shape (N, *level_shape). The last denoised estimate is the sample; for token ids it is
    their distribution, from which a step to level 0 draws. `draws` is the randomness of the steps, by default
    that of seed 0. Heun corrects a step by the slope at its end, which belongs to the next level's block;
    the last step is Euler, as in EDM, Algorithm 1.
    """
    noisy = start
    if draws is None:
        draws = Draws(torch.tensor(0, device=start.device), torch.arange(len(start), device=start.device))
    for index, value in enumerate(levels):
        level = torch.full((len(start), *level_shape), value, dtype=torch.float32, device=start.device)
        block = ranges.owner(value)
        output, denoised = denoise(block, noisy, level)
        found = [Evaluation(block, value, output, denoised, noisy)]
        del output  # a chain that waits for its next step does not keep it
        yield found.pop()
        if index + 1 == len(levels):
            return
        following = torch.full_like(level, levels[index + 1])
        proposal = noise.step(noisy, denoised, level, following, draws.fork(index))
        if solver == "heun":
            next_block = ranges.owner(levels[index + 1])
            _, corrected = denoise(next_block, proposal, following)
            # EDM, Algorithm 1, lines 7 and 8: the step with the mean of the slopes (z - D)/sigma at both ends
            shape = level.shape + (1,) * (start.ndim - level.ndim)
            end_step = ((following - level) / following).reshape(shape) * (proposal - corrected)
            proposal = noisy + 0.5 * ((proposal - noisy) + end_step)
        noisy = proposal
