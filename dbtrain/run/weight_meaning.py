"""Whether weights that fit a model by name and shape also mean there what they meant where they were trained."""

from typing import Any

from dbtrain.config import Config, parse_config
from dbtrain.errors import ConfigError
from dbtrain.method.content import tensor_hash
from dbtrain.run.plan import RunPlan
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.manifest import MANIFEST

SCALES = ("process", "sigma_data", "input_scaling")
"""Keys of the section noise that say what a network is given."""


def check_codebook(run_plan: RunPlan, source: WeightSource) -> None:
    """Refuse a source that was trained with other codes than the run has made.

    Raises:
        ConfigError: with what to set.
    """
    if run_plan.codebook is None or source.codebook_hash in ("", tensor_hash(run_plan.codebook)):
        return
    there = _config(source)
    told = (
        "what the codebook was made from there (seed, the section codebook, and with codebook.source=corpus the data)"
    )
    if there is not None:
        told = ", ".join(f"{key}={value}" for key, value in _differing(_made_from(there), _made_from(run_plan.config)))
        told = told or "the data that it was made from there"
    raise ConfigError(
        f"the weights of init.from={source.asked} were trained with another codebook than this run makes, and would "
        f"mistake each code for another: set {told}, or start from other weights"
    )


def notes(run_plan: RunPlan, source: WeightSource) -> tuple[str, ...]:
    """What differs without being wrong, one line for each kind; nothing where the source tells nothing to compare."""
    there, here = _config(source), run_plan.config
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


def _made_from(config: Config) -> dict[str, Any]:
    codebook = config.codebook
    return {"seed": config.seed, "codebook.source": codebook.source, "codebook.dim": codebook.dim}


def _scales(config: Config) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in config.model.model_dump().items() if key != "depth"}
    return {**model, **{f"noise.{key}": getattr(config.noise, key) for key in SCALES}}


def _differing(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in there.items() if here.get(key) != value]
