"""Whether the tensors of a shard are those that the model wants,
and numbers: hashes can be right and both can fail."""

from collections.abc import Mapping

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.shards.storage.errors import damaged, short

SHOWN = 3
"""Tensors that one message names."""


def refuse_non_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise DamagedError if a tensor (any shape) holds NaN or infinity:
    nothing can be resumed or merged from it."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        # of one byte a value only float32 copies can be asked
        values = tensor.float() if tensor.element_size() == 1 else tensor
        # the extremes are NaN where any value is, and cost no memory of the tensor's size
        if not all(end.isfinite() for end in values.aminmax()):
            wrong = int((~values.isfinite()).sum())
            damaged(where, f"tensor {short(name)} holds {wrong} of {tensor.numel()} values that are NaN or infinite")


def check_fit(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], required: frozenset[str], block: int, where: str
) -> None:
    """Compare names, shapes and types of a shard with the model's.

    Args:
        tensors: the shard's tensors, by the names of the model.
        wanted: the model's, by the same names; their values are not looked at.
        required: names of ``wanted`` that this shard must hold.
        block: number of the shard's block, for the message.
        where: its file, for the message.

    Raises:
        ShardError: a tensor is missing, is not of the model,
            or has another shape or type; all in one message.
    """
    wrong = [f"{name} is missing, expected {_kind(wanted[name])}" for name in sorted(required - tensors.keys())]
    for name, tensor in sorted(tensors.items()):
        if name not in wanted:
            wrong.append(f"{short(name)} ({_kind(tensor)}) is no tensor of the model")
        elif (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
            wrong.append(f"{name} is {_kind(tensor)}, expected {_kind(wanted[name])}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ShardError(
            f"block {block}: {where} does not fit the model of this run: {'; '.join(wrong[:SHOWN])}{more}; its hash is "
            "right, so it was written like this: restore it from a copy, or remove its checkpoint (the step_... "
            "directory) and run the same train command, which trains the block on from the commit before; then merge "
            "again"
        )


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'a scalar'} of {str(tensor.dtype).removeprefix('torch.')}"
