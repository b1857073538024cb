"""The methods whose every GPU sees the whole network, DDP and FSDP2, and a GPU that trains one block alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.parallel.setting import Setting, Step

Around = Callable[[bool], AbstractContextManager[Any]]
"""What is around the forward and backward pass of a micro-batch, which may be the last of its step."""


def ideal(setting: Setting) -> Step:
    """One block on one GPU, by hand: no other method can be faster, but by sparing work."""
    loss = setting.loss()
    return _stepper(setting, loss, _compiled(setting, loss), 1, lambda last: nullcontext())


def ddp(setting: Setting) -> Step:
    """https://docs.pytorch.org/docs/stable/notes/ddp.html: the last micro-batch alone is communicated."""
    loss = setting.loss()
    on = [setting.device.index] if setting.device.type == "cuda" else None
    parallel = DistributedDataParallel(loss, device_ids=on, gradient_as_bucket_view=True)
    call = _compiled(setting, parallel)
    return _stepper(
        setting, parallel, call, dist.get_world_size(), lambda last: nullcontext() if last else parallel.no_sync()
    )


def _compiled(setting: Setting, module: nn.Module) -> Any:
    """The whole in one graph; under checkpointing layer by layer, or the graph would keep what is recomputed."""
    if setting.job.compile and not setting.job.checkpointing:
        return torch.compile(module)
    inner: Any = getattr(module, "module", module)
    setting.compile_layers(inner.model)
    return module


def fsdp2(setting: Setting) -> Step:
    """https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html: gradients are scattered every time."""
    return _fsdp2(setting, accumulate=False)


def fsdp2_accumulate(setting: Setting) -> Step:
    """The same, but whole gradients are kept until the last micro-batch: less is sent, more is held."""
    return _fsdp2(setting, accumulate=True)


def _fsdp2(setting: Setting, accumulate: bool) -> Step:
    loss: Any = setting.loss()
    setting.compile_layers(loss.model)
    # autocast rounds what the layers multiply and nothing else: so their weights alone are gathered in bfloat16,
    # and what goes in stays as it is
    half = torch.bfloat16 if setting.job.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in loss.model.layers.children():
        fully_shard(layer, mp_policy=policy)
    fully_shard(loss, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

    def around(last: bool) -> AbstractContextManager[Any]:
        loss.set_requires_gradient_sync(last or not accumulate)
        return nullcontext()

    return _stepper(setting, loss, loss, dist.get_world_size(), around)


def _stepper(setting: Setting, module: nn.Module, call: Any, shares: int, around: Around) -> Step:
    optimizer = setting.optimizer(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    micro_steps = setting.job.batch // (shares * setting.job.micro_batch)

    def step() -> None:
        for batch, last in setting.micro_batches(shares):
            with around(last):
                (call(batch) / micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, setting.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
