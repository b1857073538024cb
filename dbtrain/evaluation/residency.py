"""Which blocks of a merged model are in memory: all of them, or one, while the next one is read ahead.

A model that is larger than the memory of its device is used block after block. The order is known: levels
fall, so that a walk down the chain asks for block 0, 1, 2, ... and each of them once.
"""

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dbtrain.config.evaluation import Resident
from dbtrain.evaluation.loading import LoadBlock, Where, check_shard, somewhere
from dbtrain.evaluation.pipeline.walks import InStep, Walks
from dbtrain.evaluation.speed import Speed
from dbtrain.evaluation.transfer import Transfer, transfer_to
from dbtrain.method.interface import BlockModel
from dbtrain.models.registry import architecture, own_architecture
from dbtrain.run.plan import RunPlan
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.side_by_side import Beside

Residency = Literal["all", "ahead", "alone"]
"""`all`: every block is in memory; `ahead`: one, and the next one is read while it computes; `alone`: one."""

SHARE = 0.8
"""Most of the free memory that blocks may take; the rest is for what they compute."""


def choose(wanted: Resident, run_plan: RunPlan, merged: MergedDirectory, device: torch.device) -> Residency:
    """What is in memory, by the sizes of the blocks' files and the memory that is free on the device.

    Raises:
        ShardError: the files of the merged model are damaged.
    """
    if wanted == "all":
        return "all"
    blocks = range(run_plan.split.blocks)
    # by the last of its shards, since where one job trained all blocks they are one model
    sources = {run_plan.scheme.sources(block)[-1]: run_plan.scheme.sources(block) for block in blocks}
    sizes = [sum(merged.size(shard) for shard in shards) for shards in sources.values()]
    room = SHARE * _free(device)
    if len(sizes) == 1 or (wanted == "auto" and sum(sizes) <= room):
        return "all"
    return "ahead" if 2 * max(sizes) <= room else "alone"


def _free(device: torch.device) -> int:
    """Bytes of memory that nobody uses."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)


class ResidentBlocks(Sequence[BlockModel]):
    """The blocks of a merged model, of which at most one is in memory, and one more while it is read ahead.

    A block's module is the same object whenever it is asked for; only its weights come and go.

    Args:
        run_plan: plan of the run.
        load: tensors of a shard by their names in the whole model; called on another thread to read ahead.
        device: where the blocks are put.
        where: files of the shards, for messages.
        ahead: read the block that comes next while one is used. What came after a block before comes after it
            again; the first time it is the next by number.
        transfer: how they get to the device.

    Raises:
        ShardError: whenever a block is asked for whose tensors do not fit, or whatever `load` raises.
    """

    all_here = False

    def __init__(
        self,
        run_plan: RunPlan,
        load: LoadBlock,
        device: torch.device,
        where: Where = somewhere,
        ahead: bool = True,
        transfer: Transfer | None = None,
    ) -> None:
        self.walks: Walks = InStep()
        self.computes_on = device
        self._looks_ahead = ahead
        self._transfer = transfer or transfer_to(device)
        units = [run_plan.scheme.sources(block)[-1] for block in range(run_plan.split.blocks)]
        self._units = units
        """Number of each block's last shard; blocks of the same shards are one model."""
        self._shells = {unit: Shell(run_plan, unit, device) for unit in dict.fromkeys(units)}
        for shell in self._shells.values():
            shell.share_frozen(self._shells[units[0]])
        wanted = {unit: shell.wanted for unit, shell in self._shells.items()}
        self._read = _Reader(run_plan, load, device, where, self._transfer, wanted)
        self._here: int | None = None
        self._ahead: list[tuple[int, Beside[dict[str, Tensor]]]] = []
        """The block that is read ahead, if any."""
        # a thread that is in the middle of a copy when the program ends would take it down
        weakref.finalize(self, _await, self._ahead)
        self._after: dict[int, int] = {}
        self.reads = 0
        """How often a block was read."""
        self.bytes_read = 0
        self.waited_s = 0.0
        """Seconds in which nothing was computed, because a block was not there yet."""

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, block: Any) -> Any:
        number = range(len(self))[block]
        if self._units[number] != self._here:
            self._fetch(self._units[number])
        return self.shells[number]

    @property
    def shells(self) -> list[BlockModel]:
        """The blocks' modules, for what needs no weights."""
        return [self._shells[unit].model for unit in self._units]

    def apply(self, speed: Speed) -> None:
        """Let the blocks predict at this speed from now on."""
        for shell in self.shells:
            speed.apply(shell)

    def expect(self, largest: int) -> None:
        """Nothing is needed: the largest batch comes first."""

    def close(self) -> None:
        """Nothing is held that is not freed with the last reference."""

    def told(self) -> str:
        """What is in memory, and what it cost, for people."""
        ahead = " and the next one read ahead" if self._looks_ahead else ""
        read = "read once" if self.reads == 1 else f"read {self.reads} times"
        return (
            f"one block of {len(self._shells)} in memory{ahead}: {read}, {self.bytes_read / 1e9:.2f} GB, "
            f"{self.waited_s:.1f} s waited for them"
        )

    def _fetch(self, unit: int) -> None:
        started = time.monotonic()
        before, self._here = self._here, None
        if before is not None:
            self._after[before] = unit
            self._transfer.hold_back()
            self._shells[before].empty()
        tensors = self._tensors(unit)
        self._shells[unit].fill(tensors)
        self._here = unit
        self.reads += 1
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        following = self._after.get(unit, unit + 1)
        if self._looks_ahead and following in self._shells:
            self._ahead.append((following, Beside(partial(self._read, following))))
        self.waited_s += time.monotonic() - started

    def _tensors(self, unit: int) -> dict[str, Tensor]:
        """Tensors of a block: read ahead, or read now."""
        if self._ahead and self._ahead[0][0] == unit:
            try:
                return self._ahead.pop()[1].result()
            except torch.OutOfMemoryError:
                self._looks_ahead = False  # beside the one before and what it computed there was no room
        _await(self._ahead)  # another one: two at a time may not fit into memory
        return self._read(unit)


