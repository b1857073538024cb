"""Where DeepSpeed keeps a float32 parameter and its optimizer states under each ZeRO stage,
and full tensors of them.

DeepSpeed's own ``safe_get_full_optimizer_state`` links the states of the first parameter group only when the
others have not stepped yet (0.19.8, ZeRO 1 and 2), so the pieces are looked up here; every stage then gathers
the same way.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbtrain.training.deepspeed_import import deepspeed

MOMENTUM = "momentum_buffer"
"""Muon's only state."""


class Layout(Protocol):
    """The pieces of this rank, without padding. A piece shares memory with the optimizer;
    None: this rank has none."""

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The tensors that the inner optimizer steps, each with its parameter group."""

    def momentum(self, owner: Tensor) -> Tensor:
        """Zeros of the size in which DeepSpeed keeps Muon's momentum of one of the :meth:`owners`."""

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        """This rank's piece of the float32 value (state None) or of an optimizer state."""

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        """Full tensor on all ranks, from the pieces of all ranks; collective."""

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        """Write this rank's part of a full tensor into its piece."""

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Set what the next forward pass uses."""

    def lend(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        """Let forward passes use other values, given by the pieces of all ranks; collective."""

    def take_back(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        """End :meth:`lend` of the same pieces: every bit is as it was before; collective."""


class Replicated:
    """ZeRO 0: every rank holds all."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.optimizer.param_groups for p in group["params"]]

    def momentum(self, owner: Tensor) -> Tensor:
        return torch.zeros_like(owner, requires_grad=False)

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

    def lend(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        assert piece is not None
        # there is one copy of the weights: the two change places
        own = parameter.data.clone()
        parameter.data.copy_(piece)
        piece.copy_(own)

    def take_back(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        self.lend(parameter, piece)


class FlatPartition:
    """ZeRO 1 and 2: each rank holds a range of the group's parameters, laid end to end.

    Muon's momentum is an exception, unless it is offloaded: a rank holds that of every matrix of which it has
    a part, and holds it whole, because it orthogonalises the whole matrix. Ranks that share a matrix hold
    equal copies.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self._starts = {} if zero.cpu_offload else dict(_starts(zero.params_in_partition))

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return list(zip(self.zero.single_partition_of_fp32_groups, self.zero.optimizer.param_groups, strict=True))

    def momentum(self, owner: Tensor) -> Tensor:
        if self.zero.cpu_offload:
            return torch.zeros_like(owner, requires_grad=False)
        held = next(
            parameters
            for flat, parameters in zip(
                self.zero.single_partition_of_fp32_groups, self.zero.params_in_partition, strict=True
            )
            if flat is owner
        )
        return torch.zeros(sum(p.numel() for p in held), dtype=owner.dtype, device=owner.device)

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        source: Tensor = flat.data if state is None else self.zero.optimizer.state[flat][state]
        if state == MOMENTUM and not self.zero.cpu_offload:
            return source.narrow(0, self._starts[parameter], parameter.numel())
        return source.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        full = torch.zeros(parameter.numel(), device=parameter.device)
        if piece is not None:
            whole = piece.numel() == parameter.numel()
            self._range(parameter, full).copy_(self._range(parameter, piece) if whole else piece)
        # The ranges do not overlap, so the sum has one term that is not zero. Of integers it is exact to the
        # last bit: as a float, minus zero would become zero.
        dist.all_reduce(full.view(torch.int32))
        return full.reshape(parameter.shape)

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        if piece is not None:
            flat = full.reshape(-1)
            piece.copy_(flat if piece.numel() == flat.numel() else self._range(parameter, flat))

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.data.copy_(full)

    def lend(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        self.assign(parameter, self.gather(parameter, piece))

    def take_back(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        self.assign(parameter, self.gather(parameter, self.piece(parameter, None)))

    @staticmethod
    def _range(parameter: nn.Parameter, flat: Tensor) -> Tensor:
        address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return flat.narrow(0, address.start, address.numel)


def _starts(groups: Sequence[Sequence[nn.Parameter]]) -> Iterator[tuple[nn.Parameter, int]]:
    """Where each parameter begins when those of its group are laid end to end."""
    for group in groups:
        start = 0
        for parameter in group:
            yield parameter, start
            start += parameter.numel()


class Sharded:
    """ZeRO 3: each rank holds an equal part of every parameter;
    the last parts are padded, or nothing but padding."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def owners(self) -> list[tuple[Tensor, dict[str, Any]]]:
        groups = self.zero.optimizer.param_groups
        flats = self.zero.fp32_partitioned_groups_flat
        return [(flat, groups[self.zero.sub_group_to_group_id[i]]) for i, flat in enumerate(flats)]

    def momentum(self, owner: Tensor) -> Tensor:
        return torch.zeros_like(owner, requires_grad=False)

    def piece(self, parameter: nn.Parameter, state: str | None) -> Tensor | None:
        # DeepSpeed's own getters give a copy on the GPU of what is offloaded: a restore into it would be lost
        group, start, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self.zero.fp32_partitioned_groups_flat[group]
        source: Tensor = flat.data if state is None else self.zero.optimizer.state[flat][state]
        first, end = self._bounds(parameter)
        return source.narrow(0, start, end - first) if end > first else None

    def gather(self, parameter: nn.Parameter, piece: Tensor | None) -> Tensor:
        part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        # not where the part lies: it may be offloaded, and NCCL gathers on GPUs only
        padded = torch.zeros(part.ds_numel, device=deepspeed.accelerator.get_accelerator().current_device_name())
        if piece is not None:
            padded[: piece.numel()].copy_(piece)
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, padded)
        full = torch.cat(parts)[: parameter.ds_numel]  # type: ignore[attr-defined]
        return full.reshape(parameter.ds_shape)  # type: ignore[attr-defined]

    def scatter(self, parameter: nn.Parameter, full: Tensor, piece: Tensor | None) -> None:
        if piece is not None:
            piece.copy_(self._part(parameter, full))

    def assign(self, parameter: nn.Parameter, full: Tensor) -> None:
        part = self._part(parameter, full)
        parameter.ds_tensor.data[: part.numel()].copy_(part)  # type: ignore[attr-defined]
        if parameter.numel() == full.numel():  # a small one, which stays gathered
            parameter.data.copy_(full)

    def lend(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        self.assign(parameter, self.gather(parameter, piece))

    def take_back(self, parameter: nn.Parameter, piece: Tensor | None) -> None:
        self.assign(parameter, self.gather(parameter, self.piece(parameter, None)))

    def _part(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        first, end = self._bounds(parameter)
        return full.reshape(-1)[first:end]

    @staticmethod
    def _bounds(parameter: nn.Parameter) -> tuple[int, int]:
        """First element of this rank's part, and the one after its last:
        equal where it holds only padding."""
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        whole = parameter.ds_numel  # type: ignore[attr-defined]
        first = min(size * dist.get_rank(), whole)
        return first, min(first + size, whole)


def layout_of(engine: Any, stage: int) -> Layout:
    """The layout of a DeepSpeed engine."""
    if stage == 0:
        return Replicated(engine.optimizer)
    return FlatPartition(engine.optimizer) if stage < 3 else Sharded(engine.optimizer)
