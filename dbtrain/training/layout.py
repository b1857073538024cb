"""Where DeepSpeed keeps a float32 parameter and its optimizer states under each ZeRO stage, and full tensors of them.

DeepSpeed's own ``safe_get_full_optimizer_state`` links the states of the first parameter group only when the others
have not stepped yet (0.19.8, ZeRO 1 and 2), so the pieces are looked up here; every stage then gathers the same way.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn


class Layout(Protocol):
    """The pieces of this rank. A piece shares memory with the optimizer; None where this rank holds nothing."""

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The tensors that the inner optimizer steps, each with its parameter group."""

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        """This rank's piece of the float32 value (state None) or of an optimizer state."""

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        """Full tensor on all ranks, from the pieces of all ranks; collective."""

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        """Write this rank's part of a full tensor into its piece."""

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Set what the next forward pass uses."""


class Replicated:
    """ZeRO 0: every rank holds all."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.optimizer.param_groups for p in group["params"]]

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        value: Tensor = parameter.data if state is None else self.optimizer.state[parameter][state]
        return value

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        assert piece is not None
        return piece

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        assert piece is not None
        piece.copy_(full)

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.data.copy_(full)


class FlatPartition:
    """ZeRO 1 and 2: each rank holds a range of the group's parameters, laid end to end."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return list(zip(self.zero.single_partition_of_fp32_groups, self.zero.optimizer.param_groups, strict=True))

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        source: Tensor = flat.data if state is None else self.zero.optimizer.state[flat][state]
        return source.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        full = torch.zeros(parameter.numel(), device=parameter.device)
        if piece is not None:
            self._range(parameter, full).copy_(piece)
        # the ranges do not overlap, so the sum has one non-zero term and is exact
        dist.all_reduce(full)
        return full.reshape(parameter.shape)

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        if piece is not None:
            piece.copy_(self._range(parameter, full.reshape(-1)))

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.data.copy_(full)

    @staticmethod
    def _range(parameter: nn.Parameter, flat: Tensor) -> Tensor:
        address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return flat.narrow(0, address.start, address.numel)


class Sharded:
    """ZeRO 3: each rank holds an equal part of every parameter, padded."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        groups = self.zero.optimizer.param_groups
        flats = self.zero.fp32_partitioned_groups_flat
        return [(flat, groups[self.zero.sub_group_to_group_id[i]]) for i, flat in enumerate(flats)]

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        # DeepSpeed's own getters give a copy on the GPU of what is offloaded: a restore into it would be lost
        group, start, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self.zero.fp32_partitioned_groups_flat[group]
        source: Tensor = flat.data if state is None else self.zero.optimizer.state[flat][state]
        return source.narrow(0, start, size)

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        assert piece is not None
        part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        # not where the part lies: it may be offloaded, and NCCL gathers on GPUs only
        padded = torch.zeros(part.ds_numel, device=get_accelerator().current_device_name())
        padded[: piece.numel()].copy_(piece.reshape(-1))
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, padded)
        full = torch.cat(parts)[: parameter.ds_numel]  # type: ignore[attr-defined]
        return full.reshape(parameter.ds_shape)  # type: ignore[attr-defined]

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        assert piece is not None
        piece.reshape(-1).copy_(self._part(parameter, full)[: piece.numel()])

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        part = self._part(parameter, full)
        parameter.ds_tensor.data[: part.numel()].copy_(part)  # type: ignore[attr-defined]

    @staticmethod
    def _part(parameter: nn.Parameter, full: Tensor) -> Tensor:
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = min(size * dist.get_rank(), full.numel())
        return full.reshape(-1)[start : start + size]


def layout_of(engine: Any, stage: int) -> Layout:
    """The layout of a DeepSpeed engine."""
    if stage == 0:
        return Replicated(engine.optimizer)
    return FlatPartition(engine.optimizer) if stage < 3 else Sharded(engine.optimizer)
