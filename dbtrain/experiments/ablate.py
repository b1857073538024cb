"""The ablate command: block counts x ranges x partitions x seeds on one cluster,
beside baselines at equal FLOPs."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dbtrain.config import Config, load_config
from dbtrain.config.overrides import write_override
from dbtrain.coordinator.ray.address import connect
from dbtrain.coordinator.status import status
from dbtrain.errors import ConfigError, IncompleteRunError
from dbtrain.experiments.baseline import KINDS, reshaped, training_flops
from dbtrain.method.noise_processes import noise_process
from dbtrain.method.split import partition
from dbtrain.models.registry import architecture
from dbtrain.run.run import Run

EVENLY = "layers_per_block=null"
"""Said of every run: the file may name the layers of one block count."""
ALIKE = ("training.blocks=null", "cluster.blocks=null")
"""Likewise, before what the command says: the exceptions of the file's blocks are not for other counts."""


@dataclass(frozen=True)
class Variant:
    """One run of the grid."""

    command: tuple[str, ...]
    """`train`, or `baseline` and its kind."""
    blocks: int
    ranges: str
    """Policy of the noise range, or the kind of the baseline."""
    partition: str
    """How layers are shared out among the blocks."""
    seed: int
    overrides: tuple[str, ...]
    run: str
    """Directory or URL of the run."""


@dataclass(frozen=True)
class Measured:
    """What a finished run of the grid gave."""

    variant: Variant
    scores: dict[str, dict[str, float]]
    """Scores by split, then by readout."""
    memory: int
    """Greatest peak of a worker, bytes."""
    seconds: float
    """Spent training, summed over the blocks."""
    flops: float
    """FLOPs of training all blocks."""


def policies(config: Config, asked: str | None) -> list[str]:
    """Range policies of a grid: those asked for, with commas, or all worth comparing for the architecture."""
    if asked:
        return asked.split(",")
    known = {"calibrated", "paper"} <= set(noise_process(config.noise_process).policies)
    return ["calibrated", "paper"] if known and architecture(config.model.arch).codes else [config.noise.ranges]


@dataclass(frozen=True)
class Grid:
    """What to vary."""

    blocks: Sequence[int]
    ranges: Sequence[str]
    partitions: Sequence[str]
    seeds: Sequence[int]
    baselines: Sequence[str]

    def counts_of(self, baseline: str) -> Sequence[int]:
        """Block counts for which a kind of baseline is run: only the first for a network end to end."""
        return self.blocks[:1] if KINDS.get(baseline) == "end_to_end" else self.blocks

    def partitions_of(self, depth: int, blocks: int) -> dict[str, tuple[int, ...]]:
        """Layers of each block by partition; of those that are the same, as for one block, only the first."""
        names = {partition(name, depth, blocks): name for name in reversed(self.partitions)}
        return {name: layers for layers, name in reversed(names.items())}


@dataclass(frozen=True)
class Family:
    """The runs of one grid: what they have in common, and how each is made from it."""

    path: str
    """Path of the configuration."""
    overrides: tuple[str, ...]
    name: str
    """Beginning of the runs' names."""

    def baseline(self, kind: str, blocks: int, seed: int) -> Variant:
        """A baseline at the FLOPs of so many blocks, after which it is named."""
        overrides = self._overrides(blocks, seed, f"{self.name}-b{blocks}-s{seed}", EVENLY)
        config = reshaped(load_config(self.path, overrides), kind)
        return Variant(("baseline", "--kind", kind), config.blocks, kind, "even", seed, overrides, config.run_url)

    def isolated(self, blocks: int, ranges: str, shares: str, layers: Sequence[int], seed: int) -> Variant:
        """A run of isolated blocks, named after its settings; the partition `shares` gives their layers."""
        even = shares == "even"
        name = "-".join([self.name, f"b{blocks}", ranges, *([] if even else [shares]), f"s{seed}"])
        sizes = EVENLY if even else f"layers_per_block=[{','.join(map(str, layers))}]"
        overrides = self._overrides(blocks, seed, name, f"noise.ranges={ranges}", sizes)
        return Variant(("train",), blocks, ranges, shares, seed, overrides, load_config(self.path, overrides).run_url)

    def _overrides(self, blocks: int, seed: int, name: str, *others: str) -> tuple[str, ...]:
        return (*self.overrides, f"blocks={blocks}", *others, f"seed={seed}", f"name={name}")


