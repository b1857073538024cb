"""How an attempt ended, from what its events said, what the cluster said, and what is committed."""

from dbtrain.coordinator.lifecycle import Exit, ExitKind
from dbtrain.coordinator.progress import Progress


def classify(progress: Progress, error: str | None, committed: int, steps: int, stopping: bool) -> Exit:
    """The exit of an attempt.

    Args:
        progress: of its block, with the events of this attempt taken.
        error: what the cluster says of its workers' death, if it says anything.
        committed: newest committed step.
        steps: of a whole training.
        stopping: the command was asked to stop.
    """
    leaving: ExitKind = "stopped" if stopping else "preempted"
    end = progress.end
    if committed >= steps:
        return Exit("done", "", committed)
    if end is None and progress.warned:
        return Exit(leaving, str(progress.warned), committed)
    if end is None:
        gone = error is not None and "node" in error and "died" in error
        kind: ExitKind = "preempted" if gone else "crashed"
        return Exit(kind, error or "the workers ended without a word", committed)
    if end["outcome"] == "stopped":
        return Exit(leaving, str(end.get("reason")), committed)
    if end["outcome"] == "failed" and not end.get("retry"):
        return Exit("failed", str(end.get("error")), committed)
    return Exit("crashed", str(end.get("error") or error), committed)
