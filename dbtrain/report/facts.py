"""What the files of a run say of it, gathered once. What cannot be read is told on the page."""

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from dbtrain import __version__
from dbtrain.config import Config
from dbtrain.coordinator.lifecycle import Phase
from dbtrain.coordinator.status import BlockStatus
from dbtrain.coordinator.status import status as read_status
from dbtrain.errors import DbtrainError, ShardError, first_line
from dbtrain.evaluation.images.pictures import PICTURE
from dbtrain.evaluation.kept import SCORES, kept
from dbtrain.evaluation.losses import Point
from dbtrain.evaluation.metrics import METRICS, Metric
from dbtrain.evaluation.sweep.sweep import SWEEP, Sweep
from dbtrain.evaluation.text.kept_texts import KeptText, kept_texts
from dbtrain.experiments.baseline import KINDS, training_flops
from dbtrain.report.history import History, history
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store

LEVELS = 400
"""Number of levels at which the density of the training levels is drawn."""
MOST_PICTURE_BYTES = 8 << 20
"""A larger samples.png would make the page heavy: it is named, not shown."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Evaluation:
    """What ``dbtrain eval`` keeps in evaluation.json."""

    metric: str
    """Key of `METRICS`."""
    scores: dict[str, dict[str, float]]
    """Scores by split, then by readout."""
    unfinished: str = ""
    """How far the blocks were, if they were not done."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Samples of each split; empty in a file of before."""
    weights: str = ""
    """Hash of the model that was measured, `MergedDirectory.weights_hash`; '' in a file of before."""

    @property
    def row(self) -> Metric:
        """How the metric is written; KeyError if this version has none of that name."""
        return METRICS[self.metric]

    @property
    def test(self) -> dict[str, float]:
        """Scores of the test split by readout; empty if it was not measured."""
        return self.scores.get("test", {})


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
    picture: str | None
    """samples.png in base64."""
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


@dataclass
class _Reader:
    """Reads one thing after the other; what fails is told."""

    told: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[[], Found], otherwise: Found) -> Found:
        """What a call gives, or `otherwise` if it ends in an error of the run's files."""
        try:
            return read()
        except DbtrainError as error:
            self.told.append(str(error))
            return otherwise


def gather(run: Run) -> Facts:
    """Read a run.

    Raises:
        ShardError: it is no run, or its run.json is damaged.
        ConfigError: its configuration is of another version.
    """
    manifest, config, reader = run.manifest, run.config, _Reader()
    statuses = tuple(read_status(run))
    plan = reader.attempt(lambda: read_plan(manifest, None), None)
    histories = _histories(run, statuses)
    rivals = _rivals(run, reader)
    itself = _rival(run, config.method, statuses, reader, counted=bool(rivals))
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
        losses=reader.attempt(lambda: _losses(run), ()),
        picture=reader.attempt(lambda: _picture(run), None),
        texts=reader.attempt(lambda: tuple(reversed(kept_texts(run))), ()),
        ablation=reader.attempt(lambda: _ablation(run), ()),
        sweep=reader.attempt(lambda: kept(run, SWEEP, Sweep, "dbtrain sweep"), None),
        merged=run.merged.exists("config.json"),
        chance=_chance(config, manifest.shape, itself.evaluation),
        extended=tuple((e.when, e.before.steps, e.after.steps) for e in manifest.extensions),
        told=(*reader.told, *(line for one in histories for line in one.told)),
    )


def _losses(run: Run) -> tuple[Point, ...]:
    return tuple(kept(run, "losses.json", list[Point], "dbtrain losses") or ())


def _histories(run: Run, statuses: tuple[BlockStatus, ...]) -> tuple[History, ...]:
    # the branch last, so that a block has the same colour in all figures
    blocks = [*run.blocks, *(run.branch.blocks if run.branch.exists else ())]
    running = {status.row.name: status.row.phase == Phase.RUNNING.value for status in statuses}
    return tuple(history(block, running.get(block.name, False)) for block in blocks)


def _rivals(run: Run, reader: _Reader) -> tuple[Rival, ...]:
    """The baselines of a run, which lie beside it."""
    parent, _, _ = run.store.url.rstrip("/").rpartition("/")
    beside = {kind: Run(Store(f"{parent}/{run.manifest.name}-{kind.replace('_', '-')}")) for kind in KINDS}
    there = {kind: other for kind, other in beside.items() if other.exists}
    known: dict[str, list[BlockStatus]] = {
        kind: reader.attempt(partial(read_status, other), _none()) for kind, other in there.items()
    }
    return tuple(
        _rival(there[kind], kind, tuple(statuses), reader, counted=True) for kind, statuses in known.items() if statuses
    )


def _none() -> list[BlockStatus]:
    return []


def _rival(run: Run, kind: str, statuses: tuple[BlockStatus, ...], reader: _Reader, counted: bool) -> Rival:
    """A run in the terms of a comparison; its FLOPs are counted where there is something to compare."""
    rows = [status.row for status in statuses]
    known = [row.memory for row in rows if row.memory is not None]
    evaluation = reader.attempt(lambda: kept(run, "evaluation.json", Evaluation, "dbtrain eval"), None)
    if evaluation is not None and evaluation.metric not in METRICS:
        reader.told.append(f"{run.store.where('evaluation.json')} has the metric {evaluation.metric!r}, unknown here")
        evaluation = None
    if evaluation is not None and reader.attempt(partial(_outdated, run, evaluation), False):
        reader.told.append(
            f"{run.store.where(SCORES)} is of an older model than merged/: dbtrain eval measures it anew"
        )
        evaluation = None
    return Rival(
        kind=kind,
        name=run.manifest.name,
        memory=max(known, default=None),
        seconds=sum(row.seconds for row in rows),
        longest=max((row.seconds for row in rows), default=0.0),
        flops=reader.attempt(lambda: training_flops(run.plan), None) if counted else None,
        done=all(row.phase == Phase.DONE.value for row in rows),
        evaluation=evaluation,
    )


def _outdated(run: Run, evaluation: Evaluation) -> bool:
    """Whether another model was measured than the one that is merged now."""
    if not evaluation.weights or not run.merged.exists("config.json"):
        return False
    return MergedDirectory(run.merged).weights_hash != evaluation.weights


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


def _picture(run: Run) -> str | None:
    if not run.store.exists(PICTURE):
        return None
    if run.store.size(PICTURE) > MOST_PICTURE_BYTES:
        raise ShardError(f"{run.store.where(PICTURE)} is larger than {MOST_PICTURE_BYTES >> 20} MiB, and is not shown")
    return base64.b64encode(run.store.read(PICTURE)).decode("ascii")


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
