"""What differs between a run's configuration and the one that is given for it now, key by key."""

from collections.abc import Mapping
from typing import Any

from dbtrain.config import Config, parse_config
from dbtrain.config.data import given_paths

MOST = 5
"""The most keys that a message names; another architecture changes dozens."""
TELLING = ("method", "model.arch", "data.source", "blocks")
"""Keys that a message names first, because others follow from them."""


def difference(stored: dict[str, Any], config: Config) -> str:
    """The keys that determine the weights and differ, each with both values.

    Args:
        stored: the configuration in run.json.
        config: the one that is given now.
    """
    old, new = _flat(parse_config(stored, "run.json").content()), _flat(config.content())
    keys = {**dict.fromkeys(TELLING), **new, **old}
    changed = [key for key in keys if old.get(key) != new.get(key)]
    told = [f"{key}: {_told(key, old)} in run.json, {_told(key, new)} now" for key in changed[:MOST]]
    if len(changed) > MOST:
        told.append(f"and {len(changed) - MOST} more")
    return "; ".join(told) or "run.json was written by a version of dbtrain with other settings"


def but_for_places(config: Config, stored: Config) -> Config:
    """A configuration with the paths of its data as the stored one has them, where both name some.

    Where data lies says nothing of what it is, which a run knows by its hash.
    """
    there = given_paths(stored.data) if type(stored.data) is type(config.data) else {}
    kept = {key: path for key, path in there.items() if key in given_paths(config.data)}
    return config.model_copy(update={"data": config.data.model_copy(update=kept)})


def _told(key: str, values: Mapping[str, Any]) -> str:
    return str(values[key]) if key in values else "absent"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
