"""DeepSpeed ZeRO-3 over the whole network, by https://www.deepspeed.ai/docs/config-json."""

from typing import Any

import torch.distributed as dist
from torch import nn

from benchmarks.parallel.setting import Setting, Step
from dbtrain.training.deepspeed_import import deepspeed


class LayerLinear(nn.Linear):
    """A linear layer whose weights may be gathered in bfloat16; those of the level's embedding may not."""


def zero3(setting: Setting) -> Step:
    """Buckets of an eighth of the network: DeepSpeed's own are for networks of many billions of parameters."""
    loss: Any = setting.loss()
    setting.compile_layers(loss.model)
    for layer in loss.model.layers.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = LayerLinear
    elements = sum(p.numel() for p in loss.parameters())
    engine, *_ = deepspeed.initialize(
        model=loss, optimizer=setting.optimizer(loss), config=_config(setting, elements // 16 * 2)
    )
    shares = dist.get_world_size()

    def step() -> None:
        for batch, _ in setting.micro_batches(shares):
            engine.backward(engine(batch))
            engine.step()

    return step


def _config(setting: Setting, bucket: int) -> dict[str, Any]:
    job = setting.job
    shares = dist.get_world_size()
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": 2 * bucket,
        "stage3_max_reuse_distance": 2 * bucket,
    }
    half = {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [f"{LayerLinear.__module__}.{LayerLinear.__name__}"],
    }
    return {
        "train_batch_size": job.batch,
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.batch // (shares * job.micro_batch),
        "gradient_clipping": setting.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a micro-batch
        **({"torch_autocast": half} if job.precision == "bf16" else {}),
    }
