"""Evaluate a run and put two runs side by side."""

import torch
from rich.table import Table

from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.merged import MergedModel
from dbtrain.shards.store import Store


def evaluate_run(run: Store) -> dict[str, dict[str, float]]:
    """Accuracy of a run's merged model by split (``validation``, ``test``) and readout; also in ``evaluation.json``.

    Raises:
        ShardError: the run is not merged, or its files are damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MergedModel.read(run.child("merged"), device)
    section, data = model.blueprint.config.evaluation, model.blueprint.data()
    scores = {
        name: accuracy(model, split, section.batch_size, section.steps_per_block)
        for name, split in (("validation", data.validation), ("test", data.test))
    }
    run.write_json("evaluation.json", {"metric": "accuracy", "scores": scores})
    return scores


def comparison(blocks: dict[str, float], whole: dict[str, float], readout: str) -> Table:
    """Table of both accuracies; the default readout of the blocks is named first."""
    labels = {
        "chain": "isolated blocks, last of the chain",
        "mean": "isolated blocks, mean over the chain",
        "first": "isolated blocks, block 0 alone",
    }
    table = Table("test accuracy", "%", title="isolated blocks beside end-to-end at equal FLOPs", title_justify="left")
    for name in sorted(labels, key=lambda name: name != readout):
        default = " (default readout)" if name == readout else ""
        table.add_row(labels[name] + default, f"{100 * blocks[name]:.2f}")
    for name in sorted(n for n in blocks if n.startswith("after_")):
        table.add_row(f"isolated blocks, after block {name.removeprefix('after_')}", f"{100 * blocks[name]:.2f}")
    table.add_section()
    table.add_row("end to end", f"{100 * whole['chain']:.2f}")
    return table
