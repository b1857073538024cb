"""What a run has learnt so far: its newest commits as one model, while it trains or before it is done.

Nothing is written into the run. A commit that is replaced while it is read is looked for again.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dbtrain.errors import ShardError
from dbtrain.run.merge import assemble
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store

TRIES = 5
"""How often newer commits may come while older ones are read."""

Result = TypeVar("Result")


def while_it_trains(run: Run, act: Callable[[], Result]) -> Result:
    """What `act` gives, which reads commits; called again if it fails and newer ones have come meanwhile.

    Raises:
        ShardError: it failed, and the commits are those of when it began.
    """
    for _ in range(TRIES - 1):
        before = _committed(run)
        try:
            return act()
        except ShardError:
            if _committed(run) == before:
                raise
    return act()


def _committed(run: Run) -> list[list[int]]:
    return [block.checkpoints.steps() for block in run.blocks]


@contextmanager
def newest_model(run: Run) -> Iterator[MergedDirectory]:
    """A merged model of every block's newest checkpoint that verifies, in a folder for temporary files.

    Raises:
        ShardError: a block has no checkpoint, or none that verifies; or the temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="dbtrain-now-") as folder:
        while_it_trains(run, lambda: assemble(run, Store(folder)))
        yield MergedDirectory(Store(folder))
