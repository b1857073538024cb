"""How far something has come that takes a while, for whoever wants to show it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Count = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
Item = TypeVar("Item")


def silent(what: str, done: int, of: int) -> None:
    """Show nothing."""


def counted(count: Count, what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Each of the items; between them it is told how many are done."""
    for done, item in enumerate(items):
        count(what, done, len(items))
        yield item
    count(what, len(items), len(items))
