"""How an attempt ended, from what its events said, what the cluster said, and what is committed."""

import re
from typing import Any

from dbtrain.coordinator.lifecycle import Exit, ExitKind
from dbtrain.coordinator.progress import Progress

KILLED = "its process was killed (SIGKILL, or the machine had no memory left), or crashed in native code"
SHORT_OF_MEMORY = (
    "Ray killed its process because its machine was short of memory: lower cluster.blocks.N.micro_batch, or raise "
    "cluster.cpus_per_worker so that fewer workers share a machine"
)
LOST_NODE = "its node was lost"
SILENT = "the workers ended without a word"
NODE_DIED = "The actor died because its node has died"
"""Ray's sentence for a lost node."""
UNREACHABLE = "The actor is temporarily unavailable"
"""Ray's sentence for a worker that does not answer: it is frozen, or its node will soon be found dead."""
UNREACHED = "its worker does not answer any more, and its node lives: the process is frozen, or the network is down"
CONTROLLERS_DIED = "The process of this command's controllers has died."
"""Our own words for it, before Ray's, which are those for a worker's death."""
LOST_CONTROLLERS = (
    "the process of Ray Train's controllers (ray::TrainControllers), which all blocks of a command share, was killed "
    "or crashed, and this block's workers ended with it"
)
SENTENCES = {
    CONTROLLERS_DIED: LOST_CONTROLLERS,
    "Worker unexpectedly exits with a connection error": KILLED,
    "due to the node running low on memory": SHORT_OF_MEMORY,
    NODE_DIED: LOST_NODE,
    UNREACHABLE: UNREACHED,
}
"""Our sentence for each of Ray's, which stands somewhere in half a page of its other text."""
OUTSIDE = re.compile(
    r"^(MemoryError|OSError|IOError|TimeoutError|\w*Connection\w*Error|BrokenPipeError|EOFError|Dist\w*Error|OutOfMemory)"
    r"|\b(nccl|gloo|connections?|sockets?|broken pipe|timed out|peer|out of memory|no space left)\b"
    r"|\b(ECC error|CUDA driver)\b",
    re.IGNORECASE,
)
"""Errors that may come from outside: other workers' deaths,
memory that others take, disks, networks, hardware."""
ADDRESS = re.compile(r"0x[0-9a-f]+")
SILENT_S = 60.0
"""How long a node may take to answer, or the cluster to find that it is dead, which takes Ray some 20 s."""
LONGEST = 500
"""Characters that are kept of an error of the cluster for which there is no sentence of ours."""


def in_words(error: str) -> str:
    """The cluster's error in one short sentence; of an error that is not known its first characters."""
    return next((ours for rays, ours in SENTENCES.items() if rays in error), error[:LONGEST])


def classify(progress: Progress, error: str | None, committed: int, steps: int, stopping: bool) -> Exit:
    """Decide how an attempt of a block ended.

    The block's commits come first, then what its workers wrote before they went, then the cluster's error.

    Args:
        progress: progress of the block, with all events of this attempt taken.
        error: the cluster's error about the death of the attempt's workers, if it has one.
        committed: newest committed step of the block.
        steps: steps after which the block is done.
        stopping: whether this command was asked to stop; otherwise whoever ended the workers took them away.
    """
    reason = None if error is None else in_words(error)
    leaving: ExitKind = "stopped" if stopping else "preempted"
    if committed >= steps:
        return Exit("done", "", committed)
    if reason == LOST_CONTROLLERS:  # whatever its workers wrote: they were taken away
        return Exit(leaving, reason, committed)
    if progress.end is not None:
        return _reported(progress.end, reason, leaving, committed)
    if progress.warned:
        return Exit(leaving, str(progress.warned), committed)
    return _vanished(reason, committed)


def _vanished(reason: str | None, committed: int) -> Exit:
    """The workers wrote no end: only the cluster can know whether they or their node died."""
    lost = reason is not None and (reason == LOST_NODE or ("node" in reason and "died" in reason))
    return Exit("preempted" if lost else "crashed", reason or SILENT, committed)


def _reported(end: dict[str, Any], reason: str | None, leaving: ExitKind, committed: int) -> Exit:
    """The workers wrote how they ended, which is believed unless a lost node explains it."""
    if end["outcome"] == "stopped":
        return Exit(leaving, str(end.get("reason")), committed)
    if end["outcome"] == "failed" and not end.get("retry"):
        return Exit("failed", str(end.get("error")), committed)
    if end["outcome"] == "crashed" and reason == LOST_NODE:
        # workers on other nodes met broken connections, and wrote that before the cluster missed the node
        return Exit("preempted", reason, committed)
    cause = None if reason == KILLED else _cause(end)
    return Exit("crashed", str(end.get("error") or reason), committed, cause)


def _cause(end: dict[str, Any]) -> str | None:
    """The error and its step, by which it is known again; None if the surroundings may have caused it."""
    error = str(end.get("error", ""))
    if "at" not in end or OUTSIDE.search(error):
        return None
    return f"{ADDRESS.sub('0x', error)} at step {end['at']}"
