"""A run as it lies on disk or in an object store: its manifest, its blocks, and how far each of them is.

This is the one place that knows where in a run's directory a thing lies,
and that answers whether a block is done.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from torch import Tensor

from dbtrain.config import Config, parse_config
from dbtrain.errors import ConfigError, ShardError
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.run.schedule import Schedule, schedule_of
from dbtrain.shards.checkpoint import Checkpoints, Loaded
from dbtrain.shards.commit import step_name
from dbtrain.shards.format import Identity, Role
from dbtrain.shards.frozen import FROZEN, decode_frozen
from dbtrain.shards.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from dbtrain.shards.merged_directory import CODEBOOK, checked_codebook
from dbtrain.shards.storage.fence import newest_attempt
from dbtrain.shards.storage.store import Store

BLOCKS = "blocks"
ATTEMPTS = "attempts"
MERGED = "merged"
BRANCH = "branch"
"""Directory of a run's branch, which is a run of its own; messages call its only block by this name too."""
WEIGHTS: tuple[Role, ...] = ("ema", "model")
"""Weights of a block that others use: the first of these roles that it has."""
STATE = "state.json"
"""File in a block's directory: how its last command here left it, for `status`."""
VERIFIED = "verified.json"
"""File in a block's directory: which files of its last checkpoint were read and found whole."""


