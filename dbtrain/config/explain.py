"""What is wrong with a configuration, in words: the key as a user writes it, the value, the nearest known key."""

import difflib
from typing import Any, get_args

from dbtrain.config.run import Config
from dbtrain.config.section import Section


def explain(error: Any) -> str:
    """One of pydantic's errors as one clause."""
    place = ".".join(str(part) for part in _without_tag(error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    if error["type"] == "string_type" and isinstance(given, bool):
        # YAML 1.1
        message += "; YAML reads on, off, yes and no as true and false: put them in quotes"
    return f"{place}={given}: {message}" if place and not isinstance(given, dict) else message


def _without_tag(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys as a user writes them: pydantic also names the member of a union, by its discriminator."""
    field = Config.model_fields.get(str(loc[0])) if loc else None
    tagged = field is not None and len(_sections(field.annotation)) > 1
    return (loc[0], *loc[2:]) if tagged else loc


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for part in loc[:-1]:
        candidates = _sections(section.model_fields[part].annotation) if part in section.model_fields else [section]
        # the location of an error inside a union also names the member, by its discriminator
        tag = loc[loc.index(part) + 1] if loc.index(part) + 1 < len(loc) - 1 else None
        section = next((c for c in candidates if _tag(c) == tag), candidates[0]) if candidates else section
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation.members()
    return [section for part in get_args(annotation) for section in _sections(part)]


def _tag(section: type[Section]) -> Any:
    for key in ("arch", "source"):
        if key in section.model_fields:
            return section.model_fields[key].default
    return None
