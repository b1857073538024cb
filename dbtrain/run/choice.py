"""Which of several copies of a block counts: the newest, and no silent answer where that is not clear."""

from collections.abc import Sequence

from dbtrain.errors import ShardError
from dbtrain.shards.checkpoint import Commit
from dbtrain.shards.copies import CheckpointCopy, agree, described


def choose(here: Commit | None, offers: Sequence[CheckpointCopy], take: str | None, where: str) -> CheckpointCopy:
    """The copy of a block that counts; it may be the same as what is here.

    Two things are decided only by `take`: which place is right if two of them trained a block to the same
    step with different results, and whether an older checkpoint replaces a newer one.

    Args:
        here: newest checkpoint of the block in this run.
        offers: at least one.
        take: source that counts in both cases; None to refuse them.
        where: this run, for messages.

    Raises:
        ShardError: the newest copies differ, or are older than what is here; both are shown.
    """
    wanted = [copy for copy in offers if copy.source == take]
    if wanted:
        return wanted[0]
    step = max(copy.commit.step for copy in offers)
    newest = [copy for copy in offers if copy.commit.step == step]
    best = max(newest, key=lambda copy: len(copy.commit.files))  # of equal commits, the most complete
    for other in newest:
        if not agree(other.commit, best.commit):
            raise _differ(best.commit, best.source, other)
    if here is not None and here.step == step and not agree(here, best.commit):
        raise _differ(here, where, best)
    if here is not None and here.step > step:
        raise ShardError(
            f"{best.source} has {described(best.commit)}, which is older than {described(here)} in {where}, and the "
            f"newer one stays; --take {best.source} goes back to the older one"
        )
    return best


def _differ(one: Commit, where: str, two: CheckpointCopy) -> ShardError:
    return ShardError(
        f"{where} has {described(one)} and {two.source} has {described(two.commit)}: two places trained it, with other "
        f"results; decide with --take {two.source}, or leave one of them out"
    )
