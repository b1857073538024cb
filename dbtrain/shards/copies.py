"""A checkpoint that lies elsewhere, and how it becomes one of a block here: whole or not at all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.commit import NAME_DIGITS, Commit, step_name
from dbtrain.shards.format import Identity, check_identity
from dbtrain.shards.packed_file import pieces, verified
from dbtrain.shards.shard_head import check_head
from dbtrain.shards.storage.store import Store

DIGITS = 12
"""How many digits of a digest a message shows."""


@dataclass(frozen=True)
class CheckpointCopy:
    """One checkpoint of a block somewhere; nothing of its tensors was read yet."""

    commit: Commit
    source: str
    """Folder, file or URL that it lies in, as messages call it."""
    read: Callable[[str, int, int], bytes]
    """(file of the commit, start, size) -> a part of it."""

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(record["size"] for record in self.commit.files.values())

    def check(self, identity: Identity) -> None:
        """Look at the head of every file.

        Raises:
            DamagedError: a file is no shard of this block's kind and step.
            ShardError: it belongs to another run or block.
        """
        for name in self.commit.files:
            where = f"{self.source}: {step_name(self.commit.step)}/{name}"
            check_identity(check_head(self.commit, name, partial(self.read, name), where), identity, where)

    def content(self, name: str, tick: Callable[[int], None] = lambda size: None) -> Iterator[bytes]:
        """A file in pieces, of which ``tick`` is told the sizes; DamagedError if it is not the commit's."""
        record = self.commit.files[name]
        where = f"{self.source}: {step_name(self.commit.step)}/{name}"
        for piece in verified(
            pieces(partial(self.read, name), record["size"]), record["size"], record["sha256"], where
        ):
            yield piece
            tick(len(piece))


def described(commit: Commit) -> str:
    """What tells one checkpoint from another of the same step."""
    loss = "unknown" if commit.loss is None else f"{commit.loss:.6g}"
    place = f" at {commit.place}" if commit.place else ""
    return f"step {commit.step} (loss {loss}, attempt {commit.attempt}{place}, digest {commit.digest().hex()[:DIGITS]})"


def agree(one: Commit, two: Commit) -> bool:
    """Whether two commits of a step hold the same; one of them may have been packed without some roles."""
    ours, theirs = ({name.split(".", 1)[0]: r["sha256"] for name, r in c.files.items()} for c in (one, two))
    return one.step == two.step and all(ours[role] == theirs[role] for role in ours.keys() & theirs.keys())


def adopt(
    copy: CheckpointCopy,
    block: Store,
    checkpoints: Checkpoints,
    fence: Callable[[], None],
    tick: Callable[[int], None] = lambda size: None,
) -> Commit:
    """Make a copy the checkpoint of its step in a block's directory; until it is, what is there counts.

    What a call that was cut off has brought already is verified here and not read again.

    Args:
        copy: was looked at by its ``check``.
        block: directory of the block.
        checkpoints: checkpoints of that directory.
        fence: raises once somebody else owns the block; called right before COMMIT.json.
        tick: is told how many bytes have come, or were there.

    Raises:
        DamagedError: the copy is not what its commit says.
        ShardError: the disk is full, or a storage is out of reach.
    """
    folder = block.child(step_name(copy.commit.step))
    folder.makedirs()
    files = {_bring(copy, name, folder, tick): record for name, record in copy.commit.files.items()}
    fence()
    return checkpoints.publish(replace(copy.commit, files=files))


def _bring(copy: CheckpointCopy, name: str, folder: Store, tick: Callable[[int], None]) -> str:
    """Bring one file under a name that no other content has; returns that name."""
    record, role = copy.commit.files[name], name.split(".", 1)[0]
    plain, exact = f"{role}.safetensors", f"{role}.{record['sha256'][:NAME_DIGITS]}.safetensors"
    for there in (plain, exact):
        if folder.exists(there) and folder.size(there) == record["size"] and folder.sha256(there) == record["sha256"]:
            tick(record["size"])
            return there
    target = exact if folder.exists(plain) else plain
    folder.write_stream(target, lambda: copy.content(name, tick))
    return target
