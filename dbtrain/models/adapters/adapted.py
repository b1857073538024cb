"""From a `Stack` to an architecture: the class of its task, with what the stack says of itself."""

import inspect
from collections.abc import Mapping
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.method.interface import BlockModel
from dbtrain.models.adapters.settings import read_settings
from dbtrain.models.adapters.stack import Stack, Task
from dbtrain.models.adapters.tasks import Classifier, Denoiser, NextToken

TASKS: Mapping[Task, type[BlockModel]] = {"classify": Classifier, "denoise": Denoiser, "continue": NextToken}


def adapted(stack: type[Stack]) -> type[BlockModel]:
    """The architecture that trains a stack in blocks.

    Raises:
        ConfigError: its `task` is none that there is.
    """
    if stack.task not in TASKS:
        raise ConfigError(f"{stack.__name__}.task={stack.task!r} is none of {', '.join(TASKS)}")
    task = TASKS[stack.task]
    arguments = (inspect.getdoc(task) or "").partition("\n\n")[2]
    said = {
        "__doc__": f"{inspect.getdoc(stack)}\n\n{arguments}",
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
    depth = value[stack.depth_key] if depth is None else depth
    return {**keys, "config": {**value, stack.depth_key: depth}, "depth": depth}
