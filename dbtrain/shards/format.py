"""What is in a shard: the tensors of one block in one role, and whose they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.method.content import tensor_hash
from dbtrain.method.split import local_name
from dbtrain.shards.checksummed_json import Fields
from dbtrain.shards.safetensors_file import Raw, as_file, record_of, sha256, unpack
from dbtrain.shards.storage.content import Content, Reader
from dbtrain.shards.storage.errors import damaged, short

__all__ = [
    "ROLES",
    "Identity",
    "Role",
    "Shard",
    "check_identity",
    "decode",
    "decode_codebook",
    "encode",
    "encode_codebook",
    "sha256",
    "shard_of",
    "tensor_hash",
]

Role = Literal["model", "ema", "optim"]
ROLES: tuple[Role, ...] = get_args(Role)
RESERVED_ROLES = ("adapter",)
"""Roles of versions to come: what is trained beside weights that are not. Refused by name until then."""


@dataclass(frozen=True)
class Identity:
    """Whose tensors these are: what binds a shard to its run. An instance is always valid.

    How long and in which batches a block was trained does not bind:
    it may differ by block, and a run may be extended.

    Raises:
        ShardError: a field is out of its range.
    """

    run: str
    """Name of the run, not empty."""
    block: int
    """0 <= block < blocks; block 0 holds the first layers."""
    blocks: int
    layers: tuple[int, int]
    """Half-open run of layer numbers in the whole model."""
    levels: tuple[str, str]
    """Low and high end of the noise levels as hex floats (``float.hex``), which lose no bit."""
    architecture_hash: str
    """Hash of what a weight means: the network and its parametrisation."""
    codebook_hash: str
    """``tensor_hash`` of the codebook, '' when there is none."""
    data_hash: str = ""
    """Hash of the content of the data, '' where it is not known."""
    frozen_hash: str = ""
    """Hash of the stem and head that no block trains, '' where every block has its own."""

    def __post_init__(self) -> None:
        if not self.run:
            _invalid("run", self.run, "not empty")
        if not 0 <= self.block < self.blocks:
            _invalid("block", self.block, f"from 0 to blocks - 1 = {self.blocks - 1}")
        if not (len(self.layers) == 2 and 0 <= self.layers[0] < self.layers[1]):
            _invalid("layers", self.layers, "(first, last + 1) with 0 <= first <= last")
        check_levels(self.levels)

    @property
    def edges(self) -> tuple[float, float]:
        """Low and high level as floats, exactly."""
        return float.fromhex(self.levels[0]), float.fromhex(self.levels[1])


def check_levels(levels: tuple[str, str]) -> None:
    """Raise ShardError unless this is (low, high) as finite hex floats with 0 <= low < high."""
    try:
        low, high = (float.fromhex(text) for text in levels)
    except (ValueError, TypeError, OverflowError):
        _invalid("levels", levels, "two hex floats, as float.hex() writes them")
    if not 0 <= low < high < float("inf"):
        _invalid("levels", levels, "finite with 0 <= low < high")


def _invalid(field: str, value: object, wanted: str) -> None:
    raise ShardError(f"identity of a shard: {field}={short(value)} must be {wanted}")


@dataclass(frozen=True)
class Shard:
    """A decoded shard file; ``tensors`` are CPU tensors by
    global name (``<state>/<global name>`` for ``optim``)."""

    tensors: dict[str, Tensor]
    identity: Identity
    step: int
    role: Role


def encode(tensors: Mapping[str, Tensor], identity: Identity, step: int, role: Role) -> Content:
    """A shard file: safetensors, equal bytes for equal tensors, which must not change until it is written.

    Args:
        tensors: any shapes; global names of this block, prefixed by ``<state>/`` for the role ``optim``.
        step: finished optimizer steps, >= 0.

    Raises:
        ShardError: a name that this block does not own, a negative step, a tensor that cannot be stored.
    """
    where = f"{role} shard of block {identity.block}"
    if role not in ROLES or isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ShardError(f"{where}: step={step!r} must be an integer >= 0 and the role one of {', '.join(ROLES)}")
    problem = misnamed(tensors, identity, role)
    if problem:
        raise ShardError(f"{where}: {problem}; name tensors by method.split.global_name")
    return as_file(tensors, {"kind": "shard", "step": step, "role": role, "identity": _as_fields(identity)}, where)


def decode(data: bytes | Reader, *, where: str) -> Shard:
    """Read a shard file; what comes back is exactly what was encoded. ``where`` names the file in messages.

    Raises:
        DamagedError (a ShardError): torn, flipped, hostile, a pickle, or not a shard of dbtrain.
        ShardError: undamaged, but of another format version.
    """
    tensors, record = unpack(data, where)
    return Shard(tensors, *whose(record, tensors, where))


def shard_of(raw: Raw, where: str) -> Shard:
    """The shard in a file whose bytes a record vouches for; raises as :func:`decode` does."""
    return Shard(raw.tensors, *whose(record_of(raw, where), raw.tensors, where))


def whose(record: Mapping[str, Any], names: Iterable[str], where: str) -> tuple[Identity, int, Role]:
    """Identity, step and role of a shard, from the record in its metadata and the names of its tensors.

    Raises:
        DamagedError: it is no shard, or holds a tensor that its block does not own.
        ShardError: it is undamaged, and of a newer version of dbtrain.
    """
    fields = Fields(record, where)
    if fields.text("kind") != "shard":
        damaged(where, f"it holds a {short(record['kind'])}, not a shard")
    role, step = fields.text("role"), fields.integer("step")
    if role in RESERVED_ROLES:
        raise ShardError(f"{where} holds the role {role!r}, which a newer version of dbtrain writes: read it with that")
    if role not in ROLES:
        damaged(where, f"role={short(role)} is none of {', '.join(ROLES)}")
    identity = identity_of(record, where)
    problem = misnamed(names, identity, role)
    if problem:
        damaged(where, problem)
    return identity, step, next(known for known in ROLES if known == role)


def misnamed(names: Iterable[str], identity: Identity, role: str) -> str | None:
    """Why a tensor name does not belong into this shard, or None."""
    for name in names:
        state, slash, bare = name.partition("/")
        if role == "optim" and not (state and slash):
            return f"optimizer tensor {short(name)} is not named '<state>/<parameter>'"
        if not _owns(identity, bare if role == "optim" else name):
            first, end = identity.layers
            return f"tensor {short(name)} is not of block {identity.block} (layers {first} to {end - 1})"
    return None


def _owns(identity: Identity, name: str) -> bool:
    try:
        group, *rest = local_name(identity.block, name).split(".")
    except ValueError:
        return False
    if group != "layers":
        return True
    return bool(rest) and rest[0].isdecimal() and len(rest[0]) < 10 and int(rest[0]) in range(*identity.layers)


def check_identity(stored: Identity, expected: Identity, where: str) -> None:
    """Raise ShardError naming every field that differs, with both values; None if they are equal."""
    differing = [
        f"{field.name} is {getattr(stored, field.name)!r}, expected {getattr(expected, field.name)!r}"
        for field in fields(Identity)
        if getattr(stored, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise ShardError(f"{where} belongs elsewhere: {'; '.join(differing)}; use the run directory it came from")


def _as_fields(identity: Identity) -> dict[str, Any]:
    content = {field.name: getattr(identity, field.name) for field in fields(Identity)}
    # so that shards without frozen parts keep the bytes that they have always had
    return {name: value for name, value in content.items() if value or name != "frozen_hash"}


def identity_of(record: Mapping[str, Any], where: str) -> Identity:
    """Identity in the record of a shard file; DamagedError if there is none."""
    data = Fields(dict(record), where).mapping("identity")
    fields = Fields(data, where)
    layers, levels = fields.items("layers"), fields.items("levels")
    if len(layers) != 2 or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        fields.reject("layers", "two integers")
    if len(levels) != 2 or not all(isinstance(level, str) for level in levels):
        fields.reject("levels", "two hex floats")
    try:
        return Identity(
            run=fields.text("run"),
            block=fields.integer("block"),
            blocks=fields.integer("blocks", low=1),
            layers=(layers[0], layers[1]),
            levels=(levels[0], levels[1]),
            architecture_hash=fields.text("architecture_hash"),
            codebook_hash=fields.text("codebook_hash"),
            data_hash=fields.text("data_hash"),
            frozen_hash=fields.text("frozen_hash") if "frozen_hash" in data else "",
        )
    except ShardError as err:
        damaged(where, str(err))


def encode_codebook(codes: Tensor) -> bytes:
    """File of the common target codes, (V, D) float32 and finite; ShardError for anything else."""
    problem = _not_codes(codes)
    if problem:
        raise ShardError(f"codebook: {problem}; build it with one of the codebook sources")
    return as_file({"codes": codes}, {"kind": "codebook"}, "codebook")[:]


def decode_codebook(data: bytes, where: str) -> Tensor:
    """Inverse of :func:`encode_codebook`: (V, D) float32; DamagedError if the file is not one."""
    tensors, record = unpack(data, where)
    if record.get("kind") != "codebook" or set(tensors) != {"codes"}:
        damaged(where, f"it holds a {short(record.get('kind'))}, not a codebook")
    problem = _not_codes(tensors["codes"])
    if problem:
        damaged(where, problem)
    return tensors["codes"]


def _not_codes(codes: Tensor) -> str | None:
    if codes.dim() != 2 or codes.dtype != torch.float32 or 0 in codes.shape:
        return f"shape {tuple(codes.shape)} and {codes.dtype} must be (V, D) and torch.float32"
    return None if bool(torch.isfinite(codes).all()) else "it has codes that are NaN or infinite"
