"""Table and plot of an ablation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dbtrain.telemetry.console import duration, size

READOUTS = ("mean", "chain", "first")


def ablation_table(rows: Sequence[Mapping[str, Any]], metric: str, split: str) -> Table:
    """One line for each block count and range policy; scores in percent, mean and standard deviation over seeds."""
    table = Table(title=f"{metric} % on {split}, mean ± std over the seeds", title_justify="left")
    for name in ("blocks", "ranges", "seeds", *READOUTS, "peak mem", "train time", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        scores = [_score(row["scores"][split].get(readout)) for readout in READOUTS]
        cost = (size(row["memory"]), duration(row["seconds"]), f"{row['flops']:.3g}")
        table.add_row(str(row["blocks"]), row["ranges"], str(len(row["seeds"])), *scores, *cost)
    return table


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    spread = "" if score["std"] is None else f" ± {100 * score['std']:.2f}"
    return f"{100 * score['mean']:.2f}{spread}"


def ablation_plot(rows: Sequence[Mapping[str, Any]], metric: str, readout: str, file: Path) -> None:
    """Quality against block count, a line for each policy, end-to-end as a level; and memory beside it (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    quality, memory = figure.subplots(1, 2)
    for policy in dict.fromkeys(row["ranges"] for row in rows):
        own = sorted((row for row in rows if row["ranges"] == policy), key=lambda row: row["blocks"])
        counts, scores = [row["blocks"] for row in own], [row["scores"]["test"][readout] for row in own]
        errors = [100 * (score["std"] or 0.0) for score in scores]
        quality.errorbar(counts, [100 * s["mean"] for s in scores], errors, marker="o", capsize=3, label=policy)
        memory.plot(counts, [row["memory"] / 2**30 for row in own], marker="o", label=policy)
    quality.set(xlabel="blocks", ylabel=f"{metric} % on test, readout {readout}")
    memory.set(xlabel="blocks", ylabel="peak memory of a worker, GiB", ylim=(0, None))
    quality.legend()
    figure.savefig(file, dpi=150)
