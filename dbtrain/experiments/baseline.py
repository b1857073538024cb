"""Baselines: the same layers trained in other ways, for the FLOPs that the isolated blocks take together."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from dbtrain.config import Config, TrainingConfig
from dbtrain.config.init import InitConfig
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError
from dbtrain.method.schemes import SCHEMES
from dbtrain.run.branch import branch_plan
from dbtrain.run.cost import flops_of, recomputed
from dbtrain.run.initial_weights import InitialWeights, as_its_source
from dbtrain.run.plan import RunPlan, load_data
from dbtrain.run.prepare import sketch
from dbtrain.run.run import Run
from dbtrain.run.weight_source import WeightSource

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
    """FLOPs of the baseline's training, forward and backward."""
    budget: float
    """FLOPs of training the isolated blocks, which the baseline may spend."""
    again: float
    """FLOPs that activation checkpointing adds, which are not part of the budget."""
    unlike: str = ""
    """Why it starts from random weights where the blocks do not; '' if it starts as they do."""

    def describe(self) -> str:
        """One line."""
        training = self.config.training
        lengths = [training.of_block(block).steps for block in range(self.config.blocks)]
        steps = ", ".join(map(str, lengths if len(set(lengths)) > 1 else lengths[:1]))
        line = f"{self.config.name}: {steps} steps, {self.flops:.4g} FLOPs; blocks {self.budget:.4g}"
        line += f"; activation checkpointing computes {self.again:.4g} again, not counted" if self.again else ""
        return line + (f"; it starts from random weights, unlike the blocks: {self.unlike}" if self.unlike else "")


def baseline(config: Config, kind: str = "end_to_end") -> Baseline:
    """A baseline of a run of isolated blocks.

    Its steps are those of the run times the ratio of the FLOPs that all blocks and their branch take in
    their own steps and batches, private stems and heads included, to those that it would take in the steps
    of the run. Both are counted by PyTorch on the same batch.

    Raises:
        ConfigError: there is no such kind, or the architecture has none.
    """
    other, unlike = reshaped(config, kind), _cannot_start(config, kind)
    data = load_data(config)
    if misfit := _misfit(other, data):
        other, unlike = other.model_copy(update={"init": InitConfig()}), misfit
    isolated, counted = sketch(config, data), sketch(other, data)
    budget, branch = _blocks(isolated) + _branch(isolated), _branch(counted)
    training = _stretched(other.training, (budget - branch) / _blocks(counted))
    again = 0.0
    if training.activation_checkpointing:
        again = recomputed(counted, 0, COUNTED) / COUNTED * training.batch_size * training.steps
    other = other.model_copy(update={"training": training})
    flops = _blocks(replace(counted, config=other)) + branch
    return Baseline(other, float(flops), float(budget), again, unlike)


def _cannot_start(config: Config, kind: str) -> str:
    """Why a baseline cannot start from what the blocks start from, whatever that holds; '' if it can."""
    init, scheme = config.init, SCHEMES[KINDS[kind]]
    if init.source is None and init.branch is None:
        return ""
    if scheme.starts_random:
        return f"method={KINDS[kind]} can start from nothing else"
    whole = scheme.shared or (KINDS[kind] == "end_to_end" and config.blocks > 1)
    if whole and (init.branch or init.layers == "repeat"):
        return "they start from a network of one block's layers, and it has all layers at once"
    return ""


def _misfit(config: Config, data: DataSet) -> str:
    """Why the weights that a baseline would start from are not those of its model; '' if they are."""
    if config.init.source is None:
        return ""
    try:
        source = WeightSource.open(config.init.source)
    except ConfigError:
        existing = Run.at(config.run_url)
        if not existing.exists:
            raise
        # the source is needed no more: what was decided when the run was started stands in it
        return "" if existing.config.init == config.init else "its run was started so"
    try:
        layers = config.init.layers
        InitialWeights.of(as_its_source(sketch(config, data), source, layers), source, layers)
    except ConfigError as error:
        return str(error)
    return ""


def _stretched(training: TrainingConfig, ratio: Fraction) -> TrainingConfig:
    """The same schedules over other steps, of blocks with a length of their own too."""

    def steps(before: int) -> int:
        return max(1, round(before * ratio))

    own = {
        block: exception.model_copy(update={"steps": steps(exception.steps)}) if exception.steps else exception
        for block, exception in training.blocks.items()
    }
    return training.over(steps(training.steps)).model_copy(update={"blocks": own})


def end_to_end(config: Config) -> Config:
    """Configuration of the end-to-end baseline of a run."""
    return baseline(config).config


def training_flops(run_plan: RunPlan) -> float:
    """FLOPs of training all of a run's blocks to their last steps, and its branch before them."""
    return float(_blocks(run_plan) + _branch(run_plan))


def _blocks(run_plan: RunPlan) -> Fraction:
    """FLOPs of all steps of all workers; exact, so that what is rounded to whole steps is rounded once."""

    known: dict[Hashable, int] = {}

    def block(shard: int) -> Fraction:
        training, shape = run_plan.config.training.of_block(shard), run_plan.shape_of(shard)
        if shape not in known:
            known[shape] = flops_of(run_plan, shard, COUNTED)
        a_sample = Fraction(known[shape], COUNTED)
        return training.steps * training.batch_size * a_sample

    return sum(map(block, range(run_plan.shards.blocks)), Fraction())


def _branch(run_plan: RunPlan) -> Fraction:
    """FLOPs of training the network that the blocks start from; 0 where they have none."""
    return _blocks(branch_plan(run_plan)) if run_plan.config.init.branch else Fraction()


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
    if _cannot_start(config, kind):
        changes["init"] = InitConfig()
    if kind == "checkpointing":
        training = training.model_copy(update={"activation_checkpointing": True})
    return config.model_copy(update={**changes, "training": training})
