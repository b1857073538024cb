"""Whether weights that fit a model by name and shape also mean the same in it as where they were trained."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dbtrain.config import Config, parse_config
from dbtrain.errors import ConfigError
from dbtrain.method.content import tensor_hash
from dbtrain.method.parametrisation import default_sigma_data
from dbtrain.models.registry import architecture
from dbtrain.run.plan import RunPlan, level_name
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.manifest import MANIFEST, Manifest

APART = 0.05
"""Share of the (log) range by which the ends of slices differ before that is told: two pilots on like data
do not measure the same range to the last digit."""
MOST_EDGES = 8
"""Ends of slices that are written one by one; of more the first and the last."""


def codes_of(source: WeightSource | None, config: Config) -> Tensor | None:
    """The codebook (V, D) that a run has from its source, None where it makes its own.

    A stem has learned to read the codes that it was trained with, so a run goes on with those codes, whatever
    its seed.

    Raises:
        ConfigError: the run asks for codes that are made in another way; the message says what to set.
    """
    there = source and _config(source)
    if not source or not there or source.codebook is None:
        return None
    differing = _differing(_codebook(there), _codebook(config))
    if differing:
        raise ConfigError(
            f"the weights of init.from={source.asked} were trained with another codebook than this run asks for: set "
            f"{', '.join(f'{key}={value}' for key, value in differing)}, or start from other weights"
        )
    return source.codebook


def check_codebook(run_plan: RunPlan, source: WeightSource) -> None:
    """Refuse a source that names another codebook than the run's.

    Raises:
        ConfigError: it does, which can happen with a shard outside of its run.
    """
    if run_plan.codebook is None or source.codebook_hash in ("", tensor_hash(run_plan.codebook)):
        return
    raise ConfigError(
        f"the weights of init.from={source.asked} were trained with another codebook than this run makes: start from "
        "their run or its merged model, which have it, or set seed and the section codebook as they were there"
    )


def notes(run_plan: RunPlan, source: WeightSource) -> tuple[str, ...]:
    """What people should know of a source that can be taken, as lines."""
    early = f"init.from={source.asked} is a model whose blocks were not done: {source.progress}"
    return (*([early] if source.progress else []), *_differences(run_plan, source))


def _differences(run_plan: RunPlan, source: WeightSource) -> tuple[str, ...]:
    """What differs without being wrong; none where the source tells nothing to compare."""
    there, here = _config(source), run_plan.config
    if source.originals:  # another library's network has seen no code
        return ()
    if there is None:
        if run_plan.codebook is None or source.codebook_hash:
            return ()
        return (f"init.from={source.asked} does not tell its codebook: with other codes than its own it starts badly",)
    usual = default_sigma_data(None if run_plan.codebook is None else run_plan.codebook.shape[1])
    ours = _scales(here, usual)
    told = [f"{key}={value} (here {ours.get(key)})" for key, value in _differing(_scales(there, usual), ours)]
    if source.manifest is not None and there.noise_process == here.noise_process:
        told += _other_levels(source.manifest, run_plan)
    if not told:
        return ()
    return (
        f"init.from={source.asked} was trained with {', '.join(told)}: the same weights may mean something else here",
    )


def _other_levels(there: Manifest, run_plan: RunPlan) -> list[str]:
    """The levels that the source was trained at, where they are others than the run's; with as many blocks
    those of each slice, and otherwise both ends of the range."""
    noise, unseen = run_plan.noise(), there.noise["kind"] == "none"
    here = run_plan.ranges.edges
    if unseen or run_plan.distribution["kind"] == "none":
        if unseen and run_plan.distribution["kind"] == "none":
            return []
        levels = "no noise" if unseen else _levels(level_name(there), _edges(there))
        return [f"{levels} (here {_levels(noise.level_name, here) if unseen else 'no noise'})"]
    theirs = _edges(there)
    if len(theirs) != len(here):
        theirs, here = (theirs[0], theirs[-1]), (here[0], here[-1])
    if not _apart(theirs, here):
        return []
    return [f"{_levels(noise.level_name, theirs)} (here {_written(here)})"]


def _edges(manifest: Manifest) -> tuple[float, ...]:
    """Falling ends of the slices of a run."""
    rows = manifest.slices or manifest.plan
    return tuple(float.fromhex(end) for end in (*(row.levels[1] for row in rows), rows[-1].levels[0]))


def _apart(theirs: Sequence[float], here: Sequence[float]) -> bool:
    """Whether two lists of as many ends differ by more than `APART` of the range, in ln(level) where no end
    is 0."""
    log = min(*theirs, *here) > 0
    one, two = ([math.log(end) for end in ends] if log else list(ends) for ends in (theirs, here))
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) > APART * abs(one[0] - one[-1])


def _levels(name: str, edges: Sequence[float]) -> str:
    return f"{name} {_written(edges)}"


def _written(edges: Sequence[float]) -> str:
    shown = edges if len(edges) <= MOST_EDGES else (edges[0], edges[-1])
    return " to ".join(f"{edge:.4g}" for edge in shown)


def _config(source: WeightSource) -> Config | None:
    if source.manifest is None:
        return None
    return parse_config(dict(source.manifest.config), f"{MANIFEST} of {source.asked}")


def _codebook(config: Config) -> dict[str, Any]:
    return {f"codebook.{key}": value for key, value in config.codebook.model_dump().items()}


def _scales(config: Config, usual: float) -> dict[str, Any]:
    """What says how a network is given its input, and what its output means.

    Args:
        config: a run's.
        usual: `noise.sigma_data` where the section does not have it.
    """
    noise = {"process": config.noise_process, "input_scaling": config.noise.input_scaling}
    noise["sigma_data"] = f"{config.noise.sigma_data or usual:.4g}"
    return {**_network(config), **{f"noise.{key}": value for key, value in noise.items()}}


def _network(config: Config) -> dict[str, Any]:
    """The section `model` by its keys, and by those of another library's settings, but for the number of
    layers: what every block starts from (`init.layers=repeat`) is a network of another depth."""
    stack = architecture(config.model.arch).stack
    depth = {"depth", stack.depth_key if stack else ""}
    told: dict[str, Any] = {}
    for key, value in config.model.model_dump().items():
        told |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return {f"model.{key}": value for key, value in told.items() if key.rpartition(".")[2] not in depth}


def _differing(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, there.get(key)) for key in {**there, **here} if there.get(key) != here.get(key)]
