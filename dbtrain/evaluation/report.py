"""Evaluate a run and put two runs side by side."""

from collections.abc import Mapping

import torch
from rich.table import Table

from dbtrain.evaluation.merged import MergedModel
from dbtrain.evaluation.metrics import METRICS, Metric
from dbtrain.models.registry import architecture
from dbtrain.shards.store import Store

Scores = dict[str, dict[str, float]]
"""By split (``validation``, ``test``) and readout."""

READOUTS: Mapping[str, str] = {
    "chain": "last of the chain",
    "mean": "mean over the chain",
    "first": "block 0 alone",
}


def evaluate_run(run: Store) -> tuple[Metric, Scores]:
    """Score of a run's merged model by split and readout; also written to ``evaluation.json``.

    Raises:
        ShardError: the run is not merged, or its files are damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MergedModel.read(run.child("merged"), device)
    config, data = model.blueprint.config, model.blueprint.data()
    name = architecture(config.model.arch).metric
    metric = METRICS[name]
    splits = {"validation": data.validation, "test": data.test}
    scores = {split: metric.measure(model, samples, config.evaluation) for split, samples in splits.items()}
    run.write_json("evaluation.json", {"metric": name, "better": metric.better, "scores": scores})
    return metric, scores


def scores_table(metric: Metric, scores: Scores) -> Table:
    """One line for each readout."""
    table = Table("readout", *(f"{split} {metric.label}" for split in scores))
    for readout in scores["test"]:
        table.add_row(readout, *(metric.write(split[readout]) for split in scores.values()))
    return table


def comparison(metric: Metric, blocks: dict[str, float], whole: dict[str, float], readout: str) -> Table:
    """Table of both scores; the default readout of the blocks is named first."""
    title = "isolated blocks beside end-to-end at equal FLOPs"
    table = Table(f"test {metric.label}", "score", title=title, title_justify="left")
    for name in sorted(blocks, key=lambda name: name != readout):
        label = READOUTS.get(name, name.replace("_", " block ") if name.startswith("after_") else name)
        default = " (default readout)" if name == readout else ""
        table.add_row(f"isolated blocks, {label}{default}", metric.write(blocks[name]))
    table.add_section()
    table.add_row("end to end", metric.write(whole.get("chain", next(iter(whole.values())))))
    return table
