"""Names and shapes in which a source of weights and a model differ, all of them, as one line."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from dbtrain.shards.tensor_file import FLOATS, Described

Shape = tuple[int, ...]
NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
"""The number of a layer in a name."""
NEAR = 0.5
"""Least similarity, by difflib, at which a message names another name as the nearest."""


def misfit(wanted: Mapping[str, Shape], found: Mapping[str, Described], unasked: Collection[str]) -> str:
    """What is missing, left over, or of another shape or type; '' if nothing is.

    Args:
        wanted: shapes by the names of the source.
        found: what the source has.
        unasked: names in it that may be left over.
    """
    missing = sorted(wanted.keys() - found.keys())
    left = sorted(found.keys() - wanted.keys() - set(unasked))
    both = sorted(wanted.keys() & found.keys())
    reshaped = [name for name in both if found[name].shape != wanted[name]]
    untyped = [name for name in both if found[name].dtype not in FLOATS]
    clauses = [
        _clause("missing", missing, lambda name: "", left or found),
        _clause("left over", left, lambda name: "", missing or wanted),
        _clause("of another shape", reshaped, lambda name: f" is {_x(found[name].shape)}, not {_x(wanted[name])}"),
        _clause(f"of a type that is none of {', '.join(FLOATS)}", untyped, lambda name: f" is {found[name].dtype}"),
    ]
    return "; ".join(clause for clause in clauses if clause)


def _clause(what: str, names: list[str], remark: Callable[[str], str], near: Iterable[str] = ()) -> str:
    """One kind of misfit, in words; names that differ by their layer alone are one, where remarks agree.

    Args:
        what: the kind.
        names: all that are of it.
        remark: what is said of a name.
        near: names of which the nearest to the first layer's is told; this takes a while for each.
    """
    if not names:
        return ""
    told = ", ".join(f"{label}{remark(first)}{_near(first, near)}" for label, first in _by_layer(names, remark))
    return f"{len(names)} {what}: {told}"


def _by_layer(names: list[str], remark: Callable[[str], str]) -> list[tuple[str, str]]:
    """Names with the numbers of all layers that have them, such as ``layers.{0-3,5}.norm.weight``,
    and the first of each."""
    alike: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for name in names:
        before, number, after = NUMBER.split(name, maxsplit=1) if NUMBER.search(name) else (name, "-1", "")
        alike.setdefault((before, after, remark(name)), []).append((int(number), name))
    found = []
    for (before, after, _), numbered in alike.items():
        numbered.sort()
        label = numbered[0][1] if len(numbered) == 1 else f"{before}{{{_spans([n for n, _ in numbered])}}}{after}"
        found.append((label, numbered[0][1]))
    return found


def _spans(numbers: list[int]) -> str:
    """Rising numbers in short: ``0-3,5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _near(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1, cutoff=NEAR)
    return f" (nearest: {near[0]})" if near else ""


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
