"""Names and shapes in which a source of weights and a model differ, all of them, as one line."""

import difflib
from collections.abc import Collection, Iterable, Mapping

from dbtrain.shards.tensor_file import FLOATS, Described

Shape = tuple[int, ...]
SHOWN = 8
"""The most names of each kind that a message gives; the others are only counted."""
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
        _clause("missing", missing, (_near(name, left or found) for name in missing)),
        _clause("left over", left, (_near(name, missing or wanted) for name in left)),
        _clause("of another shape", reshaped, (f" is {_x(found[n].shape)}, not {_x(wanted[n])}" for n in reshaped)),
        _clause(f"of a type that is none of {', '.join(FLOATS)}", untyped, (f" is {found[n].dtype}" for n in untyped)),
    ]
    return "; ".join(clause for clause in clauses if clause)


def _clause(what: str, names: list[str], remarks: Iterable[str]) -> str:
    """One kind of misfit, in words. Only names that are shown get remarks, since each takes a while."""
    if not names:
        return ""
    told = [f"{name}{remark}" for name, remark in zip(names[:SHOWN], remarks, strict=False)]
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(told)}{more}"


def _near(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1, cutoff=NEAR)
    return f" (nearest: {near[0]})" if near else ""


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
