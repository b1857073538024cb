"""How labels as a folder or a column has them (names or numbers) become class numbers and names of
classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import DataError

SHOWN = 10
"""Class names that a message gives."""


@dataclass(frozen=True)
class Labels:
    """The labels of a split."""

    values: Sequence[Any]
    where: Callable[[int], str]
    """The file or row and column of a sample, for messages."""


def number_classes(
    splits: Mapping[str, Labels], known: Sequence[str] | None, classes: int | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Class numbers (n,) int64 by split, and the names of the classes in the order of their numbers.

    Without `known` names the values of ``train`` are the classes, sorted; but
    whole numbers stand for themselves where `classes` says how many there are.

    Args:
        splits: ``train`` among them.
        known: the classes' names, if the data say them; then values are their places.
        classes: the number in the configuration; None if it gives none.

    Raises:
        DataError: a label is missing, a fraction, a list, out of range, or not among those of ``train``;
            or `classes` is not how many there are.
    """
    for labels in splits.values():
        _check_kinds(labels)
    keys = sorted({_key(value) for value in splits["train"].values}, key=lambda key: (isinstance(key, str), key))
    numbers = bool(keys) and not isinstance(keys[0], str)
    if known is not None:
        names, places = tuple(known), {place: place for place in range(len(known))}
    elif numbers and classes is not None:
        names, places = tuple(map(str, range(classes))), {place: place for place in range(classes)}
    else:
        names, places = tuple(map(str, keys)), {key: place for place, key in enumerate(keys)}
    if classes is not None and classes != len(names):
        raise DataError(
            f"data.classes={classes}, and the data has {len(names)}: {listed(names)}; leave data.classes out, or fix "
            "the data"
        )
    return {split: _numbers(labels, places, names) for split, labels in splits.items()}, names


def listed(names: Sequence[str]) -> str:
    """Names with commas, the first ten of many."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _key(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value


def _check_kinds(labels: Labels) -> None:
    for row, value in enumerate(labels.values):
        if value is None or value == "" or value != value:  # the last is NaN
            raise DataError(f"{labels.where(row)} has no label: fill it in, or leave the sample out")
        if not isinstance(value, (int, str)):
            raise DataError(
                f"{labels.where(row)} has the label {value!r} ({type(value).__name__}): labels are whole numbers or "
                "names; name another column as data.label, or fix the data"
            )
        if not isinstance(value, str) and value < 0:
            raise DataError(
                f"{labels.where(row)} has the label {value}, which by custom says that there is none: leave the sample "
                "out, or, if all labels of a test split are hidden, name another split as data.test_split"
            )


def _numbers(labels: Labels, places: Mapping[Any, int], names: Sequence[str]) -> Tensor:
    numbers = torch.empty(len(labels.values), dtype=torch.int64)
    for row, value in enumerate(labels.values):
        place = places.get(_key(value))
        if place is None:
            raise DataError(
                f"{labels.where(row)} has the label {value!r}, which is none of the {len(names)} classes "
                f"of train ({listed(names)}): fix the data or set data.classes"
            )
        numbers[row] = place
    return numbers
