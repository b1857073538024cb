"""Baselines: the same layers trained in other ways, for the FLOPs that the isolated blocks take together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbtrain.config import Config, TrainingConfig
from dbtrain.errors import ConfigError
from dbtrain.method.schemes import SCHEMES
from dbtrain.run.cost import estimate, recomputed
from dbtrain.run.plan import RunPlan, load_data
from dbtrain.run.prepare import sketch

KINDS: Mapping[str, str] = {
    "end_to_end": "end_to_end",
    "checkpointing": "end_to_end",
    "joint": "joint",
    "greedy": "greedy",
    "forward_forward": "forward_forward",
    "ensemble": "ensemble",
}
"""Method of each kind of baseline."""

COUNTED = 2
"""Samples in the batch whose FLOPs are counted."""


@dataclass(frozen=True)
class Baseline:
    """A baseline of a run, and what both take."""

    config: Config
    flops: float
    """Of its training, forward and backward."""
    budget: float
    """Of training the isolated blocks."""
    again: float
    """Of activation checkpointing on top, which are not part of the budget."""

    def describe(self) -> str:
        """One line."""
        line = (
            f"{self.config.name}: {self.config.training.steps} steps, {self.flops:.4g} FLOPs; blocks {self.budget:.4g}"
        )
        return line + (f"; activation checkpointing computes {self.again:.4g} again, not counted" if self.again else "")


def baseline(config: Config, kind: str = "end_to_end") -> Baseline:
    """A baseline of a run of isolated blocks.

    Its steps are the blocks' steps times the ratio of their FLOPs a sample, private stems and heads included, to its
    own; both are counted by PyTorch on the same batch.

    Raises:
        ConfigError: there is no such kind, or the architecture has none.
    """
    other = reshaped(config, kind)
    data = load_data(config)
    budget = config.training.steps * _per_step(sketch(config, data))
    counted = sketch(other, data)
    per_step = _per_step(counted)
    training = _stretched(other.training, max(1, round(budget / per_step)))
    again = 0.0
    if training.activation_checkpointing:
        again = recomputed(counted, 0, COUNTED) / COUNTED * training.batch_size * training.steps
    return Baseline(other.model_copy(update={"training": training}), training.steps * per_step, budget, again)


def _stretched(training: TrainingConfig, steps: int) -> TrainingConfig:
    """The same schedule over other steps: a warm-up that stayed would eat a short run."""
    warmup = round(training.optimizer.warmup * steps / training.steps)
    return training.model_copy(
        update={"steps": steps, "optimizer": training.optimizer.model_copy(update={"warmup": warmup})}
    )


def end_to_end(config: Config) -> Config:
    """Configuration of the end-to-end baseline of a run."""
    return baseline(config).config


def training_flops(run_plan: RunPlan) -> float:
    """FLOPs of training all of a run's blocks to their last step."""
    return run_plan.config.training.steps * _per_step(run_plan)


def _per_step(run_plan: RunPlan) -> float:
    shards = range(run_plan.shards.blocks)
    flops = sum(estimate(run_plan, shard, COUNTED, 1).flops for shard in shards)
    return flops / COUNTED * run_plan.config.training.batch_size


def reshaped(config: Config, kind: str) -> Config:
    """A baseline's configuration but for its steps; raises ConfigError if there is no such kind."""
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no baseline: there are {', '.join(KINDS)}")
    training = config.training
    changes: dict[str, Any] = {"name": f"{config.name}-{kind.replace('_', '-')}", "method": KINDS[kind]}
    if SCHEMES[KINDS[kind]].shared or KINDS[kind] == "end_to_end":
        # one worker has them all
        changes["cluster"] = config.cluster.model_copy(update={"blocks": {}})
        training = training.model_copy(update={"blocks": {}})
    if KINDS[kind] == "end_to_end":
        changes |= {"blocks": 1, "layers_per_block": None}
        if config.noise.edges:
            # the same range in one slice; an architecture that is shown no noise ignores it
            edges = (config.noise.edges[0], config.noise.edges[-1])
            changes["noise"] = config.noise.model_copy(update={"edges": edges})
    if kind == "checkpointing":
        training = training.model_copy(update={"activation_checkpointing": True})
    return config.model_copy(update={**changes, "training": training})
