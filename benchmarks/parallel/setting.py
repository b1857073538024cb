"""What every method but dbtrain's own is given: the network, its samples, the optimizer and the process group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hand_written import Loss
from benchmarks.parallel.job import Job
from dbtrain.models.layers import compile_recomputed
from dbtrain.run.plan import RunPlan
from dbtrain.training.optimizer import adamw, parameter_groups

Step = Callable[[], None]
"""One step of the optimizer, with all its micro-batches."""


@dataclass
class Setting:
    """Of one process."""

    job: Job
    plan: RunPlan
    rank: int
    device: torch.device

    def __post_init__(self) -> None:
        self.split = self.plan.data().train
        self.clip = self.plan.config.training.optimizer.clip
        self._order = torch.Generator().manual_seed(1)

    def loss(self) -> Loss:
        """The loss of the whole network, or of block 0 where the run has several; on the device."""
        objective: Any = self.plan.objective(0).to(self.device)
        # a distribution may send its table to the device when it is first asked, which shall be in no graph
        objective.model.noise.quantile(torch.rand(1, device=self.device))
        return Loss(objective)

    def compile_layers(self, model: nn.Module) -> None:
        """Each layer by itself, as FSDP and pipelines advise and as checkpointing needs."""
        if self.job.compile and self.job.checkpointing:
            compile_recomputed(model)
        elif self.job.compile:
            for layer in model.get_submodule("layers").children():
                # not the whole call, which has the hooks that gather and scatter
                layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """dbtrain's own."""
        groups = parameter_groups(module, self.plan.config.training.optimizer)
        return adamw([{k: v for k, v in group.items() if k != "use_muon"} for group in groups])

    def samples(self, count: int) -> dict[str, Tensor]:
        """So many at random; the same in every process that has called as often."""
        at = torch.randint(len(self.split), (count,), generator=self._order)
        return self.split.batch(at, self.device)

    def micro_batches(self, shares: int) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """This process's micro-batches of a step of which it has one of so many shares; the last is marked."""
        count = self.job.batch // (shares * self.job.micro_batch)
        for number in range(count):
            yield self.samples(self.job.micro_batch), number == count - 1
