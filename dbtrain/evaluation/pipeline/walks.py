"""How several batches walk down the chain: in step with each other, or several in flight at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Protocol, TypeVar

import torch

Given = TypeVar("Given")
Made = TypeVar("Made")

Seen = Callable[[int, Given], None]
"""Called with the number of a walk and what its next step gives."""


class Walks(Protocol):
    """How work on several batches is done."""

    def run(self, walks: Sequence[Iterator[Given]], seen: Seen[Given]) -> None:
        """Take every step of every walk; all have as many."""

    def each(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """The function's value for each item, in their order."""


class InStep:
    """All walks take their first step before any takes its second, so that each block is asked for once."""

    def run(self, walks: Sequence[Iterator[Given]], seen: Seen[Given]) -> None:
        """Take every step of every walk; all have as many."""
        for step in zip(*walks, strict=True):
            for number, given in enumerate(step):
                seen(number, given)

    def each(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """The function's value for each item, one after the other."""
        return map(function, items)


class InFlight:
    """Walks in threads of their own, each as fast as the blocks answer.

    Args:
        most: walks in flight at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most

    def run(self, walks: Sequence[Iterator[Given]], seen: Seen[Given]) -> None:
        """Take every step of every walk; `seen` is called by one thread at a time."""
        lock = Lock()

        def walk(number: int) -> None:
            for given in walks[number]:
                with lock:
                    seen(number, given)

        for _ in self.each(walk, range(len(walks))):
            pass

    def each(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """The function's value for each item, in their order; the first exception ends it."""
        pool = ThreadPoolExecutor(self._most)
        try:
            # whether gradients are wanted is a setting of each thread
            yield from pool.map(partial(_as_here, function, torch.is_grad_enabled()), items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _as_here(function: Callable[[Given], Made], gradients: bool, item: Given) -> Made:
    with torch.set_grad_enabled(gradients):
        return function(item)