@dataclass(frozen=True)
class _Reader:
    """What reads a block, on any thread."""

    run_plan: RunPlan
    load: LoadBlock
    device: torch.device
    where: Where
    transfer: Transfer
    wanted: Mapping[int, Mapping[str, Tensor]]
    """Tensors of each block's model, without values, by the number of its last shard."""

    def __call__(self, unit: int) -> dict[str, Tensor]:
        """Tensors of a block by their names in its model, on the device."""
        tensors: dict[str, Tensor] = {}
        with self.transfer.beside():
            for shard in self.run_plan.scheme.sources(unit):
                # where several shards hold a name, such as a head's, the last one is the block's own
                found = check_shard(self.run_plan, shard, self.load(shard), self.wanted[unit], self.where(shard))
                tensors |= found
            return {name: tensor.to(self.device) for name, tensor in tensors.items()}


def _await(ahead: list[tuple[int, Beside[dict[str, Tensor]]]]) -> None:
    """Wait for a block that is not wanted any more, and drop it."""
    while ahead:
        ahead.pop()[1].wait()


class Shell:
    """The module of a block, whose weights come and go.

    Args:
        run_plan: plan of the run.
        unit: number of its last shard.
        device: where its constants and the parts that no block trains are put.
    """

    def __init__(self, run_plan: RunPlan, unit: int, device: torch.device) -> None:
        model = _unfilled(run_plan, unit)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.wanted = {name: torch.empty_like(p, device="meta") for name, p in parameters.items()}
        """Tensors as they should be, without values."""
        self._own = {name: p for name, p in parameters.items() if name not in run_plan.frozen}
        self._frozen = {name: p for name, p in parameters.items() if name in run_plan.frozen}
        self.empty()
        self.model = model.to(device).eval()

    def share_frozen(self, other: "Shell") -> None:
        """Use the same memory as another block for what no block trains."""
        for name, parameter in self._frozen.items():
            parameter.data = other._frozen[name].data

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take these tensors as weights, without a copy."""
        for name, parameter in self._own.items():
            parameter.data = tensors[name]

    def empty(self) -> None:
        """Give the weights' memory back."""
        for parameter in self._own.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


RANDOM = ("normal_", "uniform_", "trunc_normal_", "orthogonal_", "xavier_uniform_", "xavier_normal_",
          "kaiming_uniform_", "kaiming_normal_")  # fmt: skip
"""Functions that fill a tensor with random numbers, in `torch.nn.init` or as its methods."""


class _WithoutDraws(TorchFunctionMode):
    """Memory is left as it is where it would be filled with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _unfilled(run_plan: RunPlan, unit: int) -> BlockModel:
    """A block's model whose weights are still to come; its constants are right.

    First weights of a large block take seconds to draw. They are drawn in vain only for a class that is not
    ours, whose constants may be random too.
    """
    arch = run_plan.config.model.arch
    ours = own_architecture(arch) is None and architecture(arch).stack is None
    with _WithoutDraws() if ours else nullcontext():
        return run_plan.model(unit)
