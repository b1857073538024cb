"""What was found in a class of another library, and what it was given besides, as `plan` prints it."""

import re
from collections.abc import Iterator

from dbtrain.method.interface import BlockModel
from dbtrain.models.adapters.names import is_added


def lines(model: BlockModel) -> Iterator[str]:
    """How the original is cut, and every parameter that it does not have; nothing for a network of ours.

    Args:
        model: model of any block.
    """
    stack = model.stack
    if stack is None:
        return
    last = model.num_layers - 1
    yield (
        f"{stack.original}: its layers are {stack.layers}.0 to {stack.layers}.{last}, its head is "
        f"{', '.join(stack.head)}, and all else is the stem, of which every block has its own"
    )
    added = {
        re.sub(r"^layers\.\d+\.", "layers.N.", name): "x".join(map(str, parameter.shape))
        for name, parameter in model.named_parameters()
        if is_added(name)
    }
    if not added:
        yield f"{stack.original}: nothing is added to its parameters"
        return
    told = ", ".join(f"{name} ({shape})" for name, shape in added.items())
    yield f"{stack.original}: added, which the original does not have: {told}"
