"""What differs between a run's configuration and the one that is given for it now, key by key."""

from collections.abc import Mapping
from typing import Any

from dbtrain.config import Config, parse_config

MOST = 5
"""Keys that are told; another architecture changes dozens."""
TELLING = ("method", "model.arch", "data.source", "blocks")
"""They come first: others follow from them."""


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


def _told(key: str, values: Mapping[str, Any]) -> str:
    return str(values[key]) if key in values else "absent"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
