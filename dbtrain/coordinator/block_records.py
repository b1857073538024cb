"""What the coordinator reads and writes of each block's directory."""

import dataclasses
import time

from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.run.run import STATE, Run
from dbtrain.shards.storage.fence import claim
from dbtrain.telemetry.events import COORDINATOR, EventLog, EventTail


class BlockRecords:
    """The blocks of a prepared run; methods raise ShardError when the storage fails."""

    def __init__(self, run: Run) -> None:
        self.blocks = run.blocks

    def first_state(self, block: int, asked: bool = True) -> BlockState:
        """State of a block when the command starts; one that is not done and not asked for is elsewhere."""
        own = self.blocks[block]
        committed = own.committed
        phase = Phase.DONE if committed >= own.steps else Phase.PENDING if asked else Phase.ELSEWHERE
        return BlockState(block, phase, attempt=own.placed, committed=committed)

    def claim(self, block: int, attempt: int, token: str) -> EventTail:
        """Make an attempt the owner of a block; returns its events to come."""
        claim(self.blocks[block].store, attempt, token)
        return EventTail(self.blocks[block].attempt(attempt))

    def keep_error(self, block: int, attempt: int, error: str) -> None:
        """Keep all that the cluster says of an attempt's death; a storage that is away loses it."""
        EventLog(self.blocks[block].attempt(attempt), COORDINATOR).tell("died", error=error)

    def record(self, state: BlockState) -> None:
        """Write a state for `status`."""
        content = {**dataclasses.asdict(state), "phase": state.phase.value, "since": time.time()}
        del content["not_before"]
        self.blocks[state.block].store.write_json(STATE, content)
