"""A packed file: checkpoints of a run's blocks in one file, which is carried to a place that shares nothing.

It begins with the size and SHA-256 of everything in it, so that all of it is judged before anything is
written, and it is read in pieces, from a disk or a URL. It is no tar and no zip on purpose: those can hold
links, modes, sparse files and any path, each of which would have to be refused. This one has no words for
them:

    8 bytes     b"dbtrpack"
    8 bytes     length of the header, little-endian
    header      sealed JSON: {"kind": "packed", "entries": [{"name", "size", "sha256"}, ...]}
    contents    of the entries, one after the other, and nothing behind them

Names are those in a run's directory, and only of run.json, of COMMIT.json and of shards.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NoReturn

from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import Fields, seal, unseal
from dbtrain.shards.commit import COMMIT, FILE_NAME, Commit, parse_commit, step_name, step_number
from dbtrain.shards.manifest import MANIFEST, Manifest, parse_manifest
from dbtrain.shards.storage.errors import damaged, short
from dbtrain.shards.storage.store import Store

MAGIC = b"dbtrpack"
PREFIX = 16
"""Bytes before the header."""
VERSION = 1
JSON_LIMIT = 16 << 20
"""Bytes that the header, or an entry of JSON, may have; they are read at once."""
PIECE = 8 << 20
"""Bytes of a file that are in memory at a time."""
NAME = re.compile(r"blocks/(\d{2,6})/([a-z0-9_]+)/([A-Za-z0-9._]+)")
DIGEST = re.compile(r"[0-9a-f]{64}")
OTHERS = {b"\x80": "a pickle", b"PK\x03\x04": "a zip", b"\x1f\x8b": "a gzip", b"{": "JSON"}
"""How files begin that people may take for a packed one."""


@dataclass(frozen=True)
class Entry:
    """A file in a packed file."""

    name: str
    """Path below the run's directory."""
    size: int
    sha256: str

    @property
    def commit_of(self) -> tuple[int, int] | None:
        """Block and step, if this is a COMMIT.json."""
        match = NAME.fullmatch(self.name)
        step = step_number(match[2]) if match and match[3] == COMMIT else None
        return None if match is None or step is None else (int(match[1]), step)

    @property
    def is_allowed(self) -> bool:
        """Whether it is run.json, a COMMIT.json or a shard, where a run has it."""
        match = NAME.fullmatch(self.name)
        if match is None:
            return self.name == MANIFEST
        placed = f"{int(match[1]):02d}" == match[1] and step_number(match[2]) is not None
        return placed and (match[3] == COMMIT or FILE_NAME.fullmatch(match[3]) is not None)


def entry_name(block: int, step: int, file: str) -> str:
    """Name of a file of a checkpoint in a packed file."""
    return f"blocks/{block:02d}/{step_name(step)}/{file}"


def pieces(read: Callable[[int, int], bytes], size: int) -> Iterator[bytes]:
    """The content of a file of ``size`` bytes, of which ``read(start, size)`` gives parts."""
    for start in range(0, size, PIECE):
        yield read(start, min(PIECE, size - start))


def verified(content: Iterable[bytes], size: int, digest: str, where: str) -> Iterator[bytes]:
    """The pieces as they are; at their end DamagedError if they are not of this size and SHA-256 (hex)."""
    actual, count = hashlib.sha256(), 0
    for piece in content:
        actual.update(piece)
        count += len(piece)
        yield piece
    if count != size:
        damaged(where, f"it has {count} bytes, its record says {size}")
    if actual.hexdigest() != digest:
        damaged(where, "its SHA-256 is not the recorded one (a flipped bit)")


def write_packed(store: Store, name: str, contents: Mapping[Entry, Callable[[], Iterable[bytes]]]) -> str:
    """Write a packed file, each entry verified on its way; returns the SHA-256 (hex) of the whole file.

    Args:
        store: directory of the file.
        name: name of the file.
        contents: what each entry holds, in pieces.

    Raises:
        DamagedError: a content is not that of its entry; the file is as it was before, or there is none.
        ShardError: the storage fails.
    """
    head = seal({"kind": "packed", "entries": [asdict(entry) for entry in contents]}, VERSION, store.where(name))
    whole = hashlib.sha256()

    def everything() -> Iterator[bytes]:
        yield MAGIC + len(head).to_bytes(PREFIX - len(MAGIC), "little") + head
        for entry, content in contents.items():
            yield from verified(content(), entry.size, entry.sha256, entry.name)

    def hashed() -> Iterator[bytes]:
        nonlocal whole
        whole = hashlib.sha256()  # anew, should an upload be tried again
        for piece in everything():
            whole.update(piece)
            yield piece

    store.write_stream(name, hashed)
    return whole.hexdigest()


def is_packed(store: Store, name: str) -> bool:
    """Whether a file begins as packed ones do."""
    return store.size(name) >= PREFIX and store.read_range(name, 0, len(MAGIC)) == MAGIC