def grid(path: str, overrides: Sequence[str], axes: Grid) -> list[Variant]:
    """Every run of the grid, the baselines first; a baseline's name says whose FLOPs it gets.

    Raises:
        ConfigError: one of them is no valid configuration, or an override says what the partitions vary.
    """
    if any(override.startswith("layers_per_block=") for override in overrides):
        raise ConfigError("layers_per_block is what a grid varies: leave it out, and choose with --partitions")
    overrides = (*ALIKE, *overrides)
    base = load_config(path, (*overrides, f"blocks={axes.blocks[0]}"))
    family = Family(path, overrides, base.name)
    baselines = [
        family.baseline(kind, blocks, seed)
        for kind in axes.baselines
        for blocks in axes.counts_of(kind)
        for seed in axes.seeds
    ]
    isolated = [
        family.isolated(blocks, ranges, shares, layers, seed)
        for blocks in axes.blocks
        for ranges in axes.ranges
        for shares, layers in axes.partitions_of(base.model.depth, blocks).items()
        for seed in axes.seeds
    ]
    return baselines + isolated


def run_grid(path: str, variants: Sequence[Variant], parallel: int, tell: Callable[[str], None]) -> list[Measured]:
    """Run the variants, several at a time, on one cluster; those that are done already are only evaluated.

    Raises:
        IncompleteRunError: one failed; the others have run to their ends. The same command continues.
    """
    address = load_config(path, variants[0].overrides).cluster.address
    cluster = connect(address)
    try:
        tasks = _in_turn([partial(_run, path, v, cluster.address, tell) for v in variants], parallel)
    finally:
        cluster.close()
    errors = [str(task.exception()) for task in tasks if task.exception()]
    if errors:
        raise IncompleteRunError(f"{len(errors)} of {len(variants)} runs failed: {'; '.join(errors)}")
    return [task.result() for task in tasks]


def _in_turn(calls: Sequence[Callable[[], Measured]], parallel: int) -> list["Future[Measured]"]:
    """Make the calls, several at a time, to the last one's end."""
    pool = ThreadPoolExecutor(parallel)
    try:
        tasks = [pool.submit(call) for call in calls]
        wait(tasks)
        return tasks
    finally:
        # after Ctrl-C, which the terminal sends to the runs as well,
        # those that have begun commit on the cluster first
        pool.shutdown(cancel_futures=True)


def _run(path: str, variant: Variant, address: str, tell: Callable[[str], None]) -> Measured:
    _command(variant, [*variant.command, path, *variant.overrides, f"cluster.address={address}"])
    _command(variant, ["eval", variant.run, *evaluation(path, variant)])
    measured = measure(variant)
    readouts = {name: s for name, s in measured.scores["test"].items() if not name.startswith("class_")}
    tell(f"{variant.run}: {', '.join(f'{name} {s:.4f}' for name, s in readouts.items())}")
    return measured


def evaluation(path: str, variant: Variant) -> list[str]:
    """The section `evaluation` as overrides: that of this command,
    and not of the one that trained the run."""
    section = load_config(path, variant.overrides).evaluation.model_dump(mode="json")
    return [write_override(f"evaluation.{name}", value) for name, value in section.items()]


def _command(variant: Variant, arguments: list[str]) -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "dbtrain", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise IncompleteRunError(f"{variant.run} ended with code {done.returncode} in `{arguments[0]}`: {last[-600:]}")


def measure(variant: Variant) -> Measured:
    """Read a finished run's figures from its files.

    Raises:
        ShardError: they are missing or damaged.
    """
    run = Run.at(variant.run)
    rows = [block.row for block in status(run)]
    return Measured(
        variant=variant,
        scores=run.store.read_json("evaluation.json")["scores"],
        memory=max(row.memory or 0 for row in rows),
        seconds=sum(row.seconds for row in rows),
        flops=training_flops(run.plan),
    )


def summary(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row for each setting: each readout's mean and deviation over the seeds by split, and the costs."""
    by_setting: dict[tuple[int, str, str], list[Measured]] = {}
    for m in measured:
        by_setting.setdefault((m.variant.blocks, m.variant.ranges, m.variant.partition), []).append(m)
    return [_row(setting, group) for setting, group in by_setting.items()]


def _row(setting: tuple[int, str, str], group: Sequence[Measured]) -> dict[str, Any]:
    """A setting's row, from its runs, one for each seed."""
    scores = {
        split: {readout: _spread([m.scores[split][readout] for m in group]) for readout in readouts}
        for split, readouts in group[0].scores.items()
    }
    return {
        **dict(zip(("blocks", "ranges", "partition"), setting, strict=True)),
        "seeds": [m.variant.seed for m in group],
        "scores": scores,
        "memory": max(m.memory for m in group),
        "seconds": sum(m.seconds for m in group) / len(group),
        "flops": sum(m.flops for m in group) / len(group),
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "std": float(tensor.std()) if len(values) > 1 else None}
