"""The record that makes a checkpoint exist: COMMIT.json."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import Fields, seal, unseal
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.format import ROLES, Identity, Role, check_identity, shard_of
from dbtrain.shards.safetensors_file import Destination, Raw, read_raw, sha256
from dbtrain.shards.side_by_side import Beside, content_sha256
from dbtrain.shards.storage.content import Content
from dbtrain.shards.storage.errors import DamagedError, MissingError, damaged, is_finite_number, one_line, short
from dbtrain.shards.storage.store import Store

COMMIT = "COMMIT.json"
VERSION = 1

FILE_NAME = re.compile(r"(model|ema|optim)(\.[0-9a-f]{16})?\.safetensors")
STEP_NAME = re.compile(r"step_(\d{8,18})")


class FileRecord(TypedDict):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """Content of COMMIT.json: the files of one checkpoint of one block."""

    step: int
    """Finished optimizer steps."""
    loss: float | None
    """Training loss at that step, if known."""
    attempt: int
    files: dict[str, FileRecord]
    """Size and hash of each file by its name; the role is what stands before the first dot."""
    time: float
    """Seconds since the epoch, by the worker's clock."""
    place: str = ""
    """Copy of the run in which the attempt ran, '' where it is not known; see `run/places.py`."""

    def file_of(self, role: str) -> str | None:
        """Name of the file with this role, None when the checkpoint has none."""
        return next((name for name in self.files if name.split(".", 1)[0] == role), None)

    def digest(self) -> bytes:
        """32 bytes that stand for the content of all files:
        two commits with the same hold the same tensors."""
        content = sorted((name.split(".", 1)[0], record["sha256"]) for name, record in self.files.items())
        return bytes.fromhex(sha256(json.dumps([self.step, content]).encode()))


def step_name(step: int) -> str:
    """Directory of a step, ``step_00020000``."""
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """Inverse of :func:`step_name`; None for any other name."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def check_values(step: int, loss: float | None, attempt: int) -> None:
    """Raise ShardError for values that COMMIT.json could not tell."""
    if step < 0 or attempt < 0:
        raise ShardError(f"cannot commit step={step} of attempt={attempt}: both must be >= 0")
    if loss is not None and not is_finite_number(loss):
        raise ShardError(f"cannot commit step {step} with loss={loss!r}: give a finite loss, or None")


def dump_commit(commit: Commit, where: str) -> bytes:
    """The bytes of COMMIT.json."""
    content = {field.name: getattr(commit, field.name) for field in fields(commit)}
    return seal({name: value for name, value in content.items() if value != ""}, VERSION, where)


def parse_commit(data: bytes, where: str) -> Commit:
    """Read COMMIT.json; DamagedError if anything in it is not as :func:`dump_commit` writes it."""
    content = unseal(data, VERSION, where)
    fields = Fields(content, where)
    loss = None if content.get("loss", 0) is None else fields.number("loss")
    commit = Commit(
        step=fields.integer("step"),
        loss=loss,
        attempt=fields.integer("attempt"),
        files=parse_files(fields.mapping("files"), where),
        time=fields.number("time"),
        place=fields.text("place") if "place" in content else "",
    )
    roles = [name.split(".", 1)[0] for name in commit.files]
    odd = [name for name in commit.files if not FILE_NAME.fullmatch(name)]
    if odd or len(set(roles)) != len(roles) or "model" not in roles:
        damaged(where, f"its files {short(list(commit.files))} are not one model and at most one of each other role")
    return commit


def parse_files(data: Mapping[str, Any], where: str) -> dict[str, FileRecord]:
    """Size and hash of each file named in a record."""
    files: dict[str, FileRecord] = {}
    for name, value in data.items():
        record = Fields(value, f"{where}, entry {short(name)},")
        files[name] = FileRecord(size=record.integer("size"), sha256=record.text("sha256"))
    return files


NAME_DIGITS = 16
"""Hex digits of the content in the name of a shard whose plain name was taken."""


def read_commit(folder: Store, step: int) -> Commit:
    """COMMIT.json of a step's directory; MissingError or DamagedError."""
    return check_commit(folder.read(COMMIT), folder, step)


def check_commit(record: bytes, folder: Store, step: int) -> Commit:
    """The content of COMMIT.json in a step's directory; DamagedError if it is damaged or of another step."""
    commit = parse_commit(record, folder.where(COMMIT))
    if commit.step != step:
        damaged(folder.where(COMMIT), f"it is of step {commit.step}")
    return commit