class Run:
    """One run; what it reads it reads once, when it is first asked for.

    Args:
        store: directory of the run; it need not exist.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"Run({self.store.url})"

    @staticmethod
    def at(url: str) -> "Run":
        """The run at a path or URL."""
        return Run(Store(url))

    @property
    def exists(self) -> bool:
        """Whether the run is prepared: its run.json is there."""
        return self.store.exists(MANIFEST)

    @cached_property
    def manifest(self) -> Manifest:
        """The content of run.json.

        Raises:
            ShardError: there is none, or it is damaged or of another version.
        """
        return read_manifest(self.store)

    def record(self, manifest: Manifest) -> None:
        """Write another run.json, and forget what the one before said.

        Raises:
            ShardError: it is wrong, or the storage fails.
        """
        write_manifest(self.store, manifest)
        for known in ("manifest", "config", "plan"):
            self.__dict__.pop(known, None)

    @cached_property
    def config(self) -> Config:
        """The configuration in run.json."""
        return parse_config(dict(self.manifest.config), self.store.where(MANIFEST))

    @cached_property
    def codebook(self) -> Tensor | None:
        """The codebook (V, D), or None if the run has none.

        Raises:
            ShardError: it is missing, damaged, or not the one that run.json names.
        """
        if not self.manifest.codebook_hash:
            return None
        where = self.store.where(CODEBOOK)
        return checked_codebook(self.store.read(CODEBOOK), self.manifest.codebook_hash, where)

    @cached_property
    def frozen(self) -> dict[str, Tensor]:
        """Stem and head that no block trains, by their names in a block's model; empty if there are none.

        Raises:
            ShardError: they are missing, damaged, or not those that run.json names.
        """
        if not self.manifest.frozen_hash:
            return {}
        return decode_frozen(self.store.read(FROZEN), self.manifest.frozen_hash, self.store.where(FROZEN))

    @cached_property
    def plan(self) -> RunPlan:
        """What was decided before training."""
        return read_plan(self.manifest, self.codebook, self.frozen)

    def block(self, number: int) -> "RunBlock":
        """A block of the run; nothing is read before it is asked for."""
        return RunBlock(self, number)

    @property
    def blocks(self) -> "list[RunBlock]":
        """All blocks of the plan."""
        return [self.block(number) for number in range(self.manifest.blocks)]

    def chosen(self, numbers: Collection[int] | None) -> "list[RunBlock]":
        """The blocks of these numbers in their order; all of them for None.

        Raises:
            ConfigError: there is no such block.
        """
        unknown = sorted(set(numbers or ()) - set(range(self.manifest.blocks)))
        if unknown:
            last = self.manifest.blocks - 1
            raise ConfigError(f"there is no block {unknown[0]}: run {self.manifest.name} has blocks 0 to {last}")
        return [block for block in self.blocks if numbers is None or block.number in numbers]

    @property
    def begun(self) -> "list[RunBlock]":
        """The blocks that have a directory, whatever run.json says."""
        names = self.store.child(BLOCKS).list()
        return [self.block(int(name)) for name in names if name.isdecimal()]

    @property
    def branch(self) -> "Run":
        """The run of the network that all blocks start from; it may not exist."""
        return Run(self.store.child(BRANCH))

    @property
    def merged(self) -> Store:
        """Directory of the merged model; it may not exist yet."""
        return self.store.child(MERGED)


class RunBlock:
    """One block of a run.

    Args:
        run: the run that it belongs to.
        number: number of the block; 0 is the noisiest.
    """

    def __init__(self, run: Run, number: int) -> None:
        self.run = run
        self.number = number
        self.path = f"{BLOCKS}/{number:02d}"
        """Its directory, below the run's."""
        self.store = run.store.child(self.path)

    @property
    def name(self) -> str:
        """Name of the block in messages."""
        return BRANCH if self.run.manifest.branch else f"block {self.number}"

    @property
    def key(self) -> str:
        """Name of the block in trackers and planned faults."""
        return self.name.replace(" ", "")

    @cached_property
    def identity(self) -> Identity:
        """What every shard of the block must say of itself."""
        return self.run.manifest.identity(self.number)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Its committed checkpoints; when older ones are removed, two are kept."""
        return Checkpoints(self.store, self.identity)

    @property
    def steps(self) -> int:
        """Optimizer steps after which the block is done."""
        return self.run.manifest.steps(self.number)

    @property
    def schedule(self) -> Schedule:
        """Its learning rate over all steps."""
        return schedule_of(self.run.config.training, self.run.manifest.extensions, self.number)

    @property
    def attempts(self) -> list[int]:
        """Numbers of the attempts of which there is an event or a log, rising."""
        return sorted(int(name) for name in self.store.child(ATTEMPTS).list() if name.isdecimal())

    def attempt(self, number: int) -> Store:
        """Directory of an attempt: its events and logs."""
        return self.store.child(ATTEMPTS, str(number))

    @property
    def placed(self) -> int:
        """Number of the newest attempt that was placed, 0 before the first.

        Raises:
            ShardError: OWNER.json cannot be read.
        """
        return newest_attempt(self.store)

    @property
    def done(self) -> bool:
        """Whether the block has a whole checkpoint of its last step."""
        return self.committed >= self.steps

    @property
    def committed(self) -> int:
        """Newest committed step, 0 if there is none.

        A checkpoint before the last step counts when its files have the recorded sizes; a worker verifies its
        bytes when it resumes. No worker resumes from the last step, so its bytes are verified before it
        counts. The result is remembered until its files change.

        Raises:
            ShardError: the storage cannot be reached.
        """
        newest = self.checkpoints.newest_step() or 0
        if newest < self.steps or self._is_whole(newest):
            return newest
        return max((step for step in self.checkpoints.steps() if step < self.steps), default=0)

    def _is_whole(self, step: int) -> bool:
        stamp = self.checkpoints.stamp(step)
        if stamp is not None and self._verified() == stamp:
            return True
        if self.checkpoints.verify(step):
            return False
        if stamp is not None:
            self._remember(stamp)
        return True

    def _verified(self) -> Any:
        try:
            return self.store.read_json(VERIFIED) if self.store.exists(VERIFIED) else None
        except ShardError:
            return None

    def _remember(self, stamp: Mapping[str, Any]) -> None:
        with suppress(ShardError):  # a reader who may not write here verifies again the next time
            self.store.write_json(VERIFIED, dict(stamp))

    def newest_weights(self, report: Callable[[str], None]) -> tuple[Loaded, Role] | None:
        """The newest checkpoint of weights that verifies and the role that counts of it, or None.

        Args:
            report: gets one line for each checkpoint that is passed over.

        Raises:
            ShardError: a checkpoint belongs elsewhere, or the storage cannot be reached.
        """
        found = self.weights(report)
        if found is None or found[0].step < self.steps:
            # the last one was found whole before it was damaged: forget that, so that the block trains on
            with suppress(ShardError):
                self.store.remove(VERIFIED)
        return found

    def weights(self, report: Callable[[str], None]) -> tuple[Loaded, Role] | None:
        """The same as :meth:`newest_weights` for a run that may be training: nothing is written.

        Raises:
            ShardError: a checkpoint belongs elsewhere, or the storage cannot be reached.
        """
        loaded = self.checkpoints.newest(report, roles=WEIGHTS)
        return None if loaded is None else (loaded, next(role for role in WEIGHTS if role in loaded.parts))

    def shard(self, step: int, role: str) -> str:
        """Name of a shard of one of its checkpoints, below the run's directory, as messages call it."""
        return f"{self.path}/{step_name(step)}/{role}.safetensors"
