"""1F1B and interleaved 1F1B, by https://docs.pytorch.org/docs/stable/distributed.pipelining.html.

The network is cut into equal runs of layers. All processes draw the same batch, so that only what one stage makes and
the next one needs is sent: the hidden states, rounded to bfloat16 where the layers compute in it, and the condition.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn import functional

from benchmarks.hand_written import TorchDraws
from benchmarks.parallel.setting import Setting, Step


class Part(nn.Module):
    """Some layers of a DiT, with the stem before the first and the head after the last.

    The last part returns denoised images times the root of their weight, to be compared with clean ones times the
    same, because a schedule knows losses of outputs and targets only.

    Args:
        model: the whole one.
        layers: numbers of those that are held.
        half: whether hidden states are sent in bfloat16.
    """

    def __init__(self, model: Any, layers: range, half: bool) -> None:
        super().__init__()
        self.first, self.last, self.half = layers[0] == 0, layers[-1] == model.num_layers - 1, half
        self.stem = model.stem if self.first else None
        self.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in layers})
        self.head = model.head if self.last else None
        self.noise, self.parametrisation, self.image = model.noise, model.parametrisation, model._image

    def forward(self, *given: Tensor, noisy: Tensor, level: Tensor, label: Tensor) -> Any:
        """Noisy images, or (N, T, dim) and (N, dim) of the part before -> the same for the next, or images."""
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.half):
            if self.stem is not None:
                scaled = self.parametrisation.scale_input(noisy, level)
                hidden, condition = self.stem(scaled, self.parametrisation.time(level), label)
            else:
                hidden, condition = given[0].float(), given[1]
            for layer in self.layers.values():
                hidden = layer(hidden, condition)
            if self.head is None:
                # what is sent must be contiguous, and patches are not
                return hidden.to(torch.bfloat16 if self.half else hidden.dtype).contiguous(), condition.clone()
            patches = self.head(hidden, condition.to(hidden.dtype)).float()
            images = self.parametrisation.estimate(self.image(patches), noisy, level)
        return _root_weight(self.noise, level) * images


def _root_weight(noise: Any, level: Tensor) -> Tensor:
    return noise.weight(level).sqrt()[:, None, None, None]


def one_f_one_b(setting: Setting) -> Step:
    """One stage a process."""
    return _pipeline(setting, 1)


def interleaved(setting: Setting) -> Step:
    """Two stages a process."""
    return _pipeline(setting, 2)


def _pipeline(setting: Setting, parts: int) -> Step:
    whole: Any = setting.plan.objective(0)
    model, ranks = whole.model, dist.get_world_size()
    setting.compile_layers(model)
    number = ranks * parts
    own = range(setting.rank, number, ranks)
    cut = model.num_layers // number
    half = setting.job.precision == "bf16"
    modules = [Part(model, range(s * cut, (s + 1) * cut), half).to(setting.device) for s in own]
    stages = [PipelineStage(m, s, number, setting.device) for m, s in zip(modules, own, strict=True)]
    count = setting.job.batch // setting.job.micro_batch
    schedule: Any = (
        Schedule1F1B(stages[0], count, functional.mse_loss)
        if parts == 1
        else ScheduleInterleaved1F1B(stages, count, functional.mse_loss)
    )
    held = nn.ModuleList(modules)
    optimizer, draw = setting.optimizer(held), _Draws(setting, whole)

    def step() -> None:
        noisy, target, said = draw()
        first = (noisy,) if setting.rank == 0 else ()
        aim = {"target": target, "losses": []} if setting.rank == ranks - 1 else {}
        schedule.step(*first, **aim, **said, return_outputs=False)
        _clip([p for p in held.parameters() if p.grad is not None], setting.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _Draws:
    """The batch of a step, the same in all processes."""

    def __init__(self, setting: Setting, objective: Any) -> None:
        self.setting, self.noise, self.model = setting, objective.model.noise, objective.model
        self.low, self.high = objective.q_low, objective.q_high
        self.steps = 0

    def __call__(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(noisy images, clean images times the root of their weight, what each part is told)."""
        self.steps += 1
        torch.manual_seed(self.steps)
        example = self.model.example(self.setting.samples(self.setting.job.batch))
        draws: Any = TorchDraws(self.setting.job.batch, self.setting.device)
        level = self.noise.quantile(self.low + draws.uniform((), 0) * (self.high - self.low))
        noisy = self.noise.corrupt(example.clean, level, draws)
        target = _root_weight(self.noise, level) * example.target
        return noisy, target, {"noisy": noisy, "level": level, "label": example.context}


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    """By the norm of the gradients of all stages."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    square = torch.nn.utils.get_total_norm(gradients, foreach=True).square()
    dist.all_reduce(square)
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, square.sqrt(), foreach=True)
