"""run.json: what a run is. Every shard is checked against it.

It is written before training, once more when a branch is done, and whenever the run is extended.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dbtrain import __version__
from dbtrain.config.training import steps_of
from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import Fields, canonical, parse_json, seal, unseal
from dbtrain.shards.extension import Extension
from dbtrain.shards.format import Identity
from dbtrain.shards.origin import Origin
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import MissingError, damaged, short
from dbtrain.shards.storage.store import Store

MANIFEST = "run.json"
SCHEMA = 2
FIRST_SCHEMA = 1
"""Schema of runs whose shards were bound to their whole configuration, the number of steps included."""
HASH_DIGITS = 64


@dataclass(frozen=True)
class PlanRow:
    """One shard, of a block or of all blocks together: which layers and levels are its own."""

    block: int
    layers: tuple[int, int]
    """Half-open run of layer numbers in the whole model."""
    levels: tuple[str, str]
    """Low and high end of its noise levels as hex floats, which lose no bit."""


@dataclass(frozen=True)
class Manifest:
    """The fields of run.json. Only :func:`read_manifest` and :meth:`parse` check them."""

    config: Mapping[str, Any]
    """The whole configuration, as it was when the run began, but for the steps of one that was extended."""
    plan: tuple[PlanRow, ...]
    """One row per shard: one for each block, the noisiest first, or a single one for all blocks."""
    codebook_hash: str
    """``tensor_hash`` of the codebook, '' when there is none."""
    versions: Mapping[str, str]
    """Versions of what decides the numbers, dbtrain among them."""
    noise: Mapping[str, Any]
    """The distribution of the levels: its kind, its numbers, and how they were found. For masking it is
    `uniform`, which only places the edges; `MaskingNoise.quantile` says how often a level is trained."""
    run: str = ""
    """Name of the run; '' for that of the configuration."""
    config_hash: str = ""
    """Hash of what determines the weights; another configuration is not trained in this run's directory."""
    architecture_hash: str = ""
    """Hash of what a weight means: the network and its parametrisation.
    Shards are bound to it, not to the schedule."""
    data_hash: str = ""
    """Hash of the content of the data, '' where it is not known."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """What the data tells the model: image shape, number of classes, vocabulary."""
    class_names: tuple[str, ...] = ()
    """Names of the data's classes, by number; empty where they have none."""
    data_notes: tuple[str, ...] = ()
    """What was decided about the data that its files do not say, such as a split that was made."""
    slices: tuple[PlanRow, ...] = ()
    """Rows of the blocks where one job trains them all, and the plan has one row."""
    data_paths: Mapping[str, str] = field(default_factory=dict)
    """Where the run found the relative paths of its data."""
    branch: bool = False
    """Whether this is the branch of the run whose directory it lies in:
    one network over all levels, which every block starts from."""
    init: Origin | None = None
    """Where the first weights came from; None where they were random."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """What the run settled about its network when it began, beyond its configuration;
    empty in one from before there was any."""
    extensions: tuple[Extension, ...] = ()
    """How the run became longer than it was prepared, in their order."""
    frozen_hash: str = ""
    """``frozen_hash_of`` the stem and head that no block trains, '' where every block has its own."""
    model_hash: str = ""
    """SHA-256 of the file with the architecture's class where that is the user's own, '' otherwise."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Fields that this version does not know; they are kept."""

    @staticmethod
    def parse(content: Mapping[str, Any], where: str) -> "Manifest":
        """The manifest in the fields of a JSON object.

        Raises:
            DamagedError: a field is missing or wrong, or layers
                or levels do not tile without gap and overlap.
        """
        known = {f.name for f in dataclasses.fields(Manifest)} - {"others"}
        fields = Fields(dict(content), where)
        texts = ("run", "config_hash", "architecture_hash", "data_hash", "frozen_hash", "model_hash")
        optional: dict[str, Any] = {name: fields.text(name) for name in texts if name in content}
        optional |= {name: fields.mapping(name) for name in ("shape", "data_paths", "settled") if name in content}
        if "branch" in content:
            optional["branch"] = fields.flag("branch")
        plan = _rows(fields, "plan", where)
        if "init" in content:
            optional["init"] = Origin.parse(fields.mapping("init"), len(plan), where)
        manifest = Manifest(
            config=fields.mapping("config"),
            versions=fields.mapping("versions"),
            noise=fields.mapping("noise"),
            plan=plan,
            codebook_hash=fields.text("codebook_hash"),
            slices=_rows(fields, "slices", where) if "slices" in content else (),
            class_names=_words(fields, "class_names") if "class_names" in content else (),
            data_notes=_words(fields, "data_notes") if "data_notes" in content else (),
            extensions=tuple(
                Extension.parse(entry, where)
                for entry in (fields.items("extensions") if "extensions" in content else ())
            ),
            others={name: value for name, value in content.items() if name not in known},
            **optional,
        )
        if manifest.codebook_hash and len(manifest.codebook_hash) != HASH_DIGITS:
            fields.reject("codebook_hash", f"'' or {HASH_DIGITS} hex digits")
        _check_tiles(manifest, where)
        return manifest

    def fields(self) -> dict[str, Any]:
        """The JSON object that :meth:`parse` reads; fields that are empty and may be are left out."""
        content = dataclasses.asdict(replace(self, extensions=()))
        content["extensions"] = [extension.fields() for extension in self.extensions]
        others = content.pop("others")
        needed = ("config", "plan", "codebook_hash", "versions", "noise")
        return {**{name: value for name, value in content.items() if value or name in needed}, **others}

    @property
    def blocks(self) -> int:
        """How many shards there are: one per block, or a single one where one job trains all blocks."""
        return len(self.plan)

    def steps(self, block: int) -> int:
        """Optimizer steps after which a block is done."""
        return steps_of(self.config["training"], block)

    @property
    def name(self) -> str:
        """Name of the run; one without a name is told from others by its configuration."""
        name = self.run or self.config.get("name")
        return name if name and isinstance(name, str) else f"run-{self._hash_of_config()[:12]}"

    def identity(self, block: int) -> Identity:
        """Identity that every shard of a block must have.

        Raises:
            ShardError: the plan has no such block.
        """
        if not 0 <= block < self.blocks:
            raise ShardError(f"block={block} is not in the plan: it has blocks 0 to {self.blocks - 1}")
        row = self.plan[block]
        return Identity(
            run=self.name,
            block=block,
            blocks=self.blocks,
            layers=row.layers,
            levels=row.levels,
            architecture_hash=self.architecture_hash or self._hash_of_config(),
            codebook_hash=self.codebook_hash,
            data_hash=self.data_hash,
            frozen_hash=self.frozen_hash,
        )

    def _hash_of_config(self) -> str:
        return self.config_hash or sha256(canonical(self.config, "config").encode())


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Write run.json of a run directory, atomically.

    Raises:
        ShardError: a field is wrong, the plan leaves a gap, or a value is not JSON.
    """
    where, content = store.where(MANIFEST), manifest.fields()
    data = seal(content, SCHEMA, where)
    try:
        Manifest.parse(unseal(data, SCHEMA, where), where)
    except ShardError as err:
        raise ShardError(f"cannot write {where}: {err}") from err
    store.write(MANIFEST, data)


def read_manifest(store: Store) -> Manifest:
    """What :func:`write_manifest` was given.

    Raises:
        ShardError: there is no run here, or run.json is damaged, edited, or of another version.
    """
    where = store.where(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except MissingError as err:
        raise MissingError(f"{store.url} is not a run directory, it has no {MANIFEST}: check the path") from err
    return parse_manifest(data, where)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in the bytes of run.json.

    Raises:
        ShardError: it is damaged, edited, or of another version.
    """
    _refuse_older(data, where)
    return Manifest.parse(unseal(data, SCHEMA, where), where)


