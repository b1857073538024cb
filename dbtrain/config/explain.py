"""What is wrong with a configuration, in words: the key as a user writes it,
the value, and what to write instead."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dbtrain.config.known_keys import BLOCK, hint, is_by_block, section_at
from dbtrain.config.run import Config
from dbtrain.config.section import TRUTH_VALUE, sections_of

NUMBERS = ("int_parsing", "int_type", "int_from_float", "float_parsing", "float_type")


def explain(error: Any) -> str:
    """One of pydantic's errors as one clause."""
    key = ".".join(str(part) for part in _without_tag(error["loc"]))
    if error["loc"] and error["loc"][-1] == "[key]":
        return _no_block_number(error, key)
    return CLAUSES.get(error["type"], _plain)(error, key)


def _no_block_number(error: Any, key: str) -> str:
    """A section whose keys are numbers of blocks has another key."""
    name = error["loc"][-2]
    section = key.removesuffix(f".{name}.[key]")
    return f"{section}.{name}: a block is named by its number, as in {section}.0.KEY=VALUE"


def _plain(error: Any, key: str) -> str:
    """Pydantic's own message in our words, or that of a check of ours."""
    value = error.get("input")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    message = message.replace("a valid int", "an int").replace("a valid ", "a ")
    of_section = error["type"] == "value_error" and isinstance(value, dict)
    # the check of a whole section names its keys itself
    return message if of_section or not key else f"{key}={value}: {message}"


def _number(error: Any, key: str) -> str:
    """No number stands where one belongs."""
    if error.get("input") is not None:
        return _plain(error, key)
    kind = error["msg"].split(",")[0].removeprefix("Input should be a valid ")
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{key} is empty: give {article} {kind}, or leave the key out"


def _unknown(error: Any, key: str) -> str:
    return f"unknown key {key}; {hint(error['loc'], key, error.get('input'))}"


def _missing(error: Any, key: str) -> str:
    return f"{key} is missing"


def _unknown_kind(error: Any, key: str) -> str:
    """The key that chooses a section's kind, `model.arch` or `data.source`,
    has a value that is none of them."""
    context = error["ctx"]
    kinds, chooser = _quoted(context["expected_tags"]), _chooser(error)
    told = _none_of(f"{key}.{chooser}", None if context["tag"] == "None" else context["tag"], kinds)
    own = chooser == "arch" and "did you mean" not in told
    return told + ("; a class of your own is my_file:MyModel" if own else "")


def _no_kind(error: Any, key: str) -> str:
    """The key that chooses a section's kind is not there."""
    chooser = _chooser(error)
    kinds = [str(section.model_fields[chooser].default) for section in section_at(error["loc"])]
    return f"{key}.{chooser} is missing: give one of {', '.join(kinds)}"


def _chooser(error: Any) -> str:
    """The key that chooses a section's kind, in pydantic's words its discriminator."""
    return str(error["ctx"]["discriminator"]).strip("'")


def _literal(error: Any, key: str) -> str:
    return _none_of(key, error["input"], _quoted(error["ctx"]["expected"]), error["ctx"]["expected"])


def _none_of(key: str, value: Any, known: list[str], listed: str = "") -> str:
    """The value is none of those that are known; `listed` is how they are written, by default with commas."""
    if value is None:
        return f"{key} is empty: give one of {', '.join(known)}"
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"{key}={value} is none of {listed or ', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def _quoted(text: str) -> list[str]:
    """The names in pydantic's `'a', 'b' or 3`."""
    return [word.strip("'") for word in re.split(r", | or ", text)]


def _list(error: Any, key: str) -> str:
    value = error["input"]
    if value is None:
        return f"{key} is empty: write a list, as in '{key}=[VALUE]', or leave the key out"
    if isinstance(value, str) and value.startswith("["):
        return f"{key}={value} is no list that YAML can read: write '{key}=[VALUE, VALUE]'"
    return f"{key}={value} is no list: write '{key}=[{value}]'"


def _text(error: Any, key: str) -> str:
    value = error["input"]
    if value is None:
        return f"{key} is empty: give it a value, or leave the key out"
    if isinstance(value, bool):  # of YAML 1.1
        return f"{key}={value} must be a text; YAML reads on, off, yes and no as true and false: put them in quotes"
    return f"{key}={value} must be a text: put the number in quotes, as in '{key}=\"{value}\"'"


def _name(error: Any, key: str) -> str:
    return (
        f"{key}={error['input']} must be made of letters, digits, dots, underscores and hyphens, and begin with a "
        "letter or digit, as it becomes the name of a directory"
    )


def _section(error: Any, key: str) -> str:
    """A plain value stands where keys belong."""
    value, sections = error["input"], section_at(error["loc"])
    if value is None:
        return f"{key} is empty: leave it out, or write keys below it"
    if not sections:
        return f"{key}={value} must be a mapping: write {key}.NAME=NUMBER"
    choosers = [name for section in sections for name in ("arch", "source") if name in section.model_fields]
    if choosers:
        return f"{key}={value} is no section of keys: write {key}.{choosers[0]}={value}"
    inner = f"{key}.{BLOCK}" if is_by_block(_annotation(error["loc"])) else key
    keys = ", ".join(sections[0].model_fields)
    return f"{inner}={value} is no section of keys: write {inner}.KEY=VALUE with one of {keys}"


def _annotation(loc: tuple[Any, ...]) -> Any:
    """The type that the configuration's classes give the key at a place."""
    annotation: Any = Config
    for part in loc:
        sections = [section for section in sections_of(annotation) if part in section.model_fields]
        annotation = sections[0].model_fields[part].annotation if sections else None
    return annotation


def _truth_value(error: Any, key: str) -> str:
    """A truth value where none may stand; the error is that of the whole section."""
    own, value = error["ctx"]["key"], error["ctx"]["value"]
    whole = f"{key}.{own}" if key else own
    return f"{whole}={value}: true and false (in YAML yes and no, too) are no values of this key"


CLAUSES: Mapping[str, Callable[[Any, str], str]] = {
    **dict.fromkeys(NUMBERS, _number),
    "extra_forbidden": _unknown,
    "missing": _missing,
    "union_tag_invalid": _unknown_kind,
    "union_tag_not_found": _no_kind,
    TRUTH_VALUE: _truth_value,
    "literal_error": _literal,
    "tuple_type": _list,
    "list_type": _list,
    "string_type": _text,
    "string_pattern_mismatch": _name,
    "model_type": _section,
    "model_attributes_type": _section,
    "dict_type": _section,
}
"""How each kind of error is put in words, by pydantic's name of it."""


def _without_tag(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys as a user writes them: pydantic also names the member of a union, by its discriminator."""
    field = Config.model_fields.get(str(loc[0])) if loc else None
    tagged = field is not None and len(sections_of(field.annotation)) > 1
    return (loc[0], *loc[2:]) if tagged else loc
