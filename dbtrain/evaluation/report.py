"""Evaluate a run and put two runs side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from dbtrain.config import Config, EvaluationConfig
from dbtrain.evaluation.accuracy import CLASS
from dbtrain.evaluation.images.frechet import CONTROLS
from dbtrain.evaluation.kept import MEASURED, keep
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.metrics import Metric, metric_of
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.overrides import not_said, overridden
from dbtrain.evaluation.pipeline.places import OpenHosts
from dbtrain.evaluation.speed import Speed, Stopwatch
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import UNFINISHED
from dbtrain.telemetry.counting import Count, silent

Scores = dict[str, dict[str, float]]
"""Scores by split (``validation``, ``test``), then by readout."""

MOST_CLASSES = 20
"""The most classes that get a line each in a table."""

READOUTS: Mapping[str, str] = {
    "chain": "last of the chain",
    "mean": "mean over the chain",
    "first": "block 0 alone",
    "shuffled_blocks": "control: each slice by the next block",
    "scrambled_class": "control: another class at every step",
    "training_images": "control: training images, no samples",
    "shuffled": "control: blocks in another order",
    "scrambled": "control: true codes noised, images of other samples",
}


def evaluate_run(
    run: Run,
    overrides: Sequence[str] = (),
    section: EvaluationConfig | None = None,
    show: Callable[[Metric, Scores, str], None] = lambda metric, scores, progress: None,
    count: Count = silent,
    tell: Callable[[str], None] = lambda line: None,
    hosts: OpenHosts | None = None,
) -> tuple[Metric, Scores]:
    """Score of a run's merged model by split and readout;
    also written to ``evaluation.json``, once they were shown.

    Args:
        overrides: overrides of the section `evaluation`, such as ``evaluation.steps=100``, and of where the
            data lies, such as ``data.path=/elsewhere``; it must be the same data.
        section: how to evaluate, if not as the run's own configuration says.
        show: called with the result before it is written, and with how far blocks are that are not done.
        count: is told how far it has come.
        tell: gets a line on what takes long before it begins, and one with how long the parts took.
        hosts: connects to the cluster that a pipeline is in.

    Raises:
        ConfigError: an override is wrong or of another section.
        ShardError: the run is not merged, its files are damaged, or the scores cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch = Stopwatch()

    def changed(config: Config) -> Config:
        return overridden(config.model_copy(update={"evaluation": section or config.evaluation}), overrides)

    with open_run(run, device, changed=changed, hosts=hosts) as model:
        model.run_plan = replace(model.run_plan, paths=not_said(model.run_plan.paths, overrides))
        model.count = count
        metric, scores, record = _measured(model, watch, tell)
    show(metric, scores, model.progress)
    keep(run, "evaluation.json", record, "the scores")
    return metric, scores


def _measured(
    model: MergedModel, watch: Stopwatch, tell: Callable[[str], None]
) -> tuple[Metric, Scores, dict[str, Any]]:
    """The metric of a model, its scores, and what is written of them."""
    config, data = model.run_plan.config, model.run_plan.data()
    name, metric = metric_of(config)
    splits = {"validation": data.validation, "test": data.test}
    speed = Speed.of(config, model.blocks.computes_on, config.evaluation.samples if metric.draws else 0)
    model.blocks.apply(speed)
    watch.lap("reading")
    if metric.draws:
        tell(
            f"drawing {config.evaluation.samples:,} samples for each readout and split, and first, once for this data, "
            "what judges them: evaluation.samples=N and evaluation.controls=false make it shorter"
        )
    measure, depends_on = metric.begin(model, data, config.evaluation)
    watch.lap("preparing")
    scores = {split: measure(samples) for split, samples in splits.items()}
    resident = model.blocks.told()  # a pipeline tells here how long it compiled
    tell(f"took {watch.line('measuring', speed)}, {resident}")
    sizes = {split: len(samples) for split, samples in splits.items()}
    record: dict[str, Any] = {"metric": name, "better": metric.better, "scores": scores, "sizes": sizes}
    record[MEASURED] = model.weights_hash
    if model.progress:
        record[UNFINISHED] = model.progress
    if depends_on:
        record["depends_on"] = depends_on
    return metric, scores, record


def main_readout(scores: Mapping[str, Any], asked: str) -> str:
    """The readout of those in `scores` by which a run is judged: the one of its configuration, or the first.

    Of drawn samples it is the score and none of the controls, one of which comes first in evaluation.json,
    where all are in alphabetical order.
    """
    if asked in scores:
        return asked
    return next((name for name in scores if name not in CONTROLS), next(iter(scores)))


def label(readout: str) -> str:
    """Name of a readout for people; its own name where that is clear, such as ``perplexity``."""
    if readout.startswith("after_"):
        return f"after block {readout.removeprefix('after_')}"
    if readout.startswith(CLASS):
        return f"class {readout.removeprefix(CLASS)}"
    if readout.startswith("block_"):
        return f"share of block {readout.removeprefix('block_')}"
    return READOUTS.get(readout, readout)


def scores_table(metric: Metric, scores: Scores, progress: str = "") -> Table:
    """One line for each readout, then one for each class, or for those that are worst if there are many.

    Above them stands how far the blocks are trained, if they are not done.
    """
    title = f"not done: {progress}" if progress else None
    table = Table("readout", *(f"{split} {metric.label}" for split in scores), title=title, title_justify="left")
    names = dict.fromkeys(name for split in scores.values() for name in split)
    classes = [name for name in names if name.startswith(CLASS)]
    if len(classes) > MOST_CLASSES:
        rest = f"{len(classes) - MOST_CLASSES} more classes, all better in the test split: evaluation.json"
        classes = sorted(classes, key=lambda name: scores["test"].get(name, 1.0))[:MOST_CLASSES]
    else:
        rest = ""
    for name in (*(name for name in names if not name.startswith(CLASS)), *classes):
        if classes and name == classes[0]:
            table.add_section()
        written = [metric.write(split[name]) if name in split else "-" for split in scores.values()]
        table.add_row(escape(label(name)) + metric.direction(name), *written)
    if rest:
        table.add_row(rest)
    return table


def comparison(metric: Metric, blocks: dict[str, float], whole: dict[str, float], readout: str) -> Table:
    """Table of both scores, readout by readout; the default readout of the blocks is named first."""
    title = "isolated blocks beside end-to-end at equal FLOPs"
    table = Table(f"test {metric.label}", "isolated blocks", "end to end", title=title, title_justify="left")
    for name in sorted((b for b in blocks if not b.startswith(CLASS)), key=lambda name: name != readout):
        default = " (default readout)" if name == readout else ""
        # end to end, the one block is the whole network, which is not comparable with the part of one block
        like = name in whole and name != "first" and not name.startswith(("after_", "block_"))
        beside = metric.write(whole[name]) if like else "-"
        table.add_row(f"{label(name)}{default}{metric.direction(name)}", metric.write(blocks[name]), beside)
    return table
