"""How steady the calibrated noise range is: the product's own calibration over configurations, seeds and batch sizes.

Usage: python benchmarks/calibration.py OUT.json CONFIG... [key=value...] [--seeds 20] [--batches 32,64,100,256]
       [--workers 16]
Batches `own` are those of the configuration. With a GPU each worker uses it, so give few; to keep to the CPU, set
CUDA_VISIBLE_DEVICES to nothing. Prints, for each configuration and batch size, the least, median and greatest low and
high end, how many seeds gave none, and a digest of all ends, which the same command repeats on the same hardware.
Writes a row for each calibration: config, batch_size, seed, seconds, and low and high, or the error.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dbtrain.config import load_config
from dbtrain.errors import DbtrainError
from dbtrain.run.calibrate import calibrate
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data

Case = tuple[str, str, int, tuple[str, ...]]
"""(configuration, batch size or `own`, seed, overrides)"""


def measure(case: Case) -> dict[str, Any]:
    """One row: the range of a case, or the error, and the seconds that both took."""
    torch.set_num_threads(1)
    path, batch, seed, overrides = case
    own = [] if batch == "own" else [f"training.batch_size={batch}"]
    config = load_config(path, [*overrides, *own, f"seed={seed}"])
    data = load_data(config)
    row: dict[str, Any] = {"config": config.name, "batch_size": config.training.batch_size, "seed": seed}
    started = time.perf_counter()
    try:
        run_plan = design(config, data, calibrate)
    except DbtrainError as error:
        return {**row, "error": str(error), "seconds": time.perf_counter() - started}
    edges, facts = run_plan.ranges.edges, run_plan.distribution.get("calibration", {})
    kept = {name: facts[name] for name in ("weight", "standard_error", "left_open_nats") if name in facts}
    return {**row, "low": edges[-1], "high": edges[0], **kept, "seconds": time.perf_counter() - started}


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each configuration and batch size, and one for all batch sizes of each configuration."""
    table = Table(
        "config", "batch", "n", "none", "low", "max/min", "high", "max/min", "error %", "s", title="min median max"
    )
    for name in dict.fromkeys(row["config"] for row in rows):
        own = [row for row in rows if row["config"] == name]
        batches = sorted({row["batch_size"] for row in own})
        for batch in batches:
            table.add_row(name, str(batch), *cells([row for row in own if row["batch_size"] == batch]))
        if len(batches) > 1:
            table.add_row(name, "all", *cells(own))
    return table


def cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Counts, ends, how sure they are by their own word, and the median time."""
    found = [row for row in rows if "low" in row]
    ends: list[str] = []
    for end in ("low", "high"):
        values = [row[end] for row in found]
        if values:
            middle = statistics.median(values)
            ends += [f"{min(values):.3g} {middle:.3g} {max(values):.3g}", f"{max(values) / min(values):.3f}"]
        else:
            ends += ["-", "-"]
    errors = [100 * row["standard_error"] for row in found if "standard_error" in row]
    error = f"{statistics.median(errors):.2g}" if errors else "-"
    seconds = statistics.median(row["seconds"] for row in rows)
    return [str(len(rows)), str(len(rows) - len(found)), *ends, error, f"{seconds:.1f}"]


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """Of all ends, to the last bit."""
    ends = [(row.get("low", 0.0).hex(), row.get("high", 0.0).hex()) for row in rows]
    return hashlib.sha256(json.dumps(ends).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("configs", nargs="+", metavar="CONFIG or key=value")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--batches", default="own")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    overrides = tuple(word for word in arguments.configs if "=" in word)
    configs = [word for word in arguments.configs if "=" not in word]
    product = itertools.product(configs, arguments.batches.split(","), range(arguments.seeds))
    cases: list[Case] = [(path, batch, seed, overrides) for path, batch, seed in product]
    # spawned: a forked process cannot use the GPU, and threads do not survive a fork
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(measure, cases))
    Path(arguments.out).write_text(json.dumps(rows, indent=1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    Console(width=140).print(f"{device}, {arguments.workers} workers; digest {digest(rows)}", summary(rows))


if __name__ == "__main__":
    main()
