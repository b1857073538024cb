"""Optimizer of a block; its learning rate is in `run/schedule.py`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dbtrain.config import OptimizerConfig, TrainingConfig


def long_warmup(training: TrainingConfig) -> str | None:
    """One line for a warm-up of more than half of the steps, which nothing else would tell; else None.

    A block's own steps need no look: its warm-up is in proportion to them.
    """
    steps, warmup = training.steps, training.optimizer.warmup
    if 2 * warmup <= steps:
        return None
    rises = (
        f"takes most of training.steps={steps}: the learning rate has its peak with {steps - warmup} step(s) left"
        if warmup < steps
        else f"does not end before training.steps={steps}: the learning rate rises to {min(1.0, steps / warmup):.0%} "
        "of training.optimizer.lr at the last step and never falls"
    )
    tenth = round(steps / 10)
    return f"training.optimizer.warmup={warmup} {rises}; for a tenth of the steps set training.optimizer.warmup={tenth}"


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups with ``lr`` (peak), ``weight_decay`` and ``use_muon``; what has fewer than two
    dimensions is not decayed; embeddings and positions are.

    Muon takes the matrices of the layers; stem, head and modulation (which starts at zero) stay with AdamW.
    """
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "plain": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2
        inner = ".layers." in f".{name}" and "modulation" not in name
        parameter.use_muon = config.name == "muon" and matrix and inner  # type: ignore[attr-defined]
        kind = "muon" if parameter.use_muon else "decay" if matrix else "plain"  # type: ignore[attr-defined]
        groups[kind].append(parameter)
    adam = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "use_muon": False}
    # gram Newton-Schulz wants float16; the standard iteration runs in bfloat16 or float32 everywhere
    muon = {"lr": config.muon_lr, "momentum": 0.95, "ns_method": "standard", "use_muon": True}
    settings = {
        "muon": {**muon, "weight_decay": config.weight_decay},
        "decay": {**adam, "weight_decay": config.weight_decay},
        "plain": {**adam, "weight_decay": 0.0},
    }
    return [{"params": params, **settings[kind]} for kind, params in groups.items() if params]


class UncompiledAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, the same arithmetic, without what is there for the case that its step is compiled.

    That imports PyTorch's compiler at the first call of each of these methods: a second of processor time or
    more in every worker's start, also of those that compile nothing. Nobody compiles the step here.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that are there; arguments and result are those of PyTorch."""
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW over groups of :func:`parameter_groups`;
    every hyperparameter comes from the groups."""
    return UncompiledAdamW(groups, fused=True)
