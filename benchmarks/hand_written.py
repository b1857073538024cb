"""What a careful engineer would write for one block alone: torch.compile, autocast, fused AdamW, clipping, an average.

It is the measure of `worker.py`: the same layers on the same data, without dbtrain's engine, draws, log,
commits and deterministic mode.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.config import TrainingConfig
from dbtrain.data.splits import Split
from dbtrain.method.objective import BlockObjective


class TorchDraws:
    """PyTorch's own random numbers with the methods of `Draws`, for N samples on a device."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device

    def uniform(self, shape: tuple[int, ...], stream: int) -> Tensor:
        return torch.rand(self.count, *shape, device=self.device)

    def normal(self, shape: tuple[int, ...], stream: int) -> Tensor:
        return torch.randn(self.count, *shape, device=self.device)


class Loss(nn.Module):
    """The block's loss in one graph, noise and all.

    Args:
        objective: of the block, which says its layers, levels and precision.
    """

    def __init__(self, objective: BlockObjective) -> None:
        super().__init__()
        self.model, self.layers = objective.model, objective.layers
        self.q_low, self.q_high = objective.q_low, objective.q_high
        self.bf16 = objective.precision == "bf16"

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        model = self.model
        example = model.example(batch)
        count, device = len(example.clean), example.clean.device
        draws: Any = TorchDraws(count, device)
        uniform = draws.uniform(model.noise.level_shape(example), 0)
        level = model.noise.quantile(self.q_low + uniform * (self.q_high - self.q_low))
        noisy = model.noise.corrupt(example.clean, level, draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            output = model.predict(self.layers, noisy, level, example.context)
        return (model.noise.weight(level) * model.loss(output.float(), example.target)).mean()


class HandWritten:
    """The loop.

    Args:
        objective: of the block, on its device; its parameters are trained.
        split: training samples.
        config: section `training`: batch size, clipping, learning rate, average, compilation.
        device: of the parameters.
    """

    def __init__(self, objective: BlockObjective, split: Split, config: TrainingConfig, device: torch.device) -> None:
        self.split, self.config, self.device = split, config, device
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        given = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, given.lr, given.betas, given.eps, given.weight_decay, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.loss: Any = Loss(objective)
        # a measured distribution sends its table to the device when it is first asked, which shall be in no graph
        objective.model.noise.quantile(torch.rand(1, device=device))
        if config.compile:
            self.loss = torch.compile(self.loss)
        self.batches = self._batches()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        size = self.config.batch_size
        while True:
            order = torch.randperm(len(self.split))
            for start in range(0, len(order) - size + 1, size):
                yield self.split.batch(order[start : start + size], self.device)

    def steps(self, count: int) -> float:
        """Train so many steps; the loss of the last one, which waits for the device."""
        for _ in range(count):
            loss = self.loss(next(self.batches))
            loss.backward()
            if self.config.optimizer.clip:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average:
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema)
        return loss.item()
