"""The record that makes a checkpoint exist: COMMIT.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import Fields, seal, unseal
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import damaged, is_finite_number, short

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
    """By file name; the role is what stands before the first dot."""
    time: float
    """Seconds since the epoch, by the worker's clock."""

    def file_of(self, role: str) -> str | None:
        """Name of the file with this role, None when the checkpoint has none."""
        return next((name for name in self.files if name.split(".", 1)[0] == role), None)

    def digest(self) -> bytes:
        """32 bytes that stand for the content of all files: two commits with the same hold the same tensors."""
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
    return seal({field.name: getattr(commit, field.name) for field in fields(commit)}, VERSION, where)


def parse_commit(data: bytes, where: str) -> Commit:
    """Read COMMIT.json; DamagedError if anything in it is not as :func:`dump_commit` writes it."""
    content = unseal(data, VERSION, where)
    found = Fields(content, where)
    loss = None if content.get("loss", 0) is None else found.number("loss")
    commit = Commit(
        step=found.integer("step"),
        loss=loss,
        attempt=found.integer("attempt"),
        files=parse_files(found.mapping("files"), where),
        time=found.number("time"),
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
