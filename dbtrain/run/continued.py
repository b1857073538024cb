"""The configuration of a run that exists, with the settings that may differ at the place where it is now."""

import os
import re
from collections.abc import Sequence

from dbtrain.config import Config, load_config
from dbtrain.config.data import PLACES, absolute_paths
from dbtrain.config.overrides import check_overrides
from dbtrain.errors import ConfigError, refuse_argument
from dbtrain.run.extend import KEYS
from dbtrain.run.run import Run
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store

LENGTHS = re.compile(r"(training\.steps|training\.blocks(\.\d+\.steps)?|cluster\.restart_optimizer)=")
"""How an override of `dbtrain extend` begins."""


def is_run(target: str) -> bool:
    """Whether a path or URL is that of a run, and not of a configuration file."""
    return "://" in target or os.path.isdir(target) and Store(target).exists(MANIFEST)


def run_config(run: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run was sealed with, changed by `overrides` of keys that do not determine the
    weights, or that say where its data lies.

    Other overrides are refused when the run is opened and compared with what it was sealed with.

    Raises:
        ConfigError: an override is malformed, or the directory has not the run's name.
        ArgumentError: `run` is no path, or `overrides` no list of texts.
        ShardError: there is no run.
    """
    if not isinstance(run, str | os.PathLike):
        refuse_argument("run", run, "the directory or URL of a run")
    check_overrides(overrides)
    whole = Run.at(run)
    check_run_path(whole.store)
    config, url = whole.config, whole.store.url
    out = url.rpartition("/")[0]
    if whole.manifest.branch:
        raise ConfigError(
            f"{url} is the branch of the run {out}, which is trained with it: give {out}, and --blocks branch to train "
            "nothing but its branch"
        )
    check_name(whole)
    fixed = [override for override in overrides if override.startswith(("out=", "name="))]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} would say where the run lies or what it is called, and {url} is given: leave it out"
        )
    given = load_config(None, overrides, base=config.model_dump(mode="json")) if overrides else config
    return _with_places(given, overrides).model_copy(update={"out": out or "/"})


def check_name(run: Run) -> None:
    """ConfigError unless the directory has the run's name, which commands that train make it from."""
    out, _, name = run.store.url.rpartition("/")
    if name != run.config.name:
        raise ConfigError(
            f"{run.store.url} holds the run {run.config.name!r}: a run's directory has its name, so call it "
            f"{out}/{run.config.name}"
        )


def moved(run: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run whose data lies where `overrides` say.

    Raises:
        ConfigError: an override is of something else.
        ShardError: there is no run.
    """
    others = [override for override in overrides if not override.startswith(PLACES)]
    if others:
        raise ConfigError(
            f"{others[0]!r} would change the run, which is trained: say only where its data lies ({', '.join(PLACES)})"
        )
    return _with_places(_reloaded(run, overrides), overrides)


def _with_places(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with absolute paths where an override gave one; other paths stay as they are."""
    said = {override.split("=", 1)[0].removeprefix("data.") for override in overrides if override.startswith(PLACES)}
    found = absolute_paths(config.data)
    paths = {key: getattr(found, key) for key in said if hasattr(found, key)}
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


def longer(run: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run with other lengths.

    Raises:
        ConfigError: an override is of something else.
        ShardError: there is no run.
    """
    others = [override for override in overrides if not LENGTHS.match(override)]
    if others:
        raise ConfigError(f"{others[0]!r} is not for this command: extend makes blocks longer, and takes {KEYS}")
    return _reloaded(run, overrides)


def _reloaded(run: str, overrides: Sequence[str]) -> Config:
    """The configuration that a run was sealed with, and overrides of it."""
    whole = Run.at(run)
    check_run_path(whole.store)
    return load_config(None, overrides, base=whole.config.model_dump(mode="json"))
