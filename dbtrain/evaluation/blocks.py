"""Where the blocks of a merged model are: all here; one at a time (`residency`); or in processes of a cluster
(`pipeline`)."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dbtrain.evaluation.pipeline.walks import InStep, Walks
from dbtrain.evaluation.speed import Speed
from dbtrain.method.interface import BlockModel


class Blocks(Protocol):
    """The models of all blocks by their numbers, wherever their weights are."""

    walks: Walks
    """How several batches walk down the chain."""
    computes_on: torch.device
    """Device that they compute on; what they are given and their answers may be on another."""
    all_here: bool
    """Whether all are in the memory of this process, and stay there."""

    @property
    def shells(self) -> Sequence[BlockModel]:
        """Their modules, for what needs no weights: one that is not in memory has none."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: Any) -> Any: ...

    def apply(self, speed: Speed) -> None:
        """Let the blocks predict at this speed from now on."""

    def expect(self, largest: int) -> None:
        """Batches of up to so many samples come, not always the largest first."""

    def told(self) -> str:
        """Which blocks are in memory and what that cost, for people."""

    def close(self) -> None:
        """Give back what they hold beside memory; they cannot be used any more."""


class AllBlocks(Sequence[BlockModel]):
    """All blocks in the memory of this process.

    Args:
        blocks: their models.
        device: where these are.
    """

    all_here = True

    def __init__(self, blocks: Sequence[BlockModel], device: torch.device) -> None:
        self.shells = blocks
        self.computes_on = device
        self.walks: Walks = InStep()

    def __len__(self) -> int:
        return len(self.shells)

    def __getitem__(self, block: Any) -> Any:
        return self.shells[block]

    def apply(self, speed: Speed) -> None:
        """Let the blocks predict at this speed from now on."""
        for block in self.shells:
            speed.apply(block)

    def expect(self, largest: int) -> None:
        """Nothing is needed: the largest batch comes first."""

    def told(self) -> str:
        """How many there are."""
        return "its one block in memory" if len(self) == 1 else f"all {len(self)} blocks in memory"

    def close(self) -> None:
        """Nothing is held."""
