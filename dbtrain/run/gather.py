"""Take blocks that were trained elsewhere into a run; a checkpoint here counts until its successor is whole.

If a block cannot be taken, or a place offers nothing sound, the other blocks are still taken; the failure is
told at the end.
"""

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from dbtrain.errors import ShardError
from dbtrain.run.choice import choose
from dbtrain.run.extend import apply as extend_as
from dbtrain.run.extend import described as extended
from dbtrain.run.extend import same_course, trained_alike
from dbtrain.run.gather_sources import Source, check_same_run, open_source
from dbtrain.run.run import STATE, Run, RunBlock
from dbtrain.run.schedule import in_words
from dbtrain.shards.checkpoint import Checkpoints, Commit
from dbtrain.shards.copies import CheckpointCopy, adopt, agree, described
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.storage.errors import DamagedError, MissingError
from dbtrain.shards.storage.fence import check, claim
from dbtrain.shards.storage.lock import RunLock
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Bytes, Count, silent

Tell = Callable[[str], None]


def gather(
    run: Run,
    urls: Sequence[str],
    take: str | None = None,
    numbers: Collection[int] | None = None,
    tell: Tell = lambda line: None,
    count: Count = silent,
) -> None:
    """Take what places offer. If the call is interrupted, the same call goes on from there.

    Args:
        run: the run that the blocks belong to; its sealed folder must be here.
        urls: run folders and packed files, by path or URL.
        take: the place that counts if places differ, or if an older checkpoint shall come back; it need not
            be one of `urls`.
        numbers: numbers of the blocks that are taken; None for all.
        tell: gets one line for each block that a place offers.
        count: is told how far it has come.

    Raises:
        ConfigError: there is no such block.
        RunLockedError: a command works on the run here.
        ShardError: what was not taken and why, all in one line; or the storage here fails.
    """
    if not run.exists:
        raise ShardError(f"{run.store.url} has no {MANIFEST}: copy the folder there first that dbtrain prepare sealed")
    blocks = run.chosen(numbers)
    with RunLock(run.store, "dbtrain gather") as lock:
        gathering = Gathering(run, tell)
        sources = gathering.open([*urls, *([take] if take else [])])
        for line in (line for source in sources for line in source.damaged):
            tell(line)
        choices = gathering.choices(blocks, sources, Store(take).url if take else None)
        coming = Bytes(sum(choice.copy.size for choice in choices if not choice.is_here), "MiB gathered", count)
        for choice in choices:
            lock.check()
            gathering.bring(choice, coming.tick)
    if gathering.problems:
        raise ShardError("; ".join(gathering.problems))


@dataclass(frozen=True)
class Choice:
    """The copy of a block that counts."""

    block: RunBlock
    copy: CheckpointCopy
    here: Commit | None
    is_here: bool
    """Whether the newest checkpoint here is the same one, and whole."""


