"""Reading a merged model: everything is checked against config.json, which is checksummed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.method.content import tensor_hash
from dbtrain.shards.checksummed_json import Fields, parse_json, seal, unseal
from dbtrain.shards.commit import FileRecord, parse_files, read_vouched
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.format import check_identity, decode_codebook, shard_of
from dbtrain.shards.frozen import FROZEN, decode_frozen
from dbtrain.shards.manifest import Manifest
from dbtrain.shards.safetensors_file import Destination, sha256
from dbtrain.shards.storage.errors import MissingError, damaged, short
from dbtrain.shards.storage.store import Store

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CODEBOOK = "codebook.safetensors"
UNFINISHED = "unfinished"
"""Field of config.json that only a model of blocks has which were not done."""
VERSION = 2
OWN = ("blocks", "files", UNFINISHED)
"""Fields of config.json that run.json has not."""


@dataclass(frozen=True)
class MergedBlock:
    """Where one block of a merged model comes from."""

    block: int
    step: int
    """Optimizer steps after which its weights were taken."""
    loss: float | None
    role: str
    """`ema` for averaged weights, else `model`."""
    file: str
    sha256: str


def shard_name(block: int, blocks: int) -> str:
    """File of a block by the Hugging Face convention, which counts from one:
    block 0 of 3 is model-00001-of-00003."""
    return f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"


def dump_config(manifest: Manifest, blocks: list[MergedBlock], files: dict[str, FileRecord]) -> bytes:
    """The bytes of config.json: the run, its blocks, and the hash of every file beside it."""
    content = {**manifest.fields(), "blocks": [asdict(row) for row in blocks], "files": files}
    if progress := unfinished(manifest, blocks):
        content[UNFINISHED] = progress
    return seal(content, VERSION, CONFIG)


def unfinished(manifest: Manifest, blocks: Sequence[MergedBlock]) -> str:
    """How far the blocks of a merged model were trained, if not to their ends: ``steps 4 of 6, 3 of 6``.

    '' if they are done.
    """
    steps = [(row.step, manifest.steps(row.block)) for row in blocks]
    done = all(step >= end for step, end in steps)
    return "" if done else f"steps {', '.join(f'{step} of {end}' for step, end in steps)}"


class MergedDirectory:
    """A merged model; config.json and the index are read once.
    Every method raises ShardError for what is damaged.

    Args:
        store: its directory.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._judged: dict[str, str] = {}
        """Version of each shard file that was found undamaged."""

    @cached_property
    def _content(self) -> dict[str, Any]:
        try:
            data = self.store.read(CONFIG)
        except MissingError as err:
            raise MissingError(
                f"{self.store.url} holds no merged model (no {CONFIG}): run the merge first "
                "(dbtrain merge RUN, with --now if its blocks are not done)"
            ) from err
        return unseal(data, VERSION, self.store.where(CONFIG))

    @cached_property
    def manifest(self) -> Manifest:
        """What run.json says of the run, but for the places on the machine that trained it."""
        fields = {name: value for name, value in self._content.items() if name not in OWN}
        manifest = Manifest.parse(fields, self.store.where(CONFIG))
        self._check_rows(manifest.blocks)
        return manifest

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """Size and hash of every file beside config.json, by name."""
        where = self.store.where(CONFIG)
        return parse_files(Fields(self._content, where).mapping("files"), where)

    @cached_property
    def blocks(self) -> tuple[MergedBlock, ...]:
        """One row for each block."""
        self.manifest  # noqa: B018  it checks the rows
        return tuple(MergedBlock(**row) for row in self._content["blocks"])

    @property
    def weights_hash(self) -> str:
        """SHA-256 over those of its blocks: what was measured on this model holds for no other."""
        return sha256("\n".join(row.sha256 for row in self.blocks).encode())

    @property
    def progress(self) -> str:
        """What :func:`unfinished` says of it."""
        return unfinished(self.manifest, self.blocks)

    def _check_rows(self, blocks: int) -> None:
        where = self.store.where(CONFIG)
        rows = Fields(self._content, where).items("blocks")
        if len(rows) != blocks or INDEX not in self.files:
            damaged(where, f"{len(rows)} blocks and files {short(list(self.files))} do not fit a plan of {blocks}")
        for block, row in enumerate(rows):
            fields = Fields(row, where)
            fields.integer("step"), fields.text("sha256")
            fits = fields.integer("block") == block and fields.text("file") in self.files
            if not fits or fields.text("role") == "optim" or set(row) != set(MergedBlock.__dataclass_fields__):
                damaged(where, f"the entry of block {block} is {short(row)}")

    def where(self, block: int) -> str:
        """How messages call the file of a block."""
        return self.store.where(shard_name(block, self.manifest.blocks))

    def size(self, block: int) -> int:
        """Bytes of a block's file, as config.json records them.

        Raises:
            ShardError: it records no such file.
        """
        record = self.files.get(self.blocks[block].file)
        if record is None:
            damaged(self.where(block), f"{CONFIG} does not record it")
        return record["size"]

    def block(self, block: int, to: Destination | None = None) -> dict[str, Tensor]:
        """Parameters of one block by global name, verified by hash, identity and index.

        A file that is read again, and was not written to since, is not hashed again.

        Args:
            block: its number.
            to: where the tensors shall lie, by default in host memory.

        Raises:
            ShardError: no such block, or anything that this block needs is damaged or foreign.
        """
        expected = self.manifest.identity(block)
        row = self.blocks[block]
        where = self.store.where(row.file)
        listed = {name for name, place in self._weight_map.items() if place == row.file}
        record = self.files.get(row.file)
        if record is None:
            damaged(where, f"{CONFIG} does not record it")
        version = self.store.version(row.file)
        judged = bool(version) and self._judged.get(row.file) == version
        shard = shard_of(read_vouched(self.store, row.file, record, CONFIG, to, hashed=not judged), where)
        check_identity(shard.identity, expected, where)
        if shard.step != row.step or shard.role != row.role:
            damaged(where, f"it holds {shard.role!r} of step {shard.step}, {CONFIG} says {row.role!r} of {row.step}")
        if listed != set(shard.tensors):
            odd = sorted(listed ^ set(shard.tensors))
            index = self.store.where(INDEX)
            damaged(index, f"it and {row.file} differ in {len(odd)} tensors, first {short(odd[0])}")
        if not judged:
            refuse_non_finite(shard.tensors, where)
            self._judged[row.file] = version
        return shard.tensors

    def codebook(self) -> Tensor | None:
        """The codebook, (V, D) float32, or None if the run has none;
        ShardError if it is not the one of the run."""
        expected = self.manifest.codebook_hash
        if not expected:
            return None
        return checked_codebook(self._verified(CODEBOOK), expected, self.store.where(CODEBOOK))

    def frozen(self) -> dict[str, Tensor]:
        """Stem and head that all blocks have in common, named as in a block's model; empty if there are none.

        Raises:
            ShardError: they are damaged, or not those of the run.
        """
        expected = self.manifest.frozen_hash
        if not expected:
            return {}
        tensors = decode_frozen(self._verified(FROZEN), expected, self.store.where(FROZEN))
        listed = {name for name, place in self._weight_map.items() if place == FROZEN}
        if odd := sorted(listed ^ tensors.keys()):
            damaged(self.store.where(INDEX), f"it and {FROZEN} differ in {len(odd)} tensors, first {short(odd[0])}")
        return tensors

    @cached_property
    def _weight_map(self) -> dict[str, Any]:
        """File of each tensor, by the index."""
        where = self.store.where(INDEX)
        return Fields(parse_json(self._verified(INDEX), where), where).mapping("weight_map")

    def _verified(self, name: str) -> bytes:
        """Content of a file beside config.json, of the size and hash in there."""
        data, where = self.store.read(name), self.store.where(name)
        record = self.files.get(name)
        if record is None or len(data) != record["size"] or sha256(data) != record["sha256"]:
            damaged(where, f"its {len(data)} bytes are not those recorded in {CONFIG}")
        return data


def checked_codebook(data: bytes, codebook_hash: str, where: str) -> Tensor:
    """Codes (V, D) float32 of a codebook file; ShardError unless their hash is the given one."""
    codes = decode_codebook(data, where)
    actual = tensor_hash(codes)
    if actual != codebook_hash:
        raise ShardError(f"{where} has hash {actual}, the run was trained with {codebook_hash}: restore the run's own")
    return codes
