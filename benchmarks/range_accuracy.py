"""What a calibrated range is worth: a classifier trained under each range that benchmarks/calibration.py wrote.

Usage: python benchmarks/range_accuracy.py OUT.json CONFIG RANGES.json RANGES.json... [key=value...] [--workers 16]
Each file of ranges has rows with `seed`, `low`, `high` and `batch_size`; those of the configuration's batch size count.
Every seed is trained under each file's range of that seed (noise.ranges=uniform, which is the same log-uniform law),
by the product's own worker, on CPUs, its blocks one after the other, and scored on the test split. Prints the mean
accuracy of each file and its standard error, and the paired difference from the first file's over the seeds that both
have.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dbtrain.config import load_config
from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.opening import read_merged_model
from dbtrain.run.merge import merge
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import work
from dbtrain.training.watchdog import StopRequest

Case = tuple[str, tuple[str, ...], str, dict[str, Any]]
"""(configuration, overrides, file of the range, its row)"""
READOUTS = ("mean", "chain", "first")


def score(case: Case) -> dict[str, Any]:
    """Train all blocks under a range, merge and evaluate: the row, with the accuracy by readout."""
    path, overrides, source, row = case
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    own = ["noise.ranges=uniform", f"noise.sigma_min={row['low']!r}", f"noise.sigma_max={row['high']!r}"]
    with tempfile.TemporaryDirectory() as out:
        config = load_config(path, [*overrides, *own, f"seed={row['seed']}", f"out={out}"])
        run = Store(config.run_url)
        run.makedirs()
        run_plan = prepare(config, Run(run), never)
        for block in range(config.blocks):
            claim(run.child("blocks", f"{block:02d}"), 1, "benchmark")
            work(Assignment(run.url, block, 1, "benchmark", "benchmark", 1, None, "cpu", 1, 3600.0), 0, StopRequest())
        merge(Run(run))
        model = read_merged_model(MergedDirectory(run.child("merged")), torch.device("cpu"))
        found = accuracy(model, run_plan.data().test, config.evaluation)
    dist.destroy_process_group()  # or a thread of gloo may end the process that ends with it
    return {"ranges": source, **row, **{name: found[name] for name in READOUTS}}


def never(*_: object) -> dict[str, Any]:
    raise AssertionError("the range is given")


def wanted(arguments: argparse.Namespace, overrides: tuple[str, ...]) -> list[Case]:
    """A case for each range of the configuration's batch size."""
    batch = load_config(arguments.config, overrides).training.batch_size
    cases: list[Case] = []
    for file in (word for word in arguments.ranges if "=" not in word):
        rows = [row for row in json.loads(Path(file).read_text()) if "low" in row and row["batch_size"] == batch]
        if not rows:
            raise SystemExit(f"{file} has no range of batch size {batch}: run benchmarks/calibration.py --batches own")
        cases += [(arguments.config, overrides, file, row) for row in rows]
    return cases


def summary(rows: list[dict[str, Any]]) -> Table:
    """A line for each file of ranges and readout."""
    table = Table("ranges", "readout", "n", "accuracy % ± standard error", "sd", "difference from the first, paired")
    files = list(dict.fromkeys(row["ranges"] for row in rows))
    for readout in READOUTS:
        by_seed = {f: {row["seed"]: 100 * row[readout] for row in rows if row["ranges"] == f} for f in files}
        for file in files:
            values, first = by_seed[file], by_seed[files[0]]
            both = [values[seed] - first[seed] for seed in values if seed in first]
            difference = "" if file == files[0] else f"{mean_and_error(both)} (n={len(both)})"
            spread = statistics.stdev(values.values()) if len(values) > 1 else math.nan
            table.add_row(
                file, readout, str(len(values)), mean_and_error([*values.values()]), f"{spread:.2f}", difference
            )
    return table


def mean_and_error(values: list[float]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.2f} ± {error:.2f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("config")
    parser.add_argument("ranges", nargs="+", metavar="RANGES.json or key=value")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    cases = wanted(arguments, tuple(word for word in arguments.ranges if "=" in word))
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(score, cases))
    Path(arguments.out).write_text(json.dumps(rows, indent=1))
    Console(width=140).print(summary(rows))


if __name__ == "__main__":
    main()
