"""What the files of a run say of it, gathered once. What cannot be read is told on the page."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from dbtrain import __version__
from dbtrain.config import Config
from dbtrain.coordinator.lifecycle import Phase
from dbtrain.coordinator.status import BlockStatus
from dbtrain.coordinator.status import status as read_status
from dbtrain.errors import ShardError, first_line
from dbtrain.evaluation.losses import Point
from dbtrain.evaluation.sweep.sweep import Sweep
from dbtrain.evaluation.text.kept_texts import KeptText
from dbtrain.experiments.baseline import KINDS, training_flops
from dbtrain.report.history import History, history
from dbtrain.report.results import Evaluation, Picture, Reader, Results
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store

LEVELS = 400
"""Number of levels at which the density of the training levels is drawn."""


@dataclass(frozen=True)
class Density:
    """How often each noise level is trained, and which block owns it."""

    name: str
    """What a level is called."""
    levels: tuple[float, ...]
    """Rising."""
    density: tuple[float, ...]
    """Share of the draws per unit of ln(level), or of the level where the range ends at 0."""
    edges: tuple[float, ...]
    """Falling: block b owns the levels from ``edges[b + 1]`` to ``edges[b]``."""
    shares: tuple[float, ...]
    """Share of the draws that fall into each block's slice."""
    log: bool


@dataclass(frozen=True)
class Rival:
    """A run of the same layers that was trained in another way, beside which this one is judged."""

    kind: str
    """Key of `KINDS`."""
    name: str
    memory: int | None
    """Greatest peak of one of its workers, bytes."""
    seconds: float
    """Spent training, summed over its workers."""
    longest: float
    """Seconds of training of the worker that trained longest."""
    flops: float | None
    """FLOPs of its training; None where they were not counted."""
    done: bool
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Setting:
    """One row of ablation.json."""

    blocks: int
    ranges: str
    partition: str
    seeds: list[int]
    scores: dict[str, dict[str, dict[str, float | None]]]
    memory: int
    seconds: float


@dataclass(frozen=True)
class Facts:
    """Everything that the page shows."""

    name: str
    url: str
    made: float
    """When this was gathered, seconds since the epoch."""
    version: str
    """Version of the dbtrain that gathered it."""
    config: Config
    statuses: tuple[BlockStatus, ...]
    """Status of the branch, if there is one, and of every block."""
    histories: tuple[History, ...]
    itself: Rival
    """The run in the terms in which others are compared with it."""
    rivals: tuple[Rival, ...]
    density: Density | None
    losses: tuple[Point, ...]
    picture: Picture | None
    texts: tuple[KeptText, ...]
    """Texts that the run wrote, newest first."""
    ablation: tuple[Setting, ...]
    sweep: Sweep | None
    merged: bool
    chance: float | None
    """Score of guessing, where the metric has one that is known."""
    extended: tuple[tuple[float, int, int], ...]
    """(when, steps before, steps after)."""
    told: tuple[str, ...] = ()
    """What could not be read, one line each."""
    outdated: tuple[tuple[str, str], ...] = ()
    """What is of another model than the merged one and not shown, and the command that makes it anew."""


def gather(run: Run) -> Facts:
    """Read a run.

    Raises:
        ShardError: it is no run, or its run.json is damaged.
        ConfigError: its configuration is of another version.
    """
    manifest, config, reader = run.manifest, run.config, Reader()
    statuses = tuple(read_status(run))
    plan = reader.attempt(lambda: read_plan(manifest, None), None)
    histories = _histories(run, statuses)
    rivals, results = _rivals(run, reader), Results(run, reader)
    itself = _rival(results, config.method, statuses, counted=bool(rivals))
    return Facts(
        name=manifest.name,
        url=run.store.url,
        made=time.time(),
        version=__version__,
        config=config,
        statuses=statuses,
        histories=histories,
        itself=itself,
        rivals=rivals,
        density=reader.attempt(lambda: _density(plan), None) if plan else None,
        losses=results.losses(),
        picture=results.picture(),
        texts=results.texts(),
        ablation=reader.attempt(lambda: _ablation(run), ()),
        sweep=results.sweep(),
        merged=run.merged.exists("config.json"),
        chance=_chance(config, manifest.shape, itself.evaluation),
        extended=tuple((e.when, e.before.steps, e.after.steps) for e in manifest.extensions),
        told=(*reader.told, *(line for one in histories for line in one.told)),
        outdated=tuple(reader.outdated),
    )


