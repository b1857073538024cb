"""The reference of all keys, made from the sections' own classes and what is written beside their fields."""

import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dbtrain.config.run import Config
from dbtrain.config.section import Section, sections_of
from dbtrain.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One key that a configuration may have."""

    name: str
    """Dotted, as an override has it."""
    kind: str
    """What values it takes."""
    default: str
    about: str


@dataclass(frozen=True)
class Group:
    """The keys of one section, or of one of its kinds."""

    section: str
    """Top-level key; empty for those of the run itself."""
    title: str
    about: str
    keys: tuple[Key, ...]


def groups(section: str | None = None) -> list[Group]:
    """All groups, or those of one section.

    Args:
        section: a top-level key such as ``training``, or a deeper one such as ``training.optimizer``.

    Raises:
        ConfigError: there is no such section.
    """
    every = list(_groups())
    if section is None:
        return every
    found = [g for g in every if section in (g.section, *(key.name for key in g.keys))]
    found += [g for g in every if g not in found and g.section.startswith(f"{section}.")]
    if not found:
        names = ", ".join(dict.fromkeys(g.section for g in every if g.section))
        raise ConfigError(f"there is no section or key {section!r}; the sections are {names}")
    return found


def _groups() -> Iterator[Group]:
    plain = {name: field for name, field in Config.model_fields.items() if not sections_of(field.annotation)}
    yield Group("", "The run", _doc(Config), tuple(_key(Config, name, field, "") for name, field in plain.items()))
    for name, field in Config.model_fields.items():
        kinds = sections_of(field.annotation)
        for kind in kinds:
            yield from _of_section(name, kind, _chooser(kinds[0]) if len(kinds) > 1 else None)


def _chooser(kind: type[Section]) -> str:
    """The key that chooses one of several kinds of a section."""
    return next(key for key in ("arch", "source") if key in kind.model_fields)


def _of_section(prefix: str, kind: type[Section], tag: str | None = None) -> Iterator[Group]:
    title = f"{prefix}.{tag}={kind.model_fields[tag].default}" if tag else prefix
    inner = {name: sections_of(field.annotation) for name, field in kind.model_fields.items()}
    keys = tuple(_key(kind, name, field, f"{prefix}.") for name, field in kind.model_fields.items() if not inner[name])
    silent = getattr(kind, "noise_defaults", {})
    also = f" By default noise has {', '.join(f'{key}={value}' for key, value in silent.items())}." if silent else ""
    yield Group(prefix, title, _doc(kind) + also, keys)
    for name, kinds in inner.items():
        for each in kinds:
            by_block = get_origin(_bare(kind.model_fields[name].annotation)) is dict
            about = _about(kind.model_fields[name])
            for group in _of_section(f"{prefix}.{name}{'.BLOCK' if by_block else ''}", each):
                yield group if not about else Group(group.section, group.title, f"{group.about} {about}", group.keys)


def _key(kind: type[Section], name: str, field: FieldInfo, prefix: str) -> Key:
    default = "required" if field.is_required() else _written(field.get_default(call_default_factory=True))
    return Key(f"{prefix}{name}", _kind(field.annotation, field.metadata), default, _about(field))


def _written(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value.value if isinstance(value, Enum) else value)


def _about(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _doc(kind: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _bare(annotation: Any) -> Any:
    """The type without what `Annotated` adds, and without None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    options = [part for part in get_args(annotation) if part is not NoneType]
    if NoneType in get_args(annotation) and len(options) == 1:
        return _bare(options[0])
    return annotation


NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "anything"}
BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def _kind(annotation: Any, metadata: Any = ()) -> str:
    """What values a field takes, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for part in parts[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _kind(parts[0], [*inner, *metadata])
    if origin is Literal:
        return ", ".join(str(part) for part in parts)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return " or ".join(_kind(part, metadata if part is not NoneType else ()) for part in parts)
    if origin is tuple:
        each = [part for part in parts if part is not Ellipsis]
        return f"list of {_kind(each[0])}" + ("" if Ellipsis in parts else f", {len(each)} of them")
    if origin is dict:
        return f"{_kind(parts[0])} to {_kind(parts[1])}"
    bounds = [
        f"{sign} {getattr(m, name):g}" for m in metadata for k, (sign, name) in BOUNDS.items() if isinstance(m, k)
    ]
    return " ".join([NAMES.get(annotation, str(annotation)), *bounds])


def markdown() -> str:
    """docs/keys.md."""
    lines = [
        "# Keys of a configuration",
        "",
        "Made from the classes in `dbtrain/config/` by `python -m dbtrain keys --markdown > docs/keys.md`; a test",
        "compares the two. `dbtrain keys SECTION` shows the same in a terminal. Every key can be given in YAML or as",
        "an override on the command line, such as `training.optimizer.lr=3e-4`. `BLOCK` is the number of a block.",
    ]
    for group in groups():
        lines += ["", f"## {group.title}", "", *textwrap.wrap(group.about, 110), ""]
        lines += ["| key | takes | default | |", "|---|---|---|---|"] if group.keys else []
        lines += [
            f"| `{key.name}` | {_cell(key.kind)} | {_cell(key.default)} | {_cell(key.about)} |" for key in group.keys
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
