"""Memory of a worker, estimated without a GPU: parameters on the meta device, activations on fake tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbtrain.data.blank import blank
from dbtrain.training.blueprint import Blueprint

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one worker, and FLOPs of one step of its micro-batch."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    flops: int
    count: int
    """Parameters of the block."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations


def count_parameters(objective: torch.nn.Module) -> int:
    """Trained numbers of a module, on any device."""
    return sum(p.numel() for p in objective.parameters() if p.requires_grad)


def estimate(blueprint: Blueprint, block: int, micro_batch: int, workers: int) -> Memory:
    """Estimate one worker of a block.

    ZeRO shares optimizer states (stage 1), gradients (2) and parameters (3) among the block's workers. Activations are
    what autograd keeps for the backward pass, without what the allocator and the kernels add.
    """
    training = blueprint.config.training
    count = count_parameters(blueprint.objective(block, "meta"))
    size = count * FLOAT_BYTES
    # without ZeRO's partition the average is kept whole
    shared = [workers if training.zero_stage >= stage else 1 for stage in (3, 2, 1)]
    optimizer = 0 if training.offload != "none" else 2 * size // shared[2]
    activations, flops = _activations(blueprint, block, micro_batch)
    return Memory(
        parameters=size // shared[0],
        gradients=size // shared[1],
        optimizer=optimizer,
        average=size // shared[2] if training.ema else 0,
        activations=activations,
        flops=flops,
        count=count,
    )


def _activations(blueprint: Blueprint, block: int, micro_batch: int) -> tuple[int, int]:
    """Bytes kept for the backward pass, and FLOPs of forward and backward, of one micro-batch."""
    objective = blueprint.objective(block, "meta")
    kept: dict[int, int] = {}
    # fake tensors have a device and so take part in autocast, which meta tensors do not
    with FakeTensorMode(allow_non_fake_inputs=True):
        named = [*objective.named_parameters(), *objective.named_buffers()]
        state = {n: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for n, t in named}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        inputs = (blank(blueprint.shape, micro_batch), torch.tensor(0), torch.arange(micro_batch))
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.func.functional_call(objective, state, inputs).backward()
    return sum(kept.values()), counter.get_total_flops()
