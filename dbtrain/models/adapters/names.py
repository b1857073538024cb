"""The one-to-one correspondence between an original's names of its parameters and those in our shards.

`layers.3.<rest>` is `<list>.3.<rest>` of the original; `stem.<name>` and `head.<name>` keep the original name
whole. What the original does not have has the part `added` in its name.
"""

from dbtrain.models.adapters.stack import ADDED, Stack


def is_added(name: str) -> bool:
    """Whether the original has no such parameter; by the name in a block's model."""
    return ADDED in name.split(".")


def our_name(stack: type[Stack], original: str) -> str:
    """What a parameter of the original is called in a block's model."""
    if original.startswith(f"{stack.layers}."):
        return f"layers.{original.removeprefix(f'{stack.layers}.')}"
    is_head = any(original == part or original.startswith(f"{part}.") for part in stack.head)
    return f"{'head' if is_head else 'stem'}.{original}"


def from_file(stack: type[Stack], name: str) -> str:
    """The original's name of a tensor in a file of its library, which may have an older version's names."""
    renamed = getattr(stack, "from_file", None)
    return str(renamed(name)) if renamed else name


def original_name(stack: type[Stack], name: str) -> str:
    """Inverse of :func:`our_name`, for a name that a block's model has.

    Raises:
        ValueError: the original has no such parameter.
    """
    group, _, rest = name.partition(".")
    if is_added(name) or group not in ("stem", "layers", "head"):
        raise ValueError(f"{name!r} is no parameter of the original")
    return f"{stack.layers}.{rest}" if group == "layers" else rest
