"""Which checkpoint the workers of a block resume from: the first one chooses,
the others take the same or none at all.

A file system over a network shows each machine what it saw a while ago. Workers that chose
for themselves could take different steps, and would train on as if nothing were wrong.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from dbtrain.errors import FirstWorkerError, ShardError, WorkerError
from dbtrain.shards.checkpoint import Checkpoints, Loaded
from dbtrain.shards.storage.errors import DamagedError, MissingError
from dbtrain.training.worker_sync import WorkerSync

WIRE = struct.Struct(">q32s")
"""What the first worker tells the others: a step, or one of the two below,
and the digest of the checkpoint's files."""
BEGINNING, FAILED = -1, -2
CATCH_UP_S = 60.0
"""Seconds in which a worker's machine comes to see what the first one's sees: NFS and gcsfuse trust what they
saw for as long."""
LOOK_S = 2.0


def patience(hang_timeout_s: float) -> float:
    """How long a worker looks for what the first one chose,
    which waits for it by the watchdog's clock meanwhile."""
    return min(CATCH_UP_S, hang_timeout_s / 2)


@dataclass(frozen=True)
class Resumption:
    """The choice of one attempt, as one of its workers takes part in it.

    Args:
        checkpoints: checkpoints of the block.
        sync: what its workers tell each other through.
        block: its number, for messages.
        restart_damaged: begin anew where all checkpoints are damaged.
        patience_s: how long the others may look for what the first one chose; see :func:`patience`.
    """

    checkpoints: Checkpoints
    sync: WorkerSync
    block: int
    restart_damaged: bool
    patience_s: float

    def find(self, rank: int, report: Callable[[str], None]) -> Loaded | None:
        """The checkpoint that all workers of the block resume from,
        None for the first step; a collective of them.

        Args:
            rank: rank of this worker; the first one chooses.
            report: gets one line for each checkpoint that it skipped.

        Raises:
            WorkerError: to the first worker: all checkpoints are damaged, and nobody asked to begin anew.
            FirstWorkerError: to the others: the first one failed.
            ShardError: the storage cannot be reached, or does not show this worker what the first one chose.
        """
        if self.sync.workers == 1:
            return self._choose(report)
        return self._follow(rank) if rank else self._lead(report)

    def _choose(self, report: Callable[[str], None]) -> Loaded | None:
        skipped: list[str] = []

        def skip(line: str) -> None:
            skipped.append(line)
            report(line)

        loaded = self.checkpoints.newest(skip)
        if loaded is None and skipped and not self.restart_damaged:
            # starting from nothing would throw away, without a question,
            # what a copy of one file may bring back
            raise WorkerError(
                f"all {len(skipped)} checkpoints of block {self.block} are damaged ({'; '.join(skipped)}): restore one "
                "from a copy, or train this block again from its first step with cluster.restart_damaged=true"
            )
        return loaded

    def _lead(self, report: Callable[[str], None]) -> Loaded | None:
        try:
            loaded = self._choose(report)
        except Exception:
            # the others wait for a choice, and would do so until the process group's time-out
            self.sync.from_first(WIRE.pack(FAILED, b""))
            raise
        said = (BEGINNING, b"") if loaded is None else (loaded.step, loaded.commit.digest())
        self.sync.from_first(WIRE.pack(*said))
        return loaded

    def _follow(self, rank: int) -> Loaded | None:
        # nearly always the right one, and read while the first worker reads it too
        mine = self.checkpoints.newest(lambda line: None)
        step, digest = WIRE.unpack(self.sync.from_first(bytes(WIRE.size)))
        if step == FAILED:
            raise FirstWorkerError(f"the first worker of block {self.block} failed, and says why")
        if step == BEGINNING:
            return None
        if mine is not None and (mine.step, mine.commit.digest()) == (step, digest):
            return mine
        del mine  # two at a time may not fit into memory
        return self._wait_for(step, digest, rank)

    def _wait_for(self, step: int, digest: bytes, rank: int) -> Loaded:
        until = time.monotonic() + self.patience_s
        while True:
            try:
                loaded = self.checkpoints.load(step, roles=None)
                if loaded.commit.digest() == digest:
                    return loaded
                seen = "another checkpoint of that step"
            except (MissingError, DamagedError) as error:
                seen = str(error)
            if time.monotonic() > until:
                raise ShardError(
                    f"block {self.block} resumes from step {step}, but worker {rank} sees {seen}: the shared storage "
                    "shows workers different things, as a network file system with a cache may for a while; it is "
                    "tried again. If it goes on, cache less (NFS: actimeo=1,lookupcache=none) or check that disk"
                )
            time.sleep(LOOK_S)
