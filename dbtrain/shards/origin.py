"""Where a run's first weights came from, as run.json keeps it: enough to read one block alone.

It is written before training; that of a run with a branch is written when the branch is done. The files that
it names are needed until every block has a commit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dbtrain.shards.checksummed_json import Fields
from dbtrain.shards.storage.errors import damaged


@dataclass(frozen=True)
class BlockOrigin:
    """What one block takes of the source."""

    layers: tuple[int, int]
    """Half-open run of layer numbers in the source, as many as the block has."""
    stem: str
    """What its stem's names begin with in the source: `stem` or `blocks.2.stem`; '' where it is frozen."""
    head: str
    """The same for the head."""
    files: tuple[str, ...]
    """Files that hold these tensors, below the source's directory."""

    def source_name(self, name: str, first_layer: int) -> str:
        """What a parameter of the block is called in the source.

        Args:
            name: in the block's model, such as ``stem.patches.weight`` or ``layers.4.mlp.0.weight``.
            first_layer: number of the first layer of the block, in its own whole model.
        """
        group, _, rest = name.partition(".")
        if group != "layers":
            return f"{self.stem if group == 'stem' else self.head}.{rest}"
        number, _, parameter = rest.partition(".")
        return f"layers.{int(number) - first_layer + self.layers[0]}.{parameter}"

    def told(self, place: str) -> str:
        """What it takes, in words."""
        first, end = self.layers
        layers = f"layers {first}-{end - 1}" if end - first > 1 else f"layer {first}"
        ends = [_end(group, prefix) for group, prefix in (("stem", self.stem), ("head", self.head))]
        return f"{layers} of {place}, with {' and '.join(ends)}"


def _end(group: str, prefix: str) -> str:
    """A stem or head, in words."""
    if not prefix:
        return f"the run's frozen {group}"
    return f"its {group}" if prefix == group else f"the {group} of its block {prefix.split('.')[1]}"


@dataclass(frozen=True)
class Origin:
    """Where the first weights of all blocks came from."""

    place: str
    """Path or URL of the directory that holds the files: absolute, or below the run's own directory."""
    files: Mapping[str, str]
    """SHA-256 of each file that was taken from, by its name below that directory."""
    blocks: tuple[BlockOrigin, ...]
    """One row for each shard."""
    notes: tuple[str, ...] = ()
    """What people should be told of the source."""
    foreign: bool = False
    """Whether the files have the names of another library's class, which the run's `model.arch` names."""

    @property
    def where(self) -> str:
        """What messages call the source: its file if there is one, else its directory."""
        return f"{self.place}/{next(iter(self.files))}" if len(self.files) == 1 else self.place

    def lines(self) -> list[str]:
        """A line for each group of neighbours that start alike, then the notes."""
        sources = [(block, row.told(self.where)) for block, row in enumerate(self.blocks)]
        lines = []
        for what, group in groupby(sources, key=lambda pair: pair[1]):
            blocks = [block for block, _ in group]
            one = len(blocks) == 1
            lines.append(f"block{'' if one else 's'} {blocks[0]}{'' if one else f'-{blocks[-1]}'}: {what}")
        return [*lines, *self.notes]

    @staticmethod
    def parse(content: Mapping[str, Any], blocks: int, where: str) -> "Origin":
        """The origin in a JSON object that `dataclasses.asdict` made; DamagedError for anything else."""
        fields = Fields(dict(content), where)
        rows = tuple(_row(entry, where) for entry in fields.items("blocks"))
        files, notes = fields.mapping("files"), fields.items("notes") if "notes" in content else []
        texts = [*files.values(), *notes, *(name for row in rows for name in row.files)]
        if len(rows) != blocks or not all(isinstance(text, str) for text in texts):
            damaged(where, f"init must name files and notes as texts, and have a row for each of {blocks} blocks")
        if lost := {name for row in rows for name in row.files} - files.keys():
            damaged(where, f"init gives no hash of {', '.join(sorted(lost))}")
        foreign = bool(content.get("foreign", False))
        return Origin(fields.text("place"), files, rows, tuple(notes), foreign)


def _row(entry: Any, where: str) -> BlockOrigin:
    fields = Fields(entry, f"{where}, init,")
    layers = fields.items("layers")
    if len(layers) != 2 or not all(type(end) is int for end in layers) or not 0 <= layers[0] < layers[1]:
        fields.reject("layers", "two layer numbers, the first below the second")
    return BlockOrigin((layers[0], layers[1]), fields.text("stem"), fields.text("head"), tuple(fields.items("files")))
