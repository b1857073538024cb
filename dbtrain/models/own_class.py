"""Whether a class of the user's is an architecture, and whether what it makes can be split: told by name."""

import inspect
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from torch import nn

from dbtrain.errors import ConfigError
from dbtrain.method.interface import BlockModel, Likelihood
from dbtrain.method.parametrisation import PARAMETRISATIONS
from dbtrain.method.split import PRIVATE_GROUPS
from dbtrain.models.adapters.find import told

BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
RESERVED = ("arch", "loops")
"""Keys of the section `model` that every architecture has and no constructor is given."""


def check_class(arch: str, kind: type[Any]) -> None:
    """Refuse a class that is no architecture.

    Args:
        arch: its import path, for messages.
        kind: the class.

    Raises:
        ConfigError: it is no `BlockModel`, lacks a method, or its constructor or attributes do not fit.
    """
    if not issubclass(kind, BlockModel):
        seen = f"; {told(kind)}" if issubclass(kind, nn.Module) else ""
        raise ConfigError(
            f"model.arch={arch} is no BlockModel: inherit dbtrain.method.interface.BlockModel (docs/own-network.md)"
            + seen
        )
    missing = sorted(kind.__abstractmethods__)
    if missing:
        raise ConfigError(f"model.arch={arch} lacks {', '.join(missing)}: write what BlockModel says of each")
    if kind.natural_parametrisation not in PARAMETRISATIONS:
        raise ConfigError(
            f"model.arch={arch} has natural_parametrisation={kind.natural_parametrisation!r}, which is none of "
            f"{', '.join(PARAMETRISATIONS)}"
        )
    _check_abilities(arch, kind)
    _check_constructor(arch, kind)


def _check_abilities(arch: str, kind: type[BlockModel]) -> None:
    """What the class says that it can do, before days of training show that a command cannot read it."""
    if not isinstance(kind.takes, tuple) or not all(isinstance(name, str) for name in kind.takes):
        raise ConfigError(f"model.arch={arch} has takes={kind.takes!r}: write a tuple of names, such as ('image',)")
    if kind.codes is not None and not isinstance(kind.codes, str):
        raise ConfigError(f"model.arch={arch} has codes={kind.codes!r}: name the entry of the data, such as 'classes'")
    if kind.samples is not None and kind.samples not in kind.takes:
        raise ConfigError(
            f"model.arch={arch} has samples={kind.samples!r}: name the entry of the data that it draws, one of "
            f"those in takes={kind.takes!r}, such as samples = 'image'"
        )
    known = get_args(Likelihood)
    if kind.likelihood is not None and kind.likelihood not in known:
        raise ConfigError(f"model.arch={arch} has likelihood={kind.likelihood!r}, which is none of {', '.join(known)}")
    if not isinstance(kind.classifies, bool):
        raise ConfigError(f"model.arch={arch} has classifies={kind.classifies!r}: say True or False")


def _check_constructor(arch: str, kind: type[BlockModel]) -> None:
    """What the run gives must be arguments, and every other argument a key with a type."""
    parameters = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any or not all(p.kind in BY_NAME for p in parameters.values()):
        raise ConfigError(
            f"model.arch={arch}: its constructor must name each of its arguments, without * or **: they are the keys "
            "of the section model"
        )
    codes = ("codebook",) if kind.codes else ()
    given = ("noise", "parametrisation", "layers", "depth", *codes, *kind.takes, *kind.may_take)
    absent = [name for name in given if name not in parameters]
    if absent:
        raise ConfigError(
            f"model.arch={arch}: its constructor lacks {', '.join(absent)}, which the run gives (docs/own-network.md)"
        )
    clash = [name for name in RESERVED if name in parameters]
    if clash:
        raise ConfigError(f"model.arch={arch}: its argument {clash[0]} has the name of a key of every model: rename it")
    _check_types(arch, kind, [name for name in parameters if name not in (*given, "codebook") or name == "depth"])


def _check_types(arch: str, kind: type[BlockModel], names: Sequence[str]) -> None:
    try:
        hints = get_type_hints(kind.__init__, include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        raise ConfigError(f"model.arch={arch}: the types of its constructor cannot be read: {error}") from None
    bare = [name for name in names if name not in hints]
    if bare:
        raise ConfigError(
            f"model.arch={arch}: its argument {bare[0]} has no type, by which the key model.{bare[0]} is checked: "
            f"write {bare[0]}: int, or what it is"
        )


def check_network(arch: str, network: nn.Module, layers: Sequence[int]) -> None:
    """Refuse a network that cannot be split into blocks.

    Args:
        arch: for messages.
        network: made with the layers of one block.
        layers: their numbers.

    Raises:
        ConfigError: a parameter is outside of stem, layers and head, other layers were made than those asked
            for, or a buffer would be needed to go on.
    """
    held = dict(getattr(network, "layers", nn.ModuleDict()).named_children())
    if set(held) != set(map(str, layers)):
        raise ConfigError(
            f"model.arch={arch} made the layers {', '.join(held) or 'none'} where {', '.join(map(str, layers))} were "
            "asked for: self.layers is an nn.ModuleDict with the numbers in `layers` as its keys"
        )
    groups = ("layers", *PRIVATE_GROUPS)
    outside = [name for name, _ in network.named_parameters() if name.split(".", 1)[0] not in groups]
    if outside:
        raise ConfigError(
            f"model.arch={arch} has the parameter {outside[0]}, and a block owns those below {', '.join(groups)}: make "
            "it a part of self.stem or self.head"
        )
    kept = [name for name in network.state_dict() if name not in dict(network.named_parameters(remove_duplicate=False))]
    if kept:
        raise ConfigError(
            f"model.arch={arch} has the buffer {kept[0]}, and shards hold parameters alone: register it with "
            "persistent=False if it is a constant; what is learned without gradients, as by BatchNorm, is not kept"
        )
