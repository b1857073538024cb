"""Whether weights that fit a model by name and shape also mean the same in it as where they were trained."""

from typing import Any

from torch import Tensor

from dbtrain.config import Config, parse_config
from dbtrain.errors import ConfigError
from dbtrain.method.content import tensor_hash
from dbtrain.run.plan import RunPlan
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.manifest import MANIFEST

SCALES = ("process", "sigma_data", "input_scaling")
"""Keys of the section noise that say what a network is given."""


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
    differing = _differing(_scales(there), _scales(here))
    if not differing:
        return ()
    ours = _scales(here)
    told = ", ".join(f"{key}={value} (here {ours.get(key)})" for key, value in differing)
    return (f"init.from={source.asked} was trained with {told}: the same weights may mean something else here",)


def _config(source: WeightSource) -> Config | None:
    if source.manifest is None:
        return None
    return parse_config(dict(source.manifest.config), f"{MANIFEST} of {source.asked}")


def _codebook(config: Config) -> dict[str, Any]:
    return {f"codebook.{key}": value for key, value in config.codebook.model_dump().items()}


def _scales(config: Config) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in config.model.model_dump().items() if key != "depth"}
    return {**model, **{f"noise.{key}": getattr(config.noise, key) for key in SCALES}}


def _differing(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in there.items() if here.get(key) != value]
