"""Choose the noise range from data: measure how much a noisy code decides of what the context leaves open.

A block must read its context; where the noisy code decides, a block learns to copy it, and the chain at inference
carries a guess and not the truth. So the range ends where the code decides a small share (5 %) of what the context
leaves open, and begins where it decides next to nothing (0.1 %). docs/benchmarks.md has the figures behind both shares.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dbtrain.config import Config
from dbtrain.data.order import EpochOrder
from dbtrain.data.splits import DataSet, Split
from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.gaussian import NoNoise
from dbtrain.method.interface import BlockModel
from dbtrain.method.parametrisation import Unseen
from dbtrain.models.registry import architecture

LEAST_SHARE = 0.001
GREATEST_SHARE = 0.05
"""Budgets chosen on Fashion-MNIST's validation split among 5, 10 and 30 %; not derived optima."""

GRID = (0.05, 100.0, 77)
PILOT_STEPS = 400
PILOT_BATCH = 128
PILOT_LR = 1e-3
CURVE_SAMPLES = 2048
POSITIONS = 16
"""Positions of a text that are looked at: many texts with a few each tell more than few texts whole."""
PREDICT_BATCH = 256


def calibrate(config: Config, data: DataSet, codebook: Tensor) -> Mapping[str, Any]:
    """A level distribution for run.json, under the policies ``calibrated`` and ``equal_information``.

    `calibrated` is log-uniform between the levels at which the code decides 0.1 % and 5 %, so that equal shares of it
    are slices of equal log width. `equal_information` spreads the levels so that every block decides an equal share of
    everything, from 0.1 % to 99.9 %.
    """
    probabilities = pilot(config, data, codebook)
    levels = torch.logspace(math.log10(GRID[0]), math.log10(GRID[1]), int(GRID[2]), dtype=torch.float64)
    shares = decided(probabilities, codebook.double(), levels, derive_seed(config.seed, "calibration"))
    nats = float(entropy(probabilities).mean())
    curve = {"levels": levels.tolist(), "decided": shares.tolist(), "left_open_nats": nats}
    high = level_at(levels, shares, LEAST_SHARE)
    if config.noise.ranges == "equal_information":
        return {**_information_table(levels, shares, high), "calibration": curve}
    low = level_at(levels, shares, GREATEST_SHARE)
    return {"kind": "loguniform", "sigma_min": low, "sigma_max": high, "calibration": curve}


def _information_table(levels: Tensor, shares: Tensor, high: float) -> dict[str, Any]:
    low = level_at(levels, shares, 1 - LEAST_SHARE)
    inner = [(float(v), 1 - float(s)) for v, s in zip(levels, shares, strict=True) if low < v < high]
    points = [(low, LEAST_SHARE), *inner, (high, 1 - LEAST_SHARE)]
    rising = [points[0]]
    for level, left in points[1:]:
        if left > rising[-1][1]:  # Monte Carlo noise can make the curve flat
            rising.append((level, left))
    first, last = rising[0][1], rising[-1][1]
    table = [(left - first) / (last - first) for _, left in rising]
    return {"kind": "table", "levels": [level for level, _ in rising], "shares": [0.0, *table[1:-1], 1.0]}


def announced(tell: Callable[[str], None], then: str) -> Callable[[Config, DataSet, Tensor], Mapping[str, Any]]:
    """`calibrate` that first tells what will take a while, and what becomes of it."""

    def tell_and_calibrate(config: Config, data: DataSet, codebook: Tensor) -> Mapping[str, Any]:
        size = f"{PILOT_STEPS} steps of one layer; about a minute on a CPU"
        tell(f"training the pilot that calibrates the range ({size}); {then}")
        return calibrate(config, data, codebook)

    return tell_and_calibrate


