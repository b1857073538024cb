"""Bounds of constructors' arguments, which the configuration checks too."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt

Count = Annotated[int, Ge(1)]
Number = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
"""A number from 0 to less than 1."""


class FromRun:
    """Marks an argument that the run gives and no key of the configuration:
    ``Annotated[bool, FromRun()]``."""
