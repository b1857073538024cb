"""Settings of a trained run that may be changed: how it is evaluated, and where its data lies."""

from collections.abc import Mapping, Sequence

from dbtrain.config import Config, load_config
from dbtrain.config.data import PLACES
from dbtrain.errors import ConfigError

WHERE = ("cluster.address=", "cluster.device=", "cluster.cpus_per_worker=")
"""Where a pipeline computes."""


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of a run with overrides such as ``evaluation.steps=100``.

    Raises:
        ConfigError: one is wrong, or of another section.
    """
    for override in overrides:
        if not override.startswith(("evaluation.", *WHERE, *PLACES)):
            raise ConfigError(
                f"{override!r} would change the run, which is trained: override evaluation.*, where the data lies "
                f"({', '.join(PLACES)}), or where a pipeline computes ({', '.join(WHERE)})"
            )
    return load_config(None, overrides, base=config.model_dump(mode="json")) if overrides else config


def not_said(paths: Mapping[str, str], overrides: Sequence[str]) -> dict[str, str]:
    """Where the run found its data, without the paths that an override gives."""
    return {key: path for key, path in paths.items() if not any(o.startswith(f"data.{key}=") for o in overrides)}
