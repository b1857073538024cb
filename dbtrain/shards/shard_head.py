"""What a shard says of itself, from its header alone: before its tensors are taken from elsewhere."""

from collections.abc import Callable

from dbtrain.shards.checksummed_json import parse_json, unseal
from dbtrain.shards.commit import COMMIT, Commit
from dbtrain.shards.format import Identity, Role, whose
from dbtrain.shards.safetensors_file import FORMAT_VERSION, HEADER_LIMIT, layout, refuse_pickle, sealed_record
from dbtrain.shards.storage.errors import damaged

LENGTH_BYTES = 8
"""Size of the number at the beginning of a safetensors file, which is the length of its header."""
FIRST_BYTES = 16
"""Enough to tell a pickle and a zip from a safetensors file."""

ReadPart = Callable[[int, int], bytes]
"""(start, size) -> so many bytes of a file, fewer at its end."""


def read_head(read: ReadPart, size: int, where: str) -> tuple[Identity, int, Role]:
    """Identity, step and role of a shard of ``size`` bytes; none of its tensors is read.

    Raises:
        DamagedError: a pickle, a zip, no shard, torn, or a header whose tensors do not fill the file exactly.
        ShardError: undamaged, but of another version.
    """
    first = read(0, FIRST_BYTES)
    refuse_pickle(first, where)
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < FIRST_BYTES or length > min(size - LENGTH_BYTES, HEADER_LIMIT):
        damaged(where, f"{size} bytes cannot hold a safetensors header of {length} bytes")
    header = parse_json(read(LENGTH_BYTES, length), where)
    sealed = sealed_record(header, where)
    record = unseal(sealed.encode("utf-8", "surrogatepass"), FORMAT_VERSION, f"{where} (metadata)")
    names = [name for name, _, _ in layout(header, size - LENGTH_BYTES - length, where)]
    return whose(record, names, where)


def check_head(commit: Commit, name: str, read: ReadPart, where: str) -> Identity:
    """Identity of one file of a checkpoint, whose step and role must be those of the commit.

    Raises:
        ShardError: see :func:`read_head`; or another step or role.
    """
    identity, step, role = read_head(read, commit.files[name]["size"], where)
    if step != commit.step or role != name.split(".", 1)[0]:
        damaged(where, f"it holds {role!r} of step {step}, {COMMIT} has {name!r} of step {commit.step}")
    return identity
