"""Overrides of the command line: a dotted key and a value, which the key's type tells how to read."""

import json
import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import MISSING, OmegaConf

from dbtrain.config.run import Config
from dbtrain.config.section import Section, sections_of
from dbtrain.errors import ConfigError, refuse_argument

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
"""How an override begins: a dotted key and an equals sign."""
QUOTES = "\"'"
NOTHING = ("", "null")
"""What stands for no value."""
REFERENCE = re.compile(r"(\\*)\$\{")
"""OmegaConf's mark of a reference to another key, with the backslashes before it."""


def check_overrides(overrides: Any) -> None:
    """Refuse what is no list of texts, such as one text, whose letters would each be taken for an override.

    Raises:
        ArgumentError: it is something else.
    """
    if isinstance(overrides, str):
        refuse_argument("overrides", overrides, f"a list, as in [{overrides!r}]")
    if isinstance(overrides, bytes | bytearray) or not isinstance(overrides, Sequence):
        refuse_argument("overrides", overrides, "a list of texts, as in ['data.path=/elsewhere']")
    for number, override in enumerate(overrides):
        if not isinstance(override, str):
            refuse_argument(f"overrides[{number}]", override, "a text such as 'data.path=/elsewhere'")


def read_override(override: str) -> dict[str, Any]:
    """An override such as ``model.depth=12`` as a nested mapping.

    The value of a key that takes text is taken as it stands, be it a path with `` #`` in it or a name like
    ``off``; but ``null`` (or nothing) stands for no value, quotes around the whole are taken off, and
    ``${seed}`` refers to another key. All other values are YAML.

    Raises:
        ConfigError: it is no override, or gives no value.
    """
    if not OVERRIDE.match(override):
        raise ConfigError(f"{override!r} is no override: write key=value, for instance model.depth=12")
    key, _, value = override.partition("=")
    if value == MISSING:  # OmegaConf would pass over it
        raise ConfigError(f"{override} gives no value: {MISSING} stands for one that is missing")
    path = key.split(".")
    read: Any = _text(value) if takes_text(path) else _yaml(value)
    for part in reversed(path):
        read = {part: read}
    nested: dict[str, Any] = read
    return nested


def write_override(key: str, value: Any) -> str:
    """The override that :func:`read_override` and OmegaConf read as this value of JSON."""
    if not isinstance(value, str):
        return f"{key}={json.dumps(literal(value))}"
    quoted = "'" + value.replace("'", "''") + "'"
    return f"{key}={literal(quoted if value in NOTHING or value[0] in QUOTES else value)}"


def literal(value: Any) -> Any:
    """A value of JSON in which OmegaConf finds no reference: what was read before has none any more."""
    if isinstance(value, str):
        return REFERENCE.sub(r"\1\1\\${", value)
    if isinstance(value, list | tuple):
        return [literal(part) for part in value]
    return {key: literal(part) for key, part in value.items()} if isinstance(value, dict) else value


def takes_text(path: list[str]) -> bool:
    """Whether the key at this path has text for its value,
    in whichever model or source of data has such a key."""
    sections: list[type[Section]] = [Config]
    for part in path[:-1]:
        if part.isdigit():  # of a block, whose section is that of all blocks
            continue
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [found for field in fields for found in sections_of(field.annotation)]
    return any(_is_text(field.annotation) for section in sections if (field := section.model_fields.get(path[-1])))


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    # of a mapping or a list, whose parts may be text, YAML is read
    return annotation is str or (get_origin(annotation) in (Union, UnionType) and str in get_args(annotation))


def _text(value: str) -> str | None:
    if value in NOTHING:
        return None
    if value[0] in QUOTES and value[0] == value[-1] and isinstance(unquoted := _yaml(value), str):
        return unquoted
    return value


def _yaml(value: str) -> Any:
    """The value that YAML writes so; the text itself if it is no YAML,
    or if YAML would leave a part of it out."""
    try:
        node = yaml.compose(value, yaml.SafeLoader)
        # what follows is a comment, which nobody writes in an override
        if value[node.end_mark.index if node else 0 :].strip():
            return value
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        return read["value"]
    except (yaml.YAMLError, ValueError):
        return value