def pilot(config: Config, data: DataSet, codebook: Tensor) -> Tensor:
    """p(y|x) (n, V) float64 of a one-layer network that sees the context alone, on held-out samples or positions.

    The temperature is fitted on the same samples: an over-confident pilot would claim that nothing is left to decide.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _train_pilot(config, data, codebook.to(device), device)
    logits, target = _predict(model, data.validation, device)
    return (logits / temperature(logits, target)).softmax(dim=-1)


def _train_pilot(config: Config, data: DataSet, codebook: Tensor, device: torch.device) -> BlockModel:
    kind = architecture(config.model.arch)
    arguments = {**config.model.model_dump(exclude={"arch"}), "depth": 1}
    arguments |= {name: data.shape[name] for name in kind.takes}
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "pilot"))
        model = kind(noise=NoNoise(kind.per_position), parametrisation=Unseen(), codebook=codebook, **arguments).to(
            device
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=PILOT_LR)
        size = min(PILOT_BATCH, config.training.batch_size)
        order = EpochOrder(len(data.train), size, derive_seed(config.seed, "pilot order"))
        for step in range(PILOT_STEPS):
            batch = data.train.batch(order.indices(step, range(size)), device)
            output, target = _output(model, batch)
            loss = functional.cross_entropy(output.flatten(0, -2), target.flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval()


def _output(model: BlockModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    example = model.example(batch)
    level = torch.ones(len(example.clean), *model.noise.level_shape(example), device=example.clean.device)
    nothing = torch.zeros_like(example.clean)
    return model.predict(range(1), nothing, level, example.context), example.target


@torch.no_grad()
def _predict(model: BlockModel, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and targets (n,) of about `CURVE_SAMPLES` samples, or of some positions of fewer texts."""
    length = _output(model, split.batch(torch.arange(1), device))[1].numel()
    each = min(POSITIONS, length)
    picked = ((torch.arange(each) + 0.5) * length / each).long().to(device)
    count = min(CURVE_SAMPLES // each, len(split))
    parts = []
    for start in range(0, count, PREDICT_BATCH):
        indices = torch.arange(start, min(start + PREDICT_BATCH, count))
        logits, target = _output(model, split.batch(indices, device))
        own = logits.reshape(len(indices), length, -1)[:, picked], target.reshape(len(indices), length)[:, picked]
        parts.append((own[0].flatten(0, 1).double().cpu(), own[1].flatten().cpu()))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature of a grid that gives the least cross-entropy."""
    grid = torch.logspace(-1, 1, 81, dtype=torch.float64).tolist()
    return min(grid, key=lambda t: float(functional.cross_entropy(logits / t, target)))


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy (n,) of (n, V), in nats."""
    return torch.special.entr(probabilities).sum(dim=-1)


def decided(probabilities: Tensor, codebook: Tensor, levels: Tensor, seed: int) -> Tensor:
    """Share (levels,) of what the context leaves open that a code at each noise level decides: 1 - H(y|x,z)/H(y|x).

    The posterior p(y|x,z) is exact given p(y|x), because the noise is Gaussian: no denoiser is trained. The same
    targets and noise are used at all levels, so that the curve is smooth.

    Args:
        probabilities: p(y|x) (n, V) float64.
        codebook: (V, D) float64.
        levels: (L,) sigmas.
    """
    count = len(probabilities)
    draws = Draws(torch.tensor(seed), torch.arange(count))
    picks = draws.uniform((), 0).double()[:, None]
    target = (probabilities.cumsum(dim=-1) < picks).sum(dim=-1).clamp(max=probabilities.shape[1] - 1)
    noise = draws.normal((codebook.shape[1],), 1).double()
    agreement = codebook[target] @ codebook.T - 0.5 * (codebook**2).sum(dim=-1)
    disturbance = noise @ codebook.T
    prior = probabilities.clamp_min(1e-300).log()
    left = [entropy((prior + agreement / s**2 + disturbance / s).softmax(dim=-1)).mean() for s in levels.tolist()]
    return 1 - torch.stack(left) / entropy(probabilities).mean()


def level_at(levels: Tensor, shares: Tensor, share: float) -> float:
    """The level at which a code decides `share`, by interpolating log level on the share.

    Raises:
        ConfigError: the curve does not reach it.
    """
    falling = torch.cummin(shares, dim=0).values
    above = int((falling >= share).sum())
    if not 0 < above < len(levels):
        raise ConfigError(
            f"calibration: no level between {GRID[0]} and {GRID[1]} decides a share of {share}; the pilot finds "
            "nothing left to decide: choose noise.ranges=uniform with noise.sigma_min and noise.sigma_max"
        )
    high, low = float(falling[above - 1]), float(falling[above])
    part = (high - share) / (high - low)
    return float(levels[above - 1] ** (1 - part) * levels[above] ** part)
