"""Where blocks come from that were trained elsewhere: a copy of the run's folder, or a packed file."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dbtrain.config import Config, parse_config
from dbtrain.errors import ShardError
from dbtrain.run.config_diff import but_for_places, difference
from dbtrain.run.run import Run, RunBlock
from dbtrain.run.schedule import Schedule, first_training, schedule_of
from dbtrain.shards.checkpoint import Commit
from dbtrain.shards.commit import step_name
from dbtrain.shards.copies import CheckpointCopy
from dbtrain.shards.format import check_identity
from dbtrain.shards.manifest import MANIFEST, Manifest
from dbtrain.shards.packed_file import PackedFile, entry_name
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store


@dataclass(frozen=True)
class Source:
    """What a place offers."""

    url: str
    manifest: Manifest
    copies: Mapping[int, CheckpointCopy]
    """The newest checkpoint of each block that it has."""
    damaged: Sequence[str] = ()
    """Newer checkpoints that it has and that are not whole, in words."""

    def schedule(self, block: int) -> Schedule:
        """What the block is trained with there."""
        config = parse_config(dict(self.manifest.config), f"{self.url}: {MANIFEST}")
        return schedule_of(config.training, self.manifest.extensions, block)


def open_source(url: str) -> Source:
    """Look at a folder or file; of shards nothing is read but their sizes.

    Raises:
        ShardError: it is neither a run nor a packed file, or is damaged.
    """
    store = Store(url)
    if store.exists(MANIFEST):
        run = Run(store)
        copies = {block.number: copy for block in run.blocks if (copy := copy_of(block)) is not None}
        return Source(store.url, run.manifest, copies, _damaged(run, copies))
    parent, name = posixpath.split(store.url)
    if os.path.isdir(url) or parent.endswith(":/") or not (folder := Store(parent)).exists(name):
        check_run_path(store)
        raise ShardError(f"{store.url} is neither a run's directory nor a packed file: check the path or URL")
    packed = PackedFile(folder, name)
    copies = {block: _packed_copy(packed, block, commit) for block, commit in packed.commits.items()}
    return Source(packed.where, packed.manifest, copies)


def copy_of(block: RunBlock) -> CheckpointCopy | None:
    """The newest checkpoint of a block in a folder, None if it has none."""
    commit = block.checkpoints.newest_commit()
    if commit is None:
        return None
    folder = block.store.child(step_name(commit.step))
    return CheckpointCopy(commit, block.run.store.url, folder.read_range)


def _damaged(run: Run, copies: Mapping[int, CheckpointCopy]) -> list[str]:
    """Checkpoints of a folder that are newer than what it offers, and not whole; a line for each block."""
    lines = []
    for block in run.blocks:
        offered = copies[block.number].commit.step if block.number in copies else 0
        newer = [step for step in block.checkpoints.steps() if step > offered]
        if newer:
            count = f"step {offered} is the newest that is whole" if offered else "it has no other"
            lines.append(
                f"block {block.number}: {run.store.url} has a checkpoint of step {newer[-1]} that is damaged (dbtrain "
                f"inspect names the file), and {count}"
            )
    return lines


def _packed_copy(packed: PackedFile, block: int, commit: Commit) -> CheckpointCopy:
    def read(file: str, start: int, size: int) -> bytes:
        return packed.read_part(entry_name(block, commit.step, file), start, size)

    return CheckpointCopy(commit, packed.where, read)


def check_same_run(run: Run, source: Source) -> None:
    """Refuse a place whose blocks do not belong to this run.

    Raises:
        ShardError: its run, plan, codebook or data is another, or it was trained in another way; the message
            names the difference.
    """
    ours, theirs = run.manifest, source.manifest
    where = f"{source.url}: {MANIFEST}"
    if ours.blocks == theirs.blocks:
        for block in range(ours.blocks):
            check_identity(theirs.identity(block), ours.identity(block), where)
    ours_sealed = _as_sealed(run.config, ours)
    stored = _as_sealed(parse_config(dict(theirs.config), where), theirs)
    if but_for_places(stored, run.config).content_hash() != ours_sealed.content_hash():
        raise ShardError(
            f"{source.url} is of a run of another configuration than {run.store.url}: "
            f"{difference(ours_sealed.model_dump(mode='json'), stored)} there; copy one sealed folder (dbtrain "
            "prepare) to all places, and make a run longer with dbtrain extend"
        )
    if _began_with(ours) != _began_with(theirs):
        raise ShardError(
            f"{source.url} began with other weights than {run.store.url} (init in {MANIFEST}): of a run that branches, "
            "copy its folder to all places once the branch is trained"
        )


def _as_sealed(config: Config, manifest: Manifest) -> Config:
    """The configuration without the extensions of the run."""
    return config.model_copy(update={"training": first_training(config.training, manifest.extensions)})


def _began_with(manifest: Manifest) -> dict[str, str]:
    """Hashes of the files that the first weights came from, by name; empty where they are random."""
    return dict(manifest.init.files) if manifest.init else {}
