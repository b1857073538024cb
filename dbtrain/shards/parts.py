"""The files of one checkpoint directory: put there without overwriting, taken from there only when they verify."""

import contextlib
from collections.abc import Mapping

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.shards.commit import COMMIT, Commit, FileRecord, parse_commit
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.format import ROLES, Identity, Role, check_identity, decode
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import MissingError, damaged, one_line
from dbtrain.shards.storage.store import Store

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
    """Tensors of one file of a checkpoint; see :func:`decode_part`, and ShardError when the file cannot be read."""
    return decode_part(folder.read(name), commit, name, identity, folder.where(name))


def decode_part(data: bytes, commit: Commit, name: str, identity: Identity, where: str) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint. Bytes are judged before meaning: a flipped bit is not another run's shard.

    Raises:
        DamagedError: size, hash, role or step are not those of the commit, or a value is NaN or infinite.
        ShardError: undamaged, but of another run, block, config or codebook.
    """
    record = commit.files[name]
    if len(data) != record["size"]:
        damaged(where, f"it has {len(data)} bytes, {COMMIT} says {record['size']}")
    if sha256(data) != record["sha256"]:
        damaged(where, f"its SHA-256 is not the one in {COMMIT} (a flipped bit)")
    shard = decode(data, where=where)
    check_identity(shard.identity, identity, where)
    if shard.step != commit.step or shard.role != name.split(".", 1)[0]:
        damaged(where, f"it holds {shard.role!r} of step {shard.step}, {COMMIT} has {name!r} of step {commit.step}")
    refuse_non_finite(shard.tensors, where)
    return shard.tensors


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
    found = [_problem(folder, commit, name, identity) for name in commit.files]
    return [problem for problem in found if problem is not None]


def _problem(folder: Store, commit: Commit, name: str, identity: Identity) -> str | None:
    try:
        data = folder.read(name)
    except MissingError as err:
        return one_line(err)
    try:
        decode_part(data, commit, name, identity, folder.where(name))
    except ShardError as err:
        return one_line(err)
    return None


def place(folder: Store, role: Role, data: bytes) -> tuple[str, FileRecord]:
    """Store a shard under a name that holds exactly these bytes; no file is overwritten by other content."""
    digest = sha256(data)
    record = FileRecord(size=len(data), sha256=digest)
    plain = f"{role}.safetensors"
    # Asking first saves writing a whole temporary file only to find the name taken; create() decides.
    if not folder.exists(plain) and folder.create(plain, data):
        return plain, record
    with contextlib.suppress(MissingError):
        if folder.size(plain) == len(data) and folder.read(plain) == data:
            return plain, record
    other = f"{role}.{digest[:NAME_DIGITS]}.safetensors"
    folder.write(other, data)
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
