"""Definitions that replace those of the same name in an exported file, which trains nothing."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn


class BlockModel(nn.Module):
    """One block: its own stem, its layers under their numbers in the whole model, and its own head."""

    @classmethod
    def baseline(cls, **arguments: Any) -> "BlockModel":
        """The same layers trained end to end."""
        return cls(**arguments)

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells nothing, same shape: what classifier-free guidance needs."""
        raise ConfigError("guidance needs a model that was trained without its context too; ask for 1")


class ConfigError(ValueError):
    """Arguments that do not fit each other."""


class FromRun:
    """Marks an argument that was no key of the configuration."""


def library(name: str, arch: str) -> ModuleType:
    """The package that the network is of."""
    return importlib.import_module(name)


Batch = Mapping[str, Tensor]
Embedding = nn.Embedding
Count = Number = int
Positive = Share = float
LevelDistribution = NoiseProcess = NoiseSettings = Parametrisation = Stack = Any
Noised = Task = str
