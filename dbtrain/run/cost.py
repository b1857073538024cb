"""Memory of a worker, estimated without a GPU: parameters on the meta device, activations on fake tensors."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dbtrain.data.batching import blank
from dbtrain.models.chunked_loss import MOST_LOGITS, CrossEntropy
from dbtrain.run.plan import RunPlan

FLOAT_BYTES = 4
CUBLAS_BYTES = 8 * 4096 * 1024
"""Workspace of cuBLAS, by CUBLAS_WORKSPACE_CONFIG=:4096:8 in `training/entry.py`."""
LOGIT_BYTES = 10
"""Bytes of each logit of a chunk: in bfloat16, in float32, and its gradient."""
PARTITIONED = "aot_eager_decomp_partition"
"""PyTorch's backend that cuts a graph into forward and backward as inductor does, and makes no kernels."""


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of attention over these shapes."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of its gradients; as in flash attention, the scores are computed again."""
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


# PyTorch has formulas for the kernels of GPUs only, and would count attention on CPU tensors as nothing
CPU_ATTENTION: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


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
    workspace: int = 0
    """Workspace of the kernels: cuBLAS's, and the logits of one chunk of a large vocabulary."""
    gradients_stay: bool = True
    """Whether gradients lie beside all activations, as they do from one micro-batch of a step to the next."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        # gradients are made while activations are freed: the peak is at one end of the backward pass
        passing = (self.activations + self.gradients) if self.gradients_stay else max(self.activations, self.gradients)
        return self.parameters + self.optimizer + self.average + passing + self.workspace


def count_parameters(objective: torch.nn.Module) -> int:
    """Trained numbers of a module, on any device."""
    return sum(p.numel() for p in objective.parameters() if p.requires_grad)


def estimate(run_plan: RunPlan, block: int, micro_batch: int, workers: int) -> Memory:
    """Estimate one worker of a block.

    ZeRO shares optimizer states (stage 1), gradients (2) and parameters (3) among the block's workers.
    Activations are what autograd keeps for the backward pass: with training.compile, what
    the partitioner of torch.compile keeps, which computes cheap operations again; with activation
    checkpointing, the inputs of the layers and the inside of one layer, as without the compiler. FLOPs are
    those of forward and backward, without what activation checkpointing or a loss in chunks computes again.
    """
    training = run_plan.config.training.of_block(block)
    module = run_plan.objective(block, "meta")
    count = count_parameters(module)
    size, frozen = count * FLOAT_BYTES, sum(p.numel() for p in module.parameters() if not p.requires_grad)
    # without ZeRO's partition the average is kept whole
    shared = [workers if training.zero_stage >= stage else 1 for stage in (3, 2, 1)]
    optimizer = 0 if training.offload != "none" else 2 * size // shared[2]
    flops = flops_of(run_plan, block, micro_batch)
    chunks = _has_chunks(module, run_plan.shape, micro_batch)
    recompute = training.activation_checkpointing
    one_micro_batch = training.batch_size <= micro_batch * workers
    return Memory(
        parameters=(size + frozen * FLOAT_BYTES) // shared[0],
        gradients=size // shared[1],
        optimizer=optimizer,
        average=size // shared[2] if training.ema else 0,
        activations=_activations_of(run_plan, block, micro_batch),
        flops=flops,
        count=count,
        workspace=CUBLAS_BYTES + (MOST_LOGITS * LOGIT_BYTES if chunks else 0),
        # ZeRO keeps gradients in buffers of its own
        gradients_stay=recompute or training.zero_stage > 0 or not one_micro_batch,
    )


def flops_of(run_plan: RunPlan, block: int, micro_batch: int) -> int:
    """FLOPs of forward and backward of one micro-batch, as :func:`estimate` says."""
    return _activations(_with_checkpointing(run_plan, False), block, micro_batch, whole_loss=True)[1]


def _activations_of(run_plan: RunPlan, block: int, micro_batch: int) -> int:
    training = run_plan.config.training
    if training.compile and not training.activation_checkpointing:
        return _activations(run_plan, block, micro_batch, compiled=True)[0]
    kept, _ = _activations(_with_checkpointing(run_plan, False), block, micro_batch)
    if not training.activation_checkpointing:
        return kept
    inputs, _ = _activations(run_plan, block, micro_batch)
    # a looped layer keeps an input for each time that it is applied
    return inputs + (kept - inputs) // len(run_plan.applied(block))


class Estimates:
    """What :func:`estimate` says of a run's blocks; of blocks that are alike it is asked once."""

    def __init__(self, run_plan: RunPlan) -> None:
        self.run_plan = run_plan
        self._known: dict[Hashable, Memory] = {}

    def of(self, block: int, micro_batch: int, workers: int) -> Memory:
        """The estimate of one worker of a block."""
        key = self.run_plan.shape_of(block), micro_batch, workers
        if key not in self._known:
            self._known[key] = estimate(self.run_plan, block, micro_batch, workers)
        return self._known[key]


def recomputed(run_plan: RunPlan, block: int, micro_batch: int) -> int:
    """FLOPs that activation checkpointing computes again in one micro-batch."""
    with_, without = (_activations(_with_checkpointing(run_plan, on), block, micro_batch)[1] for on in (True, False))
    return with_ - without


def _with_checkpointing(run_plan: RunPlan, on: bool) -> RunPlan:
    training = run_plan.config.training.model_copy(update={"activation_checkpointing": on})
    return dataclasses.replace(run_plan, config=run_plan.config.model_copy(update={"training": training}))


def _cross_entropy_of(objective: torch.nn.Module) -> CrossEntropy | None:
    """The module that computes the loss in chunks; None if the network's loss is not computed so."""
    return getattr(objective.get_submodule("model"), "cross_entropy", None)


def _has_chunks(objective: torch.nn.Module, shape: Mapping[str, Any], micro_batch: int) -> bool:
    many = micro_batch * shape.get("length", 0) * shape.get("vocabulary", 0) > MOST_LOGITS
    return many and _cross_entropy_of(objective) is not None


def _activations(
    run_plan: RunPlan, block: int, micro_batch: int, whole_loss: bool = False, compiled: bool = False
) -> tuple[int, int]:
    """Bytes kept for the backward pass, and FLOPs of forward and backward, of one micro-batch.

    With `whole_loss` the loss is not computed in chunks, whatever its size. `compiled` is as a worker
    compiles it, but for the kernels, and counts no FLOPs.
    """
    objective = run_plan.objective(block, "meta")
    if whole_loss and (cross_entropy := _cross_entropy_of(objective)):
        cross_entropy.most = None
    kept: dict[int, int] = {}
    # fake tensors have a device and so take part in autocast, which meta tensors do not
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        own = {t.untyped_storage()._cdata for t in (*objective.parameters(), *objective.buffers())}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        inputs = (blank(run_plan.shape, micro_batch), torch.tensor(0), torch.arange(micro_batch))
        if compiled:
            torch.compiler.reset()  # else only the first blocks of a process would be compiled
            objective.compile(backend=PARTITIONED)
        counter = FlopCounterMode(display=False, custom_mapping=dict(CPU_ATTENTION))
        # the compiler would compile nothing while FLOPs are counted
        with (
            nullcontext() if compiled else counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            objective(*inputs).backward()
    return sum(kept.values()), counter.get_total_flops()
