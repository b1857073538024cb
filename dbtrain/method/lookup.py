"""Tables of the plug. A row is a class, or its import path, which is imported when it is first asked for."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from dbtrain.errors import ConfigError


def resolve(row: Any) -> Any:
    """The class of a row: itself, or what ``package.module:Class`` names."""
    if not isinstance(row, str):
        return row
    module, _, name = row.partition(":")
    return getattr(importlib.import_module(module), name)


def look_up(table: Mapping[str, Any], key: str, name: str) -> Any:
    """The class of the row of this name.

    Args:
        table: rows by name.
        key: key of the configuration, for the message.
        name: the name that the user gave.

    Raises:
        ConfigError: there is no such row.
    """
    if name not in table:
        raise ConfigError(f"{key}={name!r} is none of {', '.join(table)}{nearest(name, table)}")
    return resolve(table[name])


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the known name that is most like this one; '' if none is like it."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
