"""Checkpoints of one block: complete or absent, verified before use, and the last good one is never removed
but by :meth:`Checkpoints.go_back_to` and :meth:`Checkpoints.set_aside`."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.shards.commit import (
    COMMIT,
    Commit,
    FileRecord,
    check_parts,
    check_values,
    dump_commit,
    find_problems,
    read_commit,
    read_part,
    step_name,
    step_number,
    store_shard,
)
from dbtrain.shards.format import ROLES, Identity, Role, encode
from dbtrain.shards.side_by_side import at_once
from dbtrain.shards.storage.errors import DamagedError, MissingError, one_line
from dbtrain.shards.storage.store import Store

__all__ = ["Checkpoints", "Commit", "FileRecord", "Loaded"]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: ``parts[role][global name]``, CPU tensors exactly as committed."""

    step: int
    commit: Commit
    parts: dict[str, dict[str, Tensor]]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Checkpoints:
    """Checkpoints of one block in its directory, ``blocks/02``.

    Args:
        store: that directory.
        identity: identity of the block.
        keep: so many stay, at least 1.
        held: step of one that stays besides.
    """

    def __init__(self, store: Store, identity: Identity, keep: int = 2, held: int | None = None) -> None:
        if keep < 1:
            raise ShardError(f"keep={keep} checkpoints of {store.url}: keep at least 1, better 2")
        self._store = store
        self._identity = identity
        self._keep = keep
        self._held = held
        self._known_bad: set[int] = set()

    def commit(
        self,
        step: int,
        parts: Mapping[Role, Mapping[str, Tensor]],
        *,
        loss: float | None,
        attempt: int,
        fence: Callable[[], None],
        from_place: str = "",
    ) -> Commit:
        """Write a checkpoint: its shards, in any order, then COMMIT.json.

        When this returns it survives a power cut, and when it does not the ones before remain.

        Args:
            parts: ``model`` and, if there are any, ``ema`` (same names and shapes) and ``optim``
                (``<state>/<global name>``); tensors of any shape and device.
            fence: raises FencedError when the attempt no longer owns the block;
                called before the first write and again right before COMMIT.json.
            from_place: copy of the run in which the attempt runs.

        Committing a step again is fine: equal content changes nothing (the first Commit is returned),
        other content replaces it.

        Raises:
            FencedError: from ``fence``.
            ShardError: disk full, storage out of reach, or parts that do not fit this block.
        """
        check_values(step, loss, attempt)
        check_parts(parts)
        fence()
        folder = self._folder(step)
        folder.makedirs()
        # Why this is safe. The checkpoint is what COMMIT.json lists, and COMMIT.json is one atomic replace
        # that comes after every shard is durable. No shard file is ever overwritten: a name that is taken by
        # other content (left by a killed attempt, or by one that was cut off and is still writing) is
        # avoided. So whatever an existing COMMIT.json lists stays true at every instant, on a disk and in an
        # object store alike; renaming a whole directory would need a second protocol for S3 and cannot
        # replace an existing directory in one step.
        contents = {role: encode(parts[role], self._identity, step, role) for role in ROLES if role in parts}
        # side by side: while the hash of one file is computed, the disk writes another
        placed = at_once([partial(store_shard, folder, role, content) for role, content in contents.items()])
        fence()
        return self.publish(Commit(step, loss, attempt, dict(placed), time.time(), from_place))

    def publish(self, commit: Commit) -> Commit:
        """Make durable files in their step's directory a checkpoint, and clean up what it replaces.

        Raises:
            ShardError: COMMIT.json could not be written.
        """
        commit = self._publish(commit)
        self._known_bad.discard(commit.step)
        # The checkpoint is safe by now. A failed clean-up must not look like a failed commit;
        # the next cleans again.
        with contextlib.suppress(ShardError):
            self._clean(commit)
        return commit

    def keep_only(self, step: int) -> None:
        """Remove the checkpoints below one, after every byte of that one was read back and verified.

        Raises:
            ShardError: it does not verify, and nothing was removed; or the storage cannot be reached.
        """
        wrong = self.verify(step)
        if wrong:
            raise ShardError(f"checkpoint {step} of block {self._identity.block} was written and reads {wrong[0]}")
        for below in self._all_steps():
            if below < step:
                self._drop(below)

    def go_back_to(self, step: int) -> None:
        """Remove all checkpoints after a step; the newest goes last, and counts until then.

        Raises:
            ShardError: the storage cannot be reached; the same call goes on.
        """
        for later in self._all_steps():
            if later > step:
                self._drop(later)

    def set_aside(self, step: int, folder: str) -> None:
        """Move all checkpoints after a step into a folder of this directory, where none of them counts.

        Each is whole there before it goes here; on a disk the files get a second name.

        Raises:
            ShardError: the storage cannot be reached; the same call goes on.
        """
        for later in reversed([found for found in self.steps() if found > step]):
            here, there = step_name(later), f"{folder}/{step_name(later)}"
            self._store.remove(there)  # of a call that was cut off
            for name in sorted(self._folder(later).list(), key=lambda name: name == COMMIT):
                self._store.copy(f"{here}/{name}", f"{there}/{name}")
            self._drop(later)

    def newest_commit(self) -> Commit | None:
        """What :meth:`newest_step` finds, None if there is none; no content of a shard is read.

        Raises:
            ShardError: the storage cannot be reached.
        """
        # not read again: a worker may replace it meanwhile
        return next((commit for step in reversed(self.steps()) if (commit := self._good(step))), None)

    def steps(self) -> list[int]:
        """Committed steps, ascending; a step counts when it has a COMMIT.json, verified or not."""
        return [step for step in self._all_steps() if self._folder(step).exists(COMMIT)]

    def newest(self, report: Callable[[str], None] = _to_stderr, roles: Sequence[Role] | None = None) -> Loaded | None:
        """The newest checkpoint whose every byte verifies, or None;
        ``report`` gets one line for each one skipped.

        Args:
            roles: load and verify only these (those that the checkpoint has); default all.

        Raises:
            ShardError: a checkpoint belongs to another run, block, config or codebook; or the storage cannot
                be reached, which must not look like "no checkpoint" (the block would start again from
                nothing).
        """
        for step in reversed(self.steps()):
            try:
                return self._open(step, roles)
            except (DamagedError, MissingError) as err:
                self._known_bad.add(step)
                report(f"skipped checkpoint {step} of block {self._identity.block}: {one_line(err)}")
        return None

    def load(self, step: int, roles: Sequence[Role] | None = ("model",)) -> Loaded:
        """One checkpoint, verified.

        Args:
            roles: all of which it must have; None for those that it has.

        Raises:
            ShardError: it is not committed, lacks a role, is damaged, or belongs elsewhere.
        """
        loaded = self._open(step, roles)
        for role in roles or ():
            if role not in loaded.parts:
                raise ShardError(f"{self._folder(step).url} has no {role!r} part: it has {', '.join(loaded.parts)}")
        return loaded

    def verify(self, step: int) -> list[str]:
        """Everything that is wrong with a checkpoint, one line each; [] if nothing is.

        Raises:
            ShardError: the storage cannot be reached.
        """
        return find_problems(self._folder(step), step, self._identity)

    def stamp(self, step: int) -> dict[str, Any] | None:
        """What changes when a file of a checkpoint is replaced:
        its commit, and size and version of each file.

        None where the storage does not tell versions of files, or the checkpoint is not whole.

        Raises:
            ShardError: the storage cannot be reached.
        """
        folder = self._folder(step)
        try:
            commit = read_commit(folder, step)
            files = {name: [folder.size(name), folder.version(name)] for name in commit.files}
        except (DamagedError, MissingError):
            return None
        if not all(version for _, version in files.values()):
            return None
        return {"step": step, "commit": commit.digest().hex(), "files": files}

    def newest_step(self) -> int | None:
        """Newest step whose COMMIT.json is whole and whose files have its sizes;
        no content is read, so it is cheap.

        Raises:
            ShardError: the storage cannot be reached.
        """
        commit = self.newest_commit()
        return None if commit is None else commit.step

    def _open(self, step: int, roles: Sequence[Role] | None) -> Loaded:
        folder = self._folder(step)
        commit = read_commit(folder, step)
        files = {role: commit.file_of(role) for role in (ROLES if roles is None else roles)}
        names = {role: name for role, name in files.items() if name is not None}
        read = at_once([partial(read_part, folder, commit, name, self._identity) for name in names.values()])
        return Loaded(step, commit, dict(zip(names, read, strict=True)))

    def _publish(self, commit: Commit) -> Commit:
        folder = self._folder(commit.step)
        with contextlib.suppress(MissingError, DamagedError):
            before = read_commit(folder, commit.step)
            if before.files == commit.files:
                return before
        folder.write(COMMIT, dump_commit(commit, folder.where(COMMIT)))
        return commit

    def _clean(self, commit: Commit) -> None:
        """Remove what is not part of this checkpoint from its directory,
        and checkpoints that nobody needs."""
        folder = self._folder(commit.step)
        for name in folder.list(temporaries=True):
            if name != COMMIT and name not in commit.files:
                folder.remove(name)
        # Steps above this one are left alone: damaged ones that the attempt passed over,
        # or another attempt's.
        below = [step for step in self._all_steps() if step < commit.step]
        good = [step for step in below if step != self._held and self._good(step)]
        kept = good[max(0, len(good) - (self._keep - 1)) :]
        oldest = min(kept, default=commit.step)
        for step in below:
            unwanted = step < oldest and step != self._held
            if unwanted or not self._folder(step).exists(COMMIT):
                self._drop(step)

    def _good(self, step: int) -> Commit | None:
        """A commit whose files have the sizes that it says: a cheap test,
        so that a torn checkpoint does not count as one of those kept."""
        folder = self._folder(step)
        if step in self._known_bad:
            return None
        try:
            commit = read_commit(folder, step)
            whole = all(folder.size(name) == record["size"] for name, record in commit.files.items())
        except (DamagedError, MissingError):
            return None
        return commit if whole else None

    def _drop(self, step: int) -> None:
        """COMMIT.json goes first: a removal that is cut off leaves an uncommitted directory,
        not a damaged one."""
        self._folder(step).remove(COMMIT)
        self._store.remove(step_name(step))

    def _all_steps(self) -> list[int]:
        return sorted(step for step in map(step_number, self._store.list()) if step is not None)

    def _folder(self, step: int) -> Store:
        return self._store.child(step_name(step))
