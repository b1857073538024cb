"""frozen.safetensors: stem and head that no block trains, stored once for all blocks beside the codebook."""

from collections.abc import Mapping

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.method.content import content_hash
from dbtrain.method.split import PRIVATE_GROUPS
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.safetensors_file import as_file, unpack
from dbtrain.shards.storage.errors import damaged, short

FROZEN = "frozen.safetensors"
KIND = "frozen"


def encode_frozen(tensors: Mapping[str, Tensor]) -> bytes:
    """File of the parts, named as in a block's model (``stem.*``, ``head.*``); ShardError for other names."""
    if odd := _odd(tensors):
        raise ShardError(f"{FROZEN} cannot hold {short(odd)}: only stem and head can be frozen")
    return as_file(tensors, {"kind": KIND}, FROZEN)[:]


def decode_frozen(data: bytes, frozen_hash: str, where: str) -> dict[str, Tensor]:
    """Inverse of :func:`encode_frozen`.

    Args:
        frozen_hash: :func:`frozen_hash_of` the run's parts.

    Raises:
        DamagedError: torn, flipped or not such a file.
        ShardError: undamaged, but of another run.
    """
    tensors, record = unpack(data, where)
    if record.get("kind") != KIND or not tensors or _odd(tensors):
        damaged(where, f"it holds a {short(record.get('kind'))} of {len(tensors)} tensors, not frozen stems and heads")
    actual = frozen_hash_of(tensors)
    if actual != frozen_hash:
        raise ShardError(f"{where} has hash {actual}, the run was trained with {frozen_hash}: restore the run's own")
    refuse_non_finite(tensors, where)
    return tensors


def frozen_hash_of(tensors: Mapping[str, Tensor]) -> str:
    """64 hex digits of names, shapes, types and contents; '' for no tensor."""
    return content_hash(tensors) if tensors else ""


def _odd(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name in tensors if name.split(".", 1)[0] not in PRIVATE_GROUPS), None)