def _histories(run: Run, statuses: tuple[BlockStatus, ...]) -> tuple[History, ...]:
    # the branch last, so that a block has the same colour in all figures
    blocks = [*run.blocks, *(run.branch.blocks if run.branch.exists else ())]
    # without a command `status` calls such a block lost
    under_command = {s.row.name for s in statuses if s.row.phase in (Phase.PLACED.value, Phase.RUNNING.value)}
    return tuple(history(block, block.name in under_command) for block in blocks)


def _rivals(run: Run, reader: Reader) -> tuple[Rival, ...]:
    """The baselines of a run, which lie beside it."""
    parent, _, _ = run.store.url.rstrip("/").rpartition("/")
    beside = {kind: Run(Store(f"{parent}/{run.manifest.name}-{kind.replace('_', '-')}")) for kind in KINDS}
    there = {kind: other for kind, other in beside.items() if other.exists}
    known: dict[str, list[BlockStatus]] = {
        kind: reader.attempt(partial(read_status, other), _none()) for kind, other in there.items()
    }
    return tuple(
        _rival(Results(there[kind], reader), kind, tuple(statuses), counted=True)
        for kind, statuses in known.items()
        if statuses
    )


def _none() -> list[BlockStatus]:
    return []


def _rival(results: Results, kind: str, statuses: tuple[BlockStatus, ...], counted: bool) -> Rival:
    """A run in the terms of a comparison; its FLOPs are counted where there is something to compare."""
    run, reader = results.run, results.reader
    rows = [status.row for status in statuses]
    known = [row.memory for row in rows if row.memory is not None]
    return Rival(
        kind=kind,
        name=run.manifest.name,
        memory=max(known, default=None),
        seconds=sum(row.seconds for row in rows),
        longest=max((row.seconds for row in rows), default=0.0),
        flops=reader.attempt(lambda: training_flops(run.plan), None) if counted else None,
        done=all(row.phase == Phase.DONE.value for row in rows),
        evaluation=results.evaluation(),
    )


def _density(plan: RunPlan) -> Density | None:
    """The density of the training levels, by differences of their distribution function."""
    if plan.distribution["kind"] == "none":
        return None
    noise, edges = plan.noise(), plan.ranges.edges
    log = edges[-1] > 0
    low, high = (torch.tensor(edge, dtype=torch.float64) for edge in (edges[-1], edges[0]))
    ends = (low.log(), high.log()) if log else (low, high)
    grid = torch.linspace(float(ends[0]), float(ends[1]), LEVELS + 1, dtype=torch.float64)
    levels = grid.exp() if log else grid
    share = noise.cdf(levels)
    middle = (levels[1:] * levels[:-1]).sqrt() if log else (levels[1:] + levels[:-1]) / 2
    at_edges = noise.cdf(torch.tensor(edges, dtype=torch.float64))
    return Density(
        name=noise.level_name,
        levels=tuple(middle.tolist()),
        density=tuple((share.diff() / grid.diff()).tolist()),
        edges=edges,
        shares=tuple((at_edges[:-1] - at_edges[1:]).tolist()),
        log=log,
    )


def _ablation(run: Run) -> tuple[Setting, ...]:
    """The table of an ablation that began from the run's configuration, beside the run, above it, or here."""
    if not run.store.is_local:
        return ()
    folder = f"{run.manifest.name}-ablation"
    beside = Path(run.store.path).absolute().parent
    places = [place / folder / "ablation.json" for place in (beside, beside.parent, Path.cwd())]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return ()
    try:
        return tuple(TypeAdapter(list[Setting]).validate_json(file.read_bytes()))
    except (OSError, ValidationError) as error:
        raise ShardError(f"{file} cannot be read ({first_line(error)}): make it anew with dbtrain ablate") from None


def _chance(config: Config, shape: Any, evaluation: Evaluation | None) -> float | None:
    """What guessing would score: one of the classes, or every token alike."""
    if evaluation is None or evaluation.metric != "accuracy":
        return None
    classes = shape.get("classes")
    return 1 / classes if isinstance(classes, int) and classes > 0 else None
