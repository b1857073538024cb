"""What the coordinator reads and writes of each block's directory."""

import dataclasses
import time

from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.storage.fence import claim, newest_attempt
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import COORDINATOR, EventLog, EventTail


class BlockRecords:
    """The directories of the blocks of a settled run; methods raise ShardError when the storage fails.

    Args:
        run: directory of the run.
        blocks: how many it has.
    """

    def __init__(self, run: Store, blocks: int) -> None:
        manifest = read_manifest(run)
        self.stores = [run.child("blocks", f"{block:02d}") for block in range(blocks)]
        self._checkpoints = [
            Checkpoints(store, plan_identity(manifest, block)) for block, store in enumerate(self.stores)
        ]

    def first_state(self, block: int, steps: int) -> BlockState:
        """State of a block when the command starts."""
        committed = self.committed(block, steps)
        phase = Phase.DONE if committed >= steps else Phase.PENDING
        return BlockState(block, phase, attempt=newest_attempt(self.stores[block]), committed=committed)

    def committed(self, block: int, steps: int) -> int:
        """Newest step that is committed and, by the sizes of its files, whole; of the last one every byte is verified.

        Nothing comes after the last of the `steps` steps: where one that is damaged counted, its block would be done.
        A worker verifies the bytes of those before it, when it resumes.
        """
        checkpoints = self._checkpoints[block]
        newest = checkpoints.newest_step() or 0
        if newest < steps or not checkpoints.verify(newest):
            return newest
        return max((step for step in checkpoints.steps() if step < steps), default=0)

    def claim(self, block: int, attempt: int, token: str) -> EventTail:
        """Make an attempt the owner of a block; returns its events to come."""
        claim(self.stores[block], attempt, token)
        return EventTail(self.stores[block].child("attempts", str(attempt)))

    def keep_error(self, block: int, attempt: int, error: str) -> None:
        """Keep all that the cluster says of an attempt's death; a storage that is away loses it."""
        EventLog(self.stores[block].child("attempts", str(attempt)), COORDINATOR).tell("died", error=error)

    def record(self, state: BlockState) -> None:
        """Write a state for `status`."""
        content = {**dataclasses.asdict(state), "phase": state.phase.value, "since": time.time()}
        del content["not_before"]
        self.stores[state.block].write_json("state.json", content)
