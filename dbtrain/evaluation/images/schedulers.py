"""Steps of a sampler by a scheduler of diffusers instead of a solver of our own.

The levels are ours, and so is the choice of a block, made in float64 before a scheduler sees a level. The
scheduler is told the levels in its own terms and gets the denoised estimate in the form that it expects.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.errors import ConfigError
from dbtrain.method.parametrisation import expand
from dbtrain.method.ranges import Ranges
from dbtrain.method.sampler import Denoise, Evaluation


@dataclass(frozen=True)
class Terms:
    """What our levels and noisy samples are in a scheduler's terms."""

    level: Callable[[float], float]
    """Our level -> the scheduler's sigma."""
    scale: Callable[[float], float]
    """Factor of our noisy sample at a level, which makes it the scheduler's."""


SAME = Terms(lambda level: level, lambda level: 1.0)
VARIANCE_PRESERVING = Terms(lambda sigma: sigma, lambda sigma: (1 + sigma**2) ** -0.5)
"""(y + sigma eps)/sqrt(1 + sigma^2)  # EDM, Table 1 (VP)"""
AS_FLOW = Terms(lambda sigma: sigma / (1 + sigma), lambda sigma: 1 / (1 + sigma))
"""(1 - t) y + t eps with t = sigma/(1 + sigma); an Euler step in t is one in sigma."""


@dataclass(frozen=True)
class Row:
    """One class of diffusers that keeps its levels in `sigmas`, evaluates once a step, and draws no noise."""

    module: str
    gaussian: Terms | None
    """The scheduler's terms for Gaussian noise, z = y + sigma eps; None where it does not fit."""
    flow: Terms | None
    """The scheduler's terms for a flow, z = (1 - t) y + t eps; None where it does not fit."""
    settings: Mapping[str, Any]
    """Arguments of its constructor."""
    velocity: bool = False
    """Whether it takes the velocity eps - y instead of an estimate of y."""


SCHEDULERS: Mapping[str, Row] = {
    "FlowMatchEulerDiscreteScheduler": Row("scheduling_flow_match_euler_discrete", AS_FLOW, SAME, {}, velocity=True),
    "EulerDiscreteScheduler": Row("scheduling_euler_discrete", SAME, None, {"prediction_type": "sample"}),
    "DPMSolverMultistepScheduler": Row(
        "scheduling_dpmsolver_multistep", VARIANCE_PRESERVING, SAME, {"prediction_type": "sample"}
    ),
    "UniPCMultistepScheduler": Row(
        "scheduling_unipc_multistep", VARIANCE_PRESERVING, SAME, {"prediction_type": "sample"}
    ),
}
"""Schedulers by the name of their class, which `evaluation.solver` gives."""


def check_solver(solver: str, process: str) -> None:
    """Refuse a scheduler that does not fit a noise process, or whose package is missing.

    Raises:
        ConfigError: one of these is so.
    """
    row = SCHEDULERS.get(solver)
    if row is None:  # a solver of our own
        return
    if _terms(row, process) is None:
        able = [name for name, other in SCHEDULERS.items() if _terms(other, process)]
        raise ConfigError(f"solver {solver} does not fit noise.process={process}: take {', '.join(able) or 'euler'}")
    _class(solver)


def check_config(config: Config) -> None:
    """`check_solver` of a configuration's `evaluation.solver`."""
    check_solver(config.evaluation.solver, config.noise_process)


def scheduled_chain(
    denoise: Denoise, process: str, ranges: Ranges, levels: Sequence[float], start: Tensor, solver: str
) -> Iterator[Evaluation]:
    """Walk down the levels by a scheduler's steps, yielding every evaluation, as `chain` does.

    Args:
        denoise: asks a block for its output and estimate.
        process: name of the noise process.
        ranges: which block owns a level.
        levels: falling levels, which replace those that the scheduler would choose.
        start: (N, ...) noisy samples at the first level.
        solver: name of a row of `SCHEDULERS`.
    """
    row = SCHEDULERS[solver]
    terms = _terms(row, process)
    assert terms is not None, "check_solver lets no other pass"
    scheduler = _prepared(row, _class(solver), process, [terms.level(level) for level in levels], start.device)
    theirs = start * terms.scale(levels[0])
    for index, value in enumerate(levels):
        level = torch.full((len(start),), value, dtype=torch.float32, device=start.device)
        noisy = theirs / terms.scale(value) if terms is not SAME else theirs
        block = ranges.owner(value)
        output, denoised = denoise(block, noisy, level)
        yield Evaluation(block, value, output, denoised, noisy)
        if index + 1 == len(levels):
            return
        sigma = expand(torch.full_like(level, terms.level(value)), theirs)
        given = (theirs - denoised) / sigma if row.velocity else denoised
        theirs = scheduler.step(given, scheduler.timesteps[index], theirs, return_dict=False)[0]


def _prepared(row: Row, kind: Any, process: str, sigmas: Sequence[float], device: torch.device) -> Any:
    """A scheduler at its first step, with these sigmas and 0 behind them in place of its own."""
    flow = {"use_flow_sigmas": True} if process == "flow" and not row.velocity else {}
    scheduler = kind(**row.settings, **flow)
    scheduler.set_timesteps(len(sigmas), device=device)
    scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)
    # only their order counts; they are floats, because the scheduler takes whole numbers for indices
    scheduler.timesteps = torch.arange(len(sigmas), 0, -1, dtype=torch.float32, device=device)
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True  # our networks scale their input themselves
    return scheduler


def _terms(row: Row, process: str) -> Terms | None:
    """The scheduler's terms for a noise process; None for a process that it does not know."""
    return {"gaussian": row.gaussian, "flow": row.flow}.get(process)


def _class(solver: str) -> Any:
    try:
        module = importlib.import_module(f"diffusers.schedulers.{SCHEDULERS[solver].module}")
    except ImportError as error:
        raise ConfigError(
            f"solver {solver} needs the extra packages of dbtrain[diffusers] ({error}): install them, or take euler or "
            "heun"
        ) from error
    return getattr(module, solver)
