"""What is wrong with a configuration, in words: the key as a user writes it, the value, and what to write instead."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dbtrain.config.known_keys import BLOCK, hint, is_by_block, section_at
from dbtrain.config.run import Config
from dbtrain.config.section import sections_of

NUMBERS = ("int_parsing", "int_type", "int_from_float", "float_parsing", "float_type")


def explain(error: Any) -> str:
    """One of pydantic's errors as one clause."""
    place = ".".join(str(part) for part in _without_tag(error["loc"]))
    if error["loc"] and error["loc"][-1] == "[key]":
        section = place.removesuffix(f".{error['loc'][-2]}.[key]")
        return f"{section}.{error['loc'][-2]}: a block is named by its number, as in {section}.0.KEY=VALUE"
    clause = CLAUSES.get(error["type"])
    if clause is not None:
        return clause(error, place)
    given = error.get("input")
    if error["type"] in NUMBERS and given is None:
        return f"{place} is empty: give {_wanted(error['msg'])}, or leave the key out"
    message = (
        error["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "it must be")
        .replace("a valid int", "an int")
        .replace("a valid ", "a ")
    )
    if not place or error["type"] == "value_error" and isinstance(given, dict):
        return message  # of a whole section, whose check names its keys itself
    return f"{place}={given}: {message}"


def _wanted(message: str) -> str:
    kind = message.split(",")[0].removeprefix("Input should be a valid ")
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _unknown(error: Any, place: str) -> str:
    return f"unknown key {place}; {hint(error['loc'])}"


def _missing(error: Any, place: str) -> str:
    return f"{place} is missing"


def _member(error: Any, place: str) -> str:
    """The key that chooses a section's kind, `model.arch` or `data.source`, has a value that is none of them."""
    context = error["ctx"]
    key, kinds = context["discriminator"].strip("'"), _quoted(context["expected_tags"])
    return _none_of(f"{place}.{key}", None if context["tag"] == "None" else context["tag"], kinds)


def _no_member(error: Any, place: str) -> str:
    kinds = [str(_default(section, error)) for section in section_at(error["loc"])]
    return f"{place}.{error['ctx']['discriminator'].strip(chr(39))} is missing: give one of {', '.join(kinds)}"


def _default(section: Any, error: Any) -> Any:
    return section.model_fields[error["ctx"]["discriminator"].strip("'")].default


def _literal(error: Any, place: str) -> str:
    return _none_of(place, error["input"], _quoted(error["ctx"]["expected"]), error["ctx"]["expected"])


def _none_of(place: str, given: Any, known: list[str], told: str = "") -> str:
    if given is None:
        return f"{place} is empty: give one of {', '.join(known)}"
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"{place}={given} is none of {told or ', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def _quoted(text: str) -> list[str]:
    """The names in pydantic's `'a', 'b' or 3`."""
    return [word.strip("'") for word in re.split(r", | or ", text)]


def _list(error: Any, place: str) -> str:
    given = error["input"]
    if given is None:
        return f"{place} is empty: write a list, as in '{place}=[VALUE]', or leave the key out"
    if isinstance(given, str) and given.startswith("["):
        return f"{place}={given} is no list that YAML can read: write '{place}=[VALUE, VALUE]'"
    return f"{place}={given} is no list: write '{place}=[{given}]'"


def _text(error: Any, place: str) -> str:
    given = error["input"]
    if given is None:
        return f"{place} is empty: give it a value, or leave the key out"
    # YAML 1.1
    words = "; YAML reads on, off, yes and no as true and false: put them in quotes" if isinstance(given, bool) else ""
    numbers = f": put the number in quotes, as in '{place}=\"{given}\"'" if not words else ""
    return f"{place}={given} must be a text{numbers}{words}"


def _name(error: Any, place: str) -> str:
    return (
        f"{place}={error['input']} must be made of letters, digits, dots, underscores and hyphens, and begin with a "
        "letter or digit, as it becomes the name of a directory"
    )


def _section(error: Any, place: str) -> str:
    """A plain value stands where keys belong."""
    given, field = error["input"], error["loc"][-1] if error["loc"] else ""
    sections = section_at(error["loc"])
    if given is None:
        return f"{place} is empty: leave it out, or write keys below it"
    if not sections:
        return f"{place}={given} must be a mapping: write {place}.NAME=NUMBER"
    kinds = [kind for section in sections for kind in ("arch", "source") if kind in section.model_fields]
    if kinds:
        return f"{place}={given} is no section of keys: write {place}.{kinds[0]}={given}"
    inner = f"{place}.{BLOCK}" if is_by_block(_annotation(error["loc"])) else place
    keys = ", ".join(list(sections[0].model_fields))
    return f"{inner if field else place}={given} is no section of keys: write {inner}.KEY=VALUE with one of {keys}"


def _annotation(place: tuple[Any, ...]) -> Any:
    annotation: Any = Config
    for part in place:
        known = [s for s in sections_of(annotation) if part in s.model_fields]
        annotation = known[0].model_fields[part].annotation if known else None
    return annotation


CLAUSES: Mapping[str, Callable[[Any, str], str]] = {
    "extra_forbidden": _unknown,
    "missing": _missing,
    "union_tag_invalid": _member,
    "union_tag_not_found": _no_member,
    "literal_error": _literal,
    "tuple_type": _list,
    "list_type": _list,
    "string_type": _text,
    "string_pattern_mismatch": _name,
    "model_type": _section,
    "model_attributes_type": _section,
    "dict_type": _section,
}
"""By pydantic's name of the error."""


def _without_tag(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys as a user writes them: pydantic also names the member of a union, by its discriminator."""
    field = Config.model_fields.get(str(loc[0])) if loc else None
    tagged = field is not None and len(sections_of(field.annotation)) > 1
    return (loc[0], *loc[2:]) if tagged else loc
