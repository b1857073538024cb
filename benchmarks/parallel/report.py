"""The rows as a table and as a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.parallel.job import IDEAL

Row = Mapping[str, Any]
GIB = 2**30


def table_of(rows: Sequence[Row]) -> Table:
    """One line a row; the ideal is the best that one GPU with one block reached."""
    table = Table(
        "method", "link", "micro-batch", "samples/s (least, most)", "of ideal", "GiB", "MB sent a step", "idle"
    )
    ideal = best_ideal(rows)
    for row in rows:
        name = f"{row['method']}{', checkpointing' if row['checkpointing'] else ''}"
        start = [name, row.get("link", ""), str(row["micro_batch"])]
        if "error" in row:
            table.add_row(*start, row["error"][:200])
            continue
        rates = [f"{row[f'samples_per_s{end}']:.4g}" for end in ("", "_least", "_most")]
        table.add_row(
            *start,
            f"{rates[0]} ({rates[1]}, {rates[2]})",
            f"{row['samples_per_s'] / ideal:.3f}" if ideal else "-",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['sent_bytes'] / 1e6:.1f}",
            "-" if row["idle"] is None else f"{row['idle']:.1%}",
        )
    return table


def best_ideal(rows: Sequence[Row]) -> float | None:
    """Samples a second of the best row of the ideal, None where none was measured."""
    return max((row["samples_per_s"] for row in rows if row["method"] == IDEAL and "error" not in row), default=None)


def plot(rows: Sequence[Row], path: str, title: str) -> None:
    """Samples a second against peak GiB; dashed with activation checkpointing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    good = [row for row in rows if "error" not in row]
    methods = list(dict.fromkeys(row["method"] for row in good))
    for number, method in enumerate(methods):
        for again in (False, True):
            curve = [r for r in good if r["method"] == method and r["checkpointing"] == again]
            points = sorted((r["peak_bytes"] / GIB, r["samples_per_s"], r["micro_batch"]) for r in curve)
            if not points:
                continue
            label = f"{method}{', checkpointing' if again else ''}"
            x, y, _ = zip(*points, strict=True)
            axes.plot(x, y, "o--" if again else "o-", color=f"C{number}", label=label, markersize=4)
            for gib, rate, micro in points:
                axes.annotate(str(micro), (gib, rate), textcoords="offset points", xytext=(3, 3), fontsize=7)
    axes.set(xlabel="peak GiB of the fullest GPU", ylabel="samples a second, all GPUs", title=title, ylim=(0, None))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
