"""How a run was extended, as run.json keeps it. The learning rate at every step follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dbtrain.shards.checksummed_json import Fields


@dataclass(frozen=True)
class Lengths:
    """How long the blocks of a run are trained: `training.steps`, and `steps` in `training.blocks`."""

    steps: int
    blocks: Mapping[int, int] = field(default_factory=dict)

    def of(self, block: int) -> int:
        """Steps of one block."""
        return self.blocks.get(block, self.steps)


@dataclass(frozen=True)
class Stretch:
    """What an extension does to the schedule of one block."""

    block: int
    start: int
    """Steps done from which on the longer schedule holds; before, the one that was there."""
    end: int
    """Steps after which the block is done."""
    rewarm: int
    """Steps in which the learning rate climbs to the longer schedule; 0 where it had not fallen."""


@dataclass(frozen=True)
class Extension:
    """One extension of a run."""

    when: float
    """Seconds since the epoch."""
    version: str
    """Version of the dbtrain that extended it."""
    before: Lengths
    after: Lengths
    stretches: tuple[Stretch, ...]
    """One for each block that became longer."""

    @staticmethod
    def parse(content: Any, where: str) -> "Extension":
        """The extension that :meth:`fields` describes; DamagedError for anything else."""
        found = Fields(content, f"{where}, extensions,")
        return Extension(
            when=found.number("when"),
            version=found.text("version"),
            before=_lengths(found.mapping("before"), where),
            after=_lengths(found.mapping("after"), where),
            stretches=tuple(_stretch(entry, where) for entry in found.items("stretches")),
        )

    def fields(self) -> dict[str, Any]:
        """The JSON object of it."""
        return {
            "when": self.when,
            "version": self.version,
            "before": _dumped(self.before),
            "after": _dumped(self.after),
            "stretches": [vars(stretch) for stretch in self.stretches],
        }


def _dumped(lengths: Lengths) -> dict[str, Any]:
    return {"steps": lengths.steps, "blocks": {str(block): steps for block, steps in sorted(lengths.blocks.items())}}


def _lengths(content: dict[str, Any], where: str) -> Lengths:
    found = Fields(content, f"{where}, extensions,")
    own = found.mapping("blocks")
    if not all(block.isdecimal() for block in own):
        found.reject("blocks", "steps by the number of a block")
    steps = Fields(own, f"{where}, extensions, blocks,")
    return Lengths(found.integer("steps", low=1), {int(block): steps.integer(block, low=1) for block in own})


def _stretch(entry: Any, where: str) -> Stretch:
    found = Fields(entry, f"{where}, extensions, stretches,")
    return Stretch(found.integer("block"), found.integer("start"), found.integer("end", low=1), found.integer("rewarm"))