def _refuse_older(data: bytes, where: str) -> None:
    """A run of before is refused by the version that wrote it: its shards are bound in another way."""
    content = parse_json(data, where)
    if not isinstance(content, dict) or content.get("version") != FIRST_SCHEMA:
        return
    older = unseal(data, FIRST_SCHEMA, where).get("versions", {}).get("dbtrain", "before 0.2")
    raise ShardError(
        f"{where} was written by dbtrain {older}, and this is {__version__}, which binds checkpoints in another way: "
        f"finish that run with dbtrain {older}, or start another one (name=...)"
    )


def _words(fields: Fields, name: str) -> tuple[str, ...]:
    words = fields.items(name)
    if not all(isinstance(word, str) for word in words):
        fields.reject(name, "a list of texts")
    return tuple(words)


def _rows(fields: Fields, name: str, where: str) -> tuple[PlanRow, ...]:
    entries = fields.items(name)
    if not entries:
        fields.reject(name, "a list of at least one block")
    return tuple(_row(entry, block, where) for block, entry in enumerate(entries))


def _row(entry: Any, block: int, where: str) -> PlanRow:
    """One row with the right types; its values are judged by Identity."""
    fields = Fields(entry, f"{where}, plan of block {block},")
    if fields.integer("block") != block:
        fields.reject("block", f"{block}, its place in the list")
    for name, kind in (("layers", int), ("levels", str)):
        value = fields.items(name)
        if len(value) != 2 or not all(type(end) is kind for end in value):
            fields.reject(name, f"two values of type {kind.__name__}")
    layers, levels = fields.items("layers"), fields.items("levels")
    return PlanRow(block, (layers[0], layers[1]), (levels[0], levels[1]))


def _check_tiles(manifest: Manifest, where: str) -> None:
    """Raise DamagedError unless layers and levels of all blocks meet without gap or overlap."""
    try:
        identities = [manifest.identity(block) for block in range(manifest.blocks)]
    except ShardError as err:
        damaged(where, str(err))
    if identities[0].layers[0] != 0:
        damaged(where, f"block 0 begins at layer {identities[0].layers[0]}, not 0")
    for one, two in zip(identities, identities[1:], strict=False):
        if one.layers[1] != two.layers[0]:
            damaged(
                where,
                f"layers {short(one.layers)} and {short(two.layers)} of blocks {one.block}, {two.block} do not meet",
            )
        # Block 0 is the noisiest, so a block's low end is the next one's high end;
        # exactly, or levels fall between.
        if one.edges[0] != two.edges[1]:
            damaged(
                where,
                f"levels {short(one.levels)} and {short(two.levels)} of blocks {one.block}, {two.block} do not meet "
                "(block 0 is the noisiest)",
            )
