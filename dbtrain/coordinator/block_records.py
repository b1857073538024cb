"""What the coordinator reads and writes of each block's directory."""

import dataclasses
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.errors import ShardError
from dbtrain.run.run import STATE, Run
from dbtrain.shards.storage.fence import claim
from dbtrain.telemetry.events import COORDINATOR, EventLog, EventTail

AT_ONCE = 16
"""Files that are written at the same time; each write waits until the disk, or the object store, has it."""

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Claim:
    """An attempt that is to own its block."""

    block: int
    attempt: int
    token: str
    """Random text that this attempt alone has, by which the fence knows it."""


def at_once(call: Callable[[Item], Made], items: Collection[Item]) -> list[Made | ShardError]:
    """What a call makes of each item, in threads; the ShardError where it raised one."""

    def tried(item: Item) -> Made | ShardError:
        try:
            return call(item)
        except ShardError as error:
            return error

    if len(items) <= 1:
        return [tried(item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items)), "dbtrain-records") as threads:
        return list(threads.map(tried, items))


class BlockRecords:
    """The blocks of a prepared run; methods raise ShardError when the storage fails."""

    def __init__(self, run: Run) -> None:
        self.blocks = run.blocks
        self._unwritten: dict[int, tuple[BlockState, float]] = {}

    def first_state(self, block: int, asked: bool = True) -> BlockState:
        """State of a block when the command starts; one that is not done and not asked for is elsewhere."""
        own = self.blocks[block]
        committed = own.committed
        phase = Phase.DONE if committed >= own.steps else Phase.PENDING if asked else Phase.ELSEWHERE
        return BlockState(block, phase, attempt=own.placed, committed=committed)

    def claim(self, attempts: Collection["Claim"]) -> "list[EventTail | ShardError]":
        """Make attempts the owners of their blocks, all at once, since each waits for the disk.

        Returns:
            The events to come of each attempt, or why its block could not be claimed, in their order.
        """
        return at_once(self._claim, attempts)

    def _claim(self, of: "Claim") -> EventTail:
        claim(self.blocks[of.block].store, of.attempt, of.token)
        self.tell(of.block, of.attempt, "placed")
        return EventTail(self.blocks[of.block].attempt(of.attempt))

    def tell(self, block: int, attempt: int, event: str, **fields: str) -> None:
        """Keep what only this command knows of an attempt: that it was ``placed``, all that the cluster says
        of its death (``died``), and the ``end`` of one whose workers had not started. A storage that is away
        loses it."""
        EventLog(self.blocks[block].attempt(attempt), COORDINATOR).tell(event, **fields)

    def note(self, state: BlockState) -> None:
        """Keep a state for `write`, in the place of an older one of its block."""
        self._unwritten[state.block] = state, time.time()

    def write(self) -> dict[int, ShardError]:
        """Write the noted states for `status`, which looks at nothing else while a worker is silent.

        Returns:
            Why those of some blocks could not be written; they are not tried again.
        """
        unwritten, self._unwritten = self._unwritten, {}
        tried = zip(unwritten, at_once(lambda noted: self._record(*noted), unwritten.values()), strict=True)
        return {block: error for block, error in tried if isinstance(error, ShardError)}

    def _record(self, state: BlockState, since: float) -> None:
        content = {**dataclasses.asdict(state), "phase": state.phase.value, "since": since}
        del content["not_before"]
        self.blocks[state.block].store.write_json(STATE, content)