class PackedFile:
    """A packed file, whose entries have all been judged by name, size and commit.

    Args:
        store: directory of the file.
        name: name of the file.

    Raises:
        DamagedError: it was cut off or changed, or it holds what a packed file may not hold.
        ShardError: it is no packed file, or one of another version.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.where = store, name, store.where(name)
        length, size = self._header_length()
        header = unseal(store.read_range(name, PREFIX, length), VERSION, self.where)
        self.entries = _entries(header, self.where)
        self._starts: dict[str, int] = {}
        end = PREFIX + length
        for entry in self.entries.values():
            self._starts[entry.name] = end
            end += entry.size
        if size < end:
            self._cut_off(size, end)
        if size > end:
            damaged(self.where, f"it has {size - end} bytes more than its header states")
        self.commits = self._commits()
        """The checkpoint of each block that is in here."""

    def _header_length(self) -> tuple[int, int]:
        """Bytes of the header, and of the file."""
        size = self.store.size(self.name)
        first = self.store.read_range(self.name, 0, PREFIX) if size else b""
        if not first.startswith(MAGIC):
            what = next((kind for start, kind in OTHERS.items() if first.startswith(start)), "something else")
            raise ShardError(
                f"{self.where} is no packed file but {what}: give a file that dbtrain pack made, or a run's directory"
            )
        length = int.from_bytes(first[len(MAGIC) :], "little")
        if length > JSON_LIMIT:
            damaged(self.where, f"a header of {length} bytes is too long")
        if length > size - PREFIX:
            self._cut_off(size, PREFIX + length)
        return length, size

    def _cut_off(self, size: int, least: int) -> NoReturn:
        damaged(self.where, f"it has {size} of {least} bytes, so it was cut off; carry it again")

    def read_part(self, name: str, start: int, size: int) -> bytes:
        """A part of an entry; fewer bytes where the entry ends."""
        size = min(size, self.entries[name].size - start)
        return self.store.read_range(self.name, self._starts[name] + start, size) if size > 0 else b""

    def _json(self, name: str) -> bytes:
        """A whole entry of JSON, verified."""
        entry, where = self.entries[name], f"{self.where}: {name}"
        if entry.size > JSON_LIMIT:
            damaged(where, f"{entry.size} bytes are too many for it")
        return b"".join(verified([self.read_part(name, 0, entry.size)], entry.size, entry.sha256, where))

    @cached_property
    def manifest(self) -> Manifest:
        """The run that the blocks are of.

        Raises:
            ShardError: it is damaged or of another version.
        """
        return parse_manifest(self._json(MANIFEST), f"{self.where}: {MANIFEST}")

    def _commits(self) -> dict[int, Commit]:
        commits: dict[int, Commit] = {}
        for entry in self.entries.values():
            if (of := entry.commit_of) is None:
                continue
            block, step = of
            commit = parse_commit(self._json(entry.name), f"{self.where}: {entry.name}")
            if block in commits or commit.step != step:
                damaged(self.where, f"{entry.name} is of step {commit.step}, or not the only one of block {block}")
            commits[block] = commit
        self._check_shards(commits)
        return commits

    def _check_shards(self, commits: Mapping[int, Commit]) -> None:
        """Every shard has size and hash of a commit, and none is missing."""
        stated = {
            entry_name(block, commit.step, file): (record["size"], record["sha256"])
            for block, commit in commits.items()
            for file, record in commit.files.items()
        }
        shards = {e.name: (e.size, e.sha256) for e in self.entries.values() if e.name.endswith(".safetensors")}
        odd = sorted(name for name in stated.keys() | shards.keys() if stated.get(name) != shards.get(name))
        if odd or MANIFEST not in self.entries:
            damaged(self.where, f"{odd[0] if odd else MANIFEST} is missing, or not what the {COMMIT} beside it says")


def _entries(header: Mapping[str, Any], where: str) -> dict[str, Entry]:
    """The entries by name, in their order; refused are names and fields that a packed file does not have."""
    fields = Fields(dict(header), where)
    if fields.text("kind") != "packed":
        damaged(where, f"it holds a {short(header['kind'])}")
    entries: dict[str, Entry] = {}
    for row in fields.items("entries"):
        fields = Fields(row, f"{where}, an entry,")
        entry = Entry(fields.text("name"), fields.integer("size"), fields.text("sha256"))
        if set(row) != {"name", "size", "sha256"} or not DIGEST.fullmatch(entry.sha256):
            damaged(where, f"its entry {short(row)} is not a name, a size and a SHA-256")
        if not entry.is_allowed or entry.name in entries:
            damaged(
                where,
                f"it holds {short(entry.name)}, and a packed file holds only {MANIFEST}, each block's {COMMIT} and "
                "shards (.safetensors), once each; nothing was taken from it",
            )
        entries[entry.name] = entry
    return entries
