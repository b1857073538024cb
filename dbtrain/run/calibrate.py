"""Choose the noise range from data: measure how much a noisy code decides of what the context leaves open.

A block must read its context; where the noisy code decides, a block learns to copy it, and the chain at
inference carries a guess and not the truth. So the range ends where the code decides a small share (5 %) of
what the context leaves open, and begins where it decides next to nothing (0.1 %). docs/benchmarks.md has the
figures behind both shares.

What pilots leave open is known from few answers where data is small. So the range is a mean, in log sigma, of
the measured one and a stated one, and the stated one counts as much as the measured one's standard error
makes it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.data.splits import DataSet
from dbtrain.method.draws import derive_seed
from dbtrain.run.information import decided, entropy, gained, levels_at
from dbtrain.run.pilot import PILOT_STEPS, PILOTS, Answers, ask_pilots
from dbtrain.telemetry.counting import Count, silent

LEAST_SHARE = 0.001
GREATEST_SHARE = 0.05
"""Budgets chosen on Fashion-MNIST's validation split among 5, 10 and 30 %; not derived optima."""

GRID = (0.05, 100.0, 77)
STATED_TARGETS = 4
"""The stated range is made for a context that leaves this many equally likely targets open."""
STATED_ERROR = 0.25
"""How far the ranges of data sets lie from the stated one, as a standard deviation in log sigma. For two
equally likely targets the range is 1.16 times the stated one, for 27 targets 0.74 times."""
LEAST_WRONG = 4
"""Number of wrong answers that the pilots must at least expect. From fewer one cannot tell how what the
context leaves open is distributed."""
GROUPS = 16
"""Groups of samples, each left out once to see how much the range depends on it."""
SURE_WEIGHT = 0.5
"""The user is warned if what was measured has less weight than this."""


@dataclass(frozen=True)
class Measure:
    """Levels at which a code decides some shares, as measured."""

    logs: Tensor
    """(m,) log sigma."""
    error: float
    """Standard error of the worst of them; infinite where nothing could be measured."""

    @property
    def weight(self) -> float:
        """Weight of the measured levels beside the stated ones, which follows from the precisions of both."""
        return STATED_ERROR**2 / (STATED_ERROR**2 + self.error**2)


def calibrate(config: Config, data: DataSet, codebook: Tensor, count: Count = silent) -> Mapping[str, Any]:
    """A level distribution for run.json, under the policies ``calibrated`` and ``equal_information``.

    `calibrated` is log-uniform between the levels at which the code decides 0.1 % and 5 %, so that equal
    shares of it are slices of equal log width. `equal_information` spreads the levels so that every block
    decides an equal share of everything, from 0.1 % to 99.9 %.

    Its key ``calibration`` has the measured curve, what was measured and stated, the weight of what was
    measured, and the standard error of the ends, in log sigma. Where nothing could be measured, the stated
    range stands.
    """
    answers = ask_pilots(config, data, codebook, count)
    shares = _shares(config.noise.ranges == "equal_information")
    levels = torch.logspace(math.log10(GRID[0]), math.log10(GRID[1]), int(GRID[2]), dtype=torch.float64)
    seed, codes = derive_seed(config.seed, "calibration"), codebook.double()
    gains = gained(answers.probabilities, codes, levels, seed)
    found = measure(answers, gains, levels, shares)
    stated = levels_at(levels, decided(gained(even_contexts(len(codes)), codes, levels, seed)), shares).log()
    logs = found.weight * found.logs + (1 - found.weight) * stated if found.weight else stated
    ends = logs.exp().tolist()
    facts = {
        "levels": levels.tolist(),
        "decided": decided(gains).tolist() if found.weight else None,
        "left_open_nats": float(entropy(answers.probabilities).mean()),
        "pilots": PILOTS,
        "answers": len(answers.probabilities),
        "expected_wrong": expected_wrong(answers.probabilities),
        "measured": [math.exp(float(found.logs[at])) for at in (0, -1)] if found.weight else None,
        "stated": [math.exp(float(stated[at])) for at in (0, -1)],
        "weight": found.weight,
        "standard_error": math.sqrt(found.weight) * found.error if found.weight else STATED_ERROR,
    }
    if len(shares) == 2:
        return {"kind": "loguniform", "sigma_min": ends[0], "sigma_max": ends[-1], "calibration": facts}
    left = 1 - shares
    table = ((left - left[0]) / (left[-1] - left[0])).tolist()
    return {"kind": "table", "levels": ends, "shares": table, "calibration": facts}


