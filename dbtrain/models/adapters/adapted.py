"""How a `Stack` becomes an architecture: the class of its task, with what the stack says of itself."""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.method.interface import BlockModel
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.adapters.settings import read_settings
from dbtrain.models.adapters.stack import NO_DEFAULTS, Stack, Task
from dbtrain.models.adapters.tasks import Classifier, Denoiser, NextToken

TASKS: Mapping[Task, type[BlockModel]] = {"classify": Classifier, "denoise": Denoiser, "continue": NextToken}


PARAMETRISATION: Mapping[Task, str] = {"classify": "logits", "denoise": "edm", "continue": "logits"}
"""Parametrisation of a stack that names none, by its task."""


class Defaults:
    """What a `Stack` of the user's need not write: nothing is added, the time is the parametrisation's."""

    package: ClassVar[str] = ""
    head: ClassVar[Sequence[str]] = ()
    modulated: ClassVar[Mapping[str, int]] = MappingProxyType({})
    depth_key: ClassVar[str] = ""
    conditions: ClassVar[Sequence[str]] = ("classes",)
    natural_noise: ClassVar[str] = "gaussian"
    noise_defaults: ClassVar[Mapping[str, Any]] = NO_DEFAULTS
    inputs: ClassVar[Mapping[str, str]] = MappingProxyType({})
    pipeline: ClassVar[Sequence[str]] = ()
    steps: ClassVar[int] = 1000

    @classmethod
    def settled(cls, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The settings as they are."""
        return dict(value)

    def additions(self) -> nn.ModuleDict:
        """None."""
        return nn.ModuleDict()

    def time(self, level: Tensor, parametrisation: Parametrisation) -> Tensor:
        """c_noise of the parametrisation."""
        return parametrisation.time(level)


def _complete(stack: type[Any]) -> type[Any]:
    """A stack of the user's with what it leaves to `Defaults`.

    Raises:
        ConfigError: it lacks what there is no default for, or its `task` is none that there is.
    """
    missing = [name for name in ("task", "layers") if not isinstance(getattr(stack, name, None), str)]
    if missing:
        raise ConfigError(
            f"{stack.__name__} lacks {' and '.join(missing)}: write task = one of {', '.join(TASKS)}, and layers = the "
            "name of its list of layers (docs/own-network.md)"
        )
    if stack.task not in TASKS:
        raise ConfigError(f"{stack.__name__}.task={stack.task!r} is none of {', '.join(TASKS)}")
    own = {"original": stack.__name__, "natural_parametrisation": PARAMETRISATION[stack.task]}
    silent = {name: value for name, value in own.items() if not hasattr(stack, name)}
    return type(stack.__name__, (stack, Defaults), {"__doc__": stack.__doc__, "__module__": stack.__module__, **silent})


def adapted(stack: type[Any]) -> type[BlockModel]:
    """The architecture that trains a `Stack` in blocks.

    Raises:
        ConfigError: the class is no whole `Stack`.
    """
    stack = _complete(stack)
    task = TASKS[stack.task]
    arguments = (inspect.getdoc(task) or "").partition("\n\n")[2]
    said = {
        "__doc__": f"{inspect.getdoc(stack) or stack.original}\n\n{arguments}",
        "__module__": stack.__module__,
        "stack": stack,
        "natural_noise": stack.natural_noise,
        "natural_parametrisation": stack.natural_parametrisation,
        "noise_defaults": stack.noise_defaults,
        "completed": classmethod(_completed),
    }
    return type(stack.__name__, (task,), said)


def _completed(cls: type[BlockModel], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the section `model` with the settings themselves in the place of their path, and the depth."""
    stack: type[Stack] = cls.stack
    value, source = read_settings(keys.get("config") or {}, str(keys.get("arch")))
    value = stack.settled(value, source)
    depth = keys.get("depth")
    depth = value.get(stack.depth_key) if depth is None else depth
    if depth is None:
        raise ConfigError(f"model.depth is missing: {stack.original} does not say how many layers it has")
    counted = {stack.depth_key: depth} if stack.depth_key else {}
    return {**keys, "config": {**value, **counted}, "depth": depth}
