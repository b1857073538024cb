"""How far something has come that takes a while, for whoever wants to show it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Count = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
Item = TypeVar("Item")
MIB = 1 << 20


def silent(what: str, done: int, of: int) -> None:
    """Show nothing."""


def counted(count: Count, what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Each of the items; between them it is told how many are done."""
    for done, item in enumerate(items):
        count(what, done, len(items))
        yield item
    count(what, len(items), len(items))


class Bytes:
    """Bytes that have come, told in MiB.

    Args:
        of: bytes in all.
        what: they are, for people.
        count: is told.
    """

    def __init__(self, of: int, what: str, count: Count) -> None:
        self.of, self.what, self.count = of, what, count
        self.done = 0

    def tick(self, size: int) -> None:
        """So many bytes more."""
        self.done += size
        self.count(self.what, min(self.done, self.of) // MIB, -(-self.of // MIB))