def read_part(folder: Store, commit: Commit, name: str, identity: Identity) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint. Bytes are judged before meaning:
    a flipped bit is not another run's shard.

    Raises:
        MissingError: there is no such file.
        DamagedError: size, hash, role or step are not those of the commit, or a value is NaN or infinite.
        ShardError: undamaged, but of another run, block, config or codebook; or it cannot be read.
    """
    raw = read_vouched(folder, name, commit.files[name], COMMIT)
    return _judged(raw, commit, name, identity, folder.where(name))


def _judged(raw: Raw, commit: Commit, name: str, identity: Identity, where: str) -> dict[str, Tensor]:
    shard = shard_of(raw, where)
    check_identity(shard.identity, identity, where)
    if shard.step != commit.step or shard.role != name.split(".", 1)[0]:
        damaged(where, f"it holds {shard.role!r} of step {shard.step}, {COMMIT} has {name!r} of step {commit.step}")
    refuse_non_finite(shard.tensors, where)
    return shard.tensors


def read_vouched(
    folder: Store, name: str, record: FileRecord, voucher: str, to: Destination | None = None, hashed: bool = True
) -> Raw:
    """A shard file whose size and hash are recorded; each of its bytes is read and hashed once.

    Args:
        record: record of the file.
        voucher: the file that says so, for messages.
        to: where the tensors shall lie, by default in host memory.
        hashed: False for a file that was read by this function before and has not changed since.

    Raises:
        MissingError: there is no such file.
        DamagedError: it is not the file that was recorded.
        ShardError: it cannot be read.
    """
    where = folder.where(name)
    with folder.reading(name) as file:
        if file.size != record["size"]:
            damaged(where, f"it has {file.size} bytes, {voucher} says {record['size']}")
        raw = read_raw(file, where, to, hashed)
    if hashed and raw.sha256 != record["sha256"]:
        damaged(where, f"its SHA-256 is not the one in {voucher} (a flipped bit)")
    return raw


def find_problems(folder: Store, step: int, identity: Identity) -> list[str]:
    """Everything that is wrong with the checkpoint in a directory, one line each; [] if nothing is.

    Raises:
        ShardError: the storage cannot be reached.
    """
    try:
        record = folder.read(COMMIT)
    except MissingError as err:
        return [one_line(err)]
    try:
        commit = check_commit(record, folder, step)
    except ShardError as err:
        return [one_line(err)]
    problems = [_problem(folder, commit, name, identity) for name in commit.files]
    return [problem for problem in problems if problem is not None]


def _problem(folder: Store, commit: Commit, name: str, identity: Identity) -> str | None:
    try:
        raw = read_vouched(folder, name, commit.files[name], COMMIT)
    except (MissingError, DamagedError) as err:
        return one_line(err)
    try:
        _judged(raw, commit, name, identity, folder.where(name))
    except ShardError as err:
        return one_line(err)
    return None


def store_shard(folder: Store, role: Role, content: Content) -> tuple[str, FileRecord]:
    """Store a shard under a name that holds exactly these bytes; no file is overwritten by other content."""
    plain = f"{role}.safetensors"
    hashing = Beside(lambda: content_sha256(content))
    # Asking first saves writing a whole temporary file only to find the name taken; create() decides.
    created = not folder.exists(plain) and folder.create(plain, content)
    digest = hashing.result()
    record = FileRecord(size=len(content), sha256=digest)
    if created:
        return plain, record
    with contextlib.suppress(MissingError):
        if folder.size(plain) == len(content) and folder.sha256(plain) == digest:
            return plain, record
    other = f"{role}.{digest[:NAME_DIGITS]}.safetensors"
    folder.write(other, content)
    return other, record


def check_parts(parts: Mapping[Role, Mapping[str, Tensor]]) -> None:
    """Raise ShardError at once for what would be found out only by a merge or a resume weeks later."""
    unknown = set(parts) - set(ROLES)
    if unknown or not parts.get("model"):
        raise ShardError(f"parts {sorted(parts)} must have a non-empty 'model' and otherwise only {', '.join(ROLES)}")
    shapes = {name: tensor.shape for name, tensor in parts["model"].items()}
    averaged = {name: tensor.shape for name, tensor in parts.get("ema", parts["model"]).items()}
    if averaged != shapes:
        odd = sorted(name for name in shapes.keys() | averaged.keys() if shapes.get(name) != averaged.get(name))
        raise ShardError(f"'ema' and 'model' differ in {len(odd)} names or shapes, first {odd[0]!r}: average all of it")
    strays = sorted(name for name in parts.get("optim", {}) if name.partition("/")[2] not in shapes)
    if strays:
        raise ShardError(f"optimizer tensor {strays[0]!r} is of no model parameter: name it '<state>/<global name>'")
