"""Table and plot of an ablation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dbtrain.evaluation.accuracy import CLASS
from dbtrain.evaluation.metrics import Metric
from dbtrain.evaluation.report import main_readout
from dbtrain.telemetry.console import duration, size


def ablation_table(rows: Sequence[Mapping[str, Any]], metric: Metric, split: str) -> Table:
    """One line for each block count, range policy and partition;
    mean and standard deviation over the seeds."""
    names = dict.fromkeys(name for row in rows for name in row["scores"][split])
    readouts = [name for name in names if not name.startswith(("after_", CLASS))]
    table = Table(title=f"{metric.label} on {split}, mean ± std over the seeds", title_justify="left")
    for name in ("blocks", "ranges", "layers", "seeds", *readouts, "peak mem", "train time", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        scores = [_score(metric, row["scores"][split].get(readout)) for readout in readouts]
        cost = (size(row["memory"]), duration(row["seconds"]), f"{row['flops']:.3g}")
        table.add_row(str(row["blocks"]), row["ranges"], row["partition"], str(len(row["seeds"])), *scores, *cost)
    return table


def _score(metric: Metric, score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    spread = "" if score["std"] is None else f" ± {metric.write(score['std'])}"
    return metric.write(score["mean"]) + spread


def ablation_plot(rows: Sequence[Mapping[str, Any]], metric: Metric, readout: str, file: Path) -> None:
    """Quality against block count, a line for each policy and partition,
    and each baseline; and memory (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    quality, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(_series(row) for row in rows):
        own = sorted((row for row in rows if _series(row) == name), key=lambda row: row["blocks"])
        counts, scores = [row["blocks"] for row in own], [_readout(row["scores"]["test"], readout) for row in own]
        factor = 100 if metric.percent else 1
        errors = [factor * (score["std"] or 0.0) for score in scores]
        quality.errorbar(counts, [factor * s["mean"] for s in scores], errors, marker="o", capsize=3, label=name)
        memory.plot(counts, [row["memory"] / 2**30 for row in own], marker="o", label=name)
    quality.set(xlabel="blocks", ylabel=f"test {metric.label}, readout {readout}")
    memory.set(xlabel="blocks", ylabel="peak memory of a worker, GiB", ylim=(0, None))
    quality.legend()
    figure.savefig(file, dpi=150)


def _series(row: Mapping[str, Any]) -> str:
    return row["ranges"] if row["partition"] == "even" else f"{row['ranges']}, {row['partition']}"


def _readout(scores: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The named readout, or the one by which the metric judges."""
    found: Mapping[str, Any] = scores[main_readout(scores, name)]
    return found