class Gathering:
    """One call of `gather`.

    Args:
        run: the run, whose lock the caller holds.
        tell: gets one line for each block.
    """

    def __init__(self, run: Run, tell: Tell) -> None:
        self.run, self.tell = run, tell
        self.problems: list[str] = []
        """What was not taken, and why."""

    def open(self, urls: Sequence[str]) -> list[Source]:
        """The places that offer blocks of this run, each once."""
        sources: dict[str, Source] = {}
        for url in dict.fromkeys(urls):
            try:
                source = open_source(url)
                check_same_run(self.run, source)
                self._extend_as(source)
                sources[source.url] = source
            except ShardError as err:
                self.problems.append(str(err))
        return list(sources.values())

    def _extend_as(self, source: Source) -> None:
        """Extend the run here by the extensions that only the place has.

        Raises:
            ShardError: both were extended, and in different ways.
        """
        ours, theirs = self.run.manifest.extensions, source.manifest.extensions
        common = min(len(ours), len(theirs))
        if not same_course(ours[:common], theirs[:common]):
            raise ShardError(
                f"{source.url} was extended to {in_words(theirs[-1].after)}, and {self.run.store.url} "
                f"otherwise, to {in_words(ours[-1].after)}: blocks of the two do not fit together; extend a "
                "run in one place and gather from there"
            )
        for extension in theirs[common:]:
            self.tell(f"{source.url} was extended to {in_words(extension.after)}, and so this run is now:")
            for line in extended(self.run, extension):
                self.tell(line)
            extend_as(self.run, [extension])

    def choices(self, blocks: Sequence[RunBlock], sources: Sequence[Source], take: str | None) -> list[Choice]:
        """What is taken of each block that is offered, looked at before anything is written."""
        made = []
        for block in blocks:
            offers = [source.copies[block.number] for source in self._alike(block, sources)]
            try:
                if offers:
                    made.append(self._choice(block, offers, take))
            except ShardError as err:
                self.problems.append(f"block {block.number}: {err}")
        return made

    def _alike(self, block: RunBlock, sources: Sequence[Source]) -> list[Source]:
        """The places that have the block as the schedule here trains it."""
        alike = []
        for source in sources:
            copy = source.copies.get(block.number)
            why = copy and trained_alike(block.schedule, source.schedule(block.number), copy.commit.step)
            if why:
                self.problems.append(
                    f"block {block.number} of {source.url}: {why}; bring the extension there first (dbtrain gather "
                    f"there, from {self.run.store.url}), and train the block on from where it holds"
                )
            elif copy:
                alike.append(source)
        return alike

    def _choice(self, block: RunBlock, offers: Sequence[CheckpointCopy], take: str | None) -> Choice:
        here = block.checkpoints.newest_commit()
        copy = choose(here, offers, take, self.run.store.url)
        if copy.commit.step > block.steps:
            raise ShardError(f"{copy.source} has step {copy.commit.step}, and here the block ends at {block.steps}")
        has_all = here is not None and agree(here, copy.commit) and len(here.files) >= len(copy.commit.files)
        # if the same commit is here and its files were damaged since, it is brought again
        if here is not None and has_all and not block.checkpoints.verify(here.step):
            return Choice(block, copy, here, is_here=True)
        copy.check(block.identity)
        return Choice(block, copy, here, is_here=False)

    def bring(self, choice: Choice, tick: Callable[[int], None]) -> None:
        """Make a copy the block's checkpoint here.

        Raises:
            ShardError: the storage here fails; it also says what was not taken before.
        """
        number = choice.block.number
        try:
            _bring(choice, tick)
        except (DamagedError, MissingError) as err:
            self.problems.append(f"block {number}: {err}")
        except ShardError as err:
            raise ShardError("; ".join([*self.problems, f"block {number}: {err}"])) from err
        else:
            told = "is here already" if choice.is_here else f"taken from {choice.copy.source}"
            self.tell(f"block {number}: {described(choice.copy.commit)} {told}")


def _bring(choice: Choice, tick: Callable[[int], None]) -> None:
    block, copy, token = choice.block, choice.copy, secrets.token_hex(8)
    keep, held = block.run.config.training.keep, block.schedule.held
    checkpoints = Checkpoints(block.store, block.identity, keep, held)
    if choice.is_here:
        assert choice.here is not None
        checkpoints.publish(choice.here)  # copies nothing; it removes what an interrupted call has left
        return
    # a new claim, as an attempt makes one: a worker of an earlier attempt cannot overwrite what is taken
    claim(block.store, block.placed + 1, token)
    adopt(copy, block.store, checkpoints, partial(check, block.store, token), tick)
    if choice.here is not None and choice.here.step > copy.commit.step:
        checkpoints.go_back_to(copy.commit.step)
    block.store.remove(STATE)  # it says nothing of what was gathered


def missing(run: Run) -> list[str]:
    """What of a run is not done here, a block each, in words."""
    behind = [(block.number, block.committed, block.steps) for block in run.blocks if not block.done]
    return [f"block {number} ({f'step {step} of {steps}' if step else 'nothing'})" for number, step, steps in behind]
