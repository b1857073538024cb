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
NODE_DIED = "The actor died because its node has died"
"""As Ray says it."""
WORDS = {
    "Worker unexpectedly exits with a connection error": KILLED,
    "due to the node running low on memory": SHORT_OF_MEMORY,
    NODE_DIED: LOST_NODE,
}
"""By what Ray says among half a page of other things."""
OUTSIDE = re.compile(
    r"^(MemoryError|OSError|IOError|TimeoutError|\w*Connection\w*Error|BrokenPipeError|EOFError|Dist\w*Error|OutOfMemory)"
    r"|\b(nccl|gloo|connections?|sockets?|broken pipe|timed out|peer|out of memory|no space left)\b"
    r"|\b(ECC error|CUDA driver)\b",
    re.IGNORECASE,
)
"""Errors that may come from outside: other workers' deaths, memory that others take, disks, networks, hardware."""
ADDRESS = re.compile(r"0x[0-9a-f]+")
SILENT_S = 60.0
"""For a node to answer, or for the cluster to find that it is dead, which takes Ray some 20 s."""
LONGEST = 500
"""Characters of what the cluster says otherwise."""


def in_words(error: str) -> str:
    """What the cluster says of a death, as short as people want it."""
    return next((words for said, words in WORDS.items() if said in error), error[:LONGEST])


def classify(progress: Progress, error: str | None, committed: int, steps: int, stopping: bool) -> Exit:
    """The exit of an attempt.

    Args:
        progress: of its block, with the events of this attempt taken.
        error: what the cluster says of its workers' death, if it says anything.
        committed: newest committed step.
        steps: of a whole training.
        stopping: the command was asked to stop.
    """
    told = None if error is None else in_words(error)
    leaving: ExitKind = "stopped" if stopping else "preempted"
    end = progress.end
    if committed >= steps:
        return Exit("done", "", committed)
    if end is None and progress.warned:
        return Exit(leaving, str(progress.warned), committed)
    if end is None:
        gone = told == LOST_NODE or (told is not None and "node" in told and "died" in told)
        kind: ExitKind = "preempted" if gone else "crashed"
        return Exit(kind, told or "the workers ended without a word", committed)
    if end["outcome"] == "crashed" and told == LOST_NODE:
        # of several workers those on other nodes have met broken connections, and said so first
        return Exit("preempted", told, committed)
    if end["outcome"] == "stopped":
        return Exit(leaving, str(end.get("reason")), committed)
    if end["outcome"] == "failed" and not end.get("retry"):
        return Exit("failed", str(end.get("error")), committed)
    return Exit("crashed", str(end.get("error") or told), committed, None if told == KILLED else _cause(end))


def _cause(end: dict[str, Any]) -> str | None:
    """What tells an error of the program from others, None if the worker's surroundings may be to blame."""
    error = str(end.get("error", ""))
    if "at" not in end or OUTSIDE.search(error):
        return None
    return f"{ADDRESS.sub('0x', error)} at step {end['at']}"