def _shares(all_of_them: bool) -> Tensor:
    """Falling shares whose levels are wanted: the two ends, or many between nearly all and nearly nothing."""
    if not all_of_them:
        return torch.tensor([GREATEST_SHARE, LEAST_SHARE], dtype=torch.float64)
    end = math.log((1 - LEAST_SHARE) / LEAST_SHARE)
    return torch.linspace(end, -end, 61, dtype=torch.float64).sigmoid()


def measure(answers: Answers, gains: Tensor, levels: Tensor, shares: Tensor) -> Measure:
    """The levels (m,) of `shares` (m,) and their standard error, from the answers' gains (n, L).

    The error is made of two variances, which are added: that of the samples, found by leaving out one group
    of them at a time (the jackknife), and that of the pilots, found from how their ranges differ. The
    second contains a part of the first, so the sum is rather too large than too small.
    """

    def logs(rows: Tensor) -> Tensor:
        return levels_at(levels, decided(gains[rows]), shares).log()

    groups = answers.sample % GROUPS
    present = sorted(set(groups.tolist()))
    if len(present) < 2 or expected_wrong(answers.probabilities) < LEAST_WRONG:
        return Measure(torch.full_like(shares, math.nan), math.inf)
    whole = logs(torch.ones_like(groups, dtype=torch.bool))
    without = torch.stack([logs(groups != group) for group in present])
    # Efron & Tibshirani 1993, eq. (11.5)
    samples = (len(present) - 1) * without.var(dim=0, correction=0)
    pilots = torch.stack([logs(answers.pilot == number) for number in range(PILOTS)]).var(dim=0) / PILOTS
    error = float((samples + pilots).max().sqrt())
    return Measure(whole, error if math.isfinite(error) else math.inf)


def expected_wrong(probabilities: Tensor) -> float:
    """Answers of (n, V) that their own probabilities expect to be wrong."""
    return float((1 - probabilities.max(dim=-1).values).sum())


def even_contexts(targets: int, count: int = 64) -> Tensor:
    """(count, V) float64: contexts that leave `STATED_TARGETS` of V targets open, equally likely."""
    open_ = min(STATED_TARGETS, targets)
    generator = torch.Generator().manual_seed(derive_seed("stated range"))
    picks = torch.stack([torch.randperm(targets, generator=generator)[:open_] for _ in range(count)])
    return torch.zeros(count, targets, dtype=torch.float64).scatter(1, picks, 1 / open_)


def described(distribution: Mapping[str, Any]) -> list[str]:
    """Lines on where a range comes from and how sure it is; none if it was not measured."""
    facts = distribution.get("calibration", {})
    if "standard_error" not in facts:
        return []
    ends = distribution["levels"] if distribution["kind"] == "table" else ()
    low, high = (ends[0], ends[-1]) if ends else (distribution["sigma_min"], distribution["sigma_max"])
    error = 100 * math.expm1(facts["standard_error"])
    lines = [
        f"calibrated range: sigma {low:.3g} to {high:.3g}, each end within {error:.2g} % (one standard error); "
        f"{facts['answers']} answers of {facts['pilots']} pilots, which leave {facts['left_open_nats']:.2g} nats open"
    ]
    if facts["weight"] < SURE_WEIGHT:
        first, last = facts["stated"]
        lines.append(
            f"warning: the data says little about the range (weight {facts['weight']:.2f} of 1), so it is mostly the "
            f"stated one, sigma {first:.3g} to {last:.3g}, of a context that leaves {STATED_TARGETS} targets equally "
            "likely; to choose another, set noise.ranges=uniform with noise.sigma_min and noise.sigma_max"
        )
    return lines


def announced(
    tell: Callable[[str], None], then: str, count: Count = silent
) -> Callable[[Config, DataSet, Tensor], Mapping[str, Any]]:
    """`calibrate` that first tells what will take a while and what becomes of it, and counts its steps."""

    def tell_and_calibrate(config: Config, data: DataSet, codebook: Tensor) -> Mapping[str, Any]:
        size = f"{PILOTS} pilots, {PILOT_STEPS} steps of one layer each; about a minute on a CPU"
        tell(f"training the pilots that calibrate the range ({size}); {then}")
        return calibrate(config, data, codebook, count)

    return tell_and_calibrate
