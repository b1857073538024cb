"""How much faster a pipeline draws samples than one device, beside the bound that follows from where its blocks are.

Command:  python benchmarks/pipeline.py [--count 4096] [--batch 256] [--stages 1 2 4] [--turns 3] [--set blocks=4 ...]

A run of configs/dit_fashion_mnist.yaml with random weights is made as benchmarks/sampling.py makes it. Each row is the
command `dbtrain sample`, with all blocks on one device and then with so many processes, in turn; the seconds are those
that it prints for drawing. The samples of every row are compared with those of the first, bit for bit.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sampling import made


def drawn(run: str, out: Path, own: list[str]) -> tuple[float, float, float]:
    """Seconds of drawing, the bound that the command prints (1 without a pipeline), and the busiest one's share."""
    command = [sys.executable, "-m", "dbtrain", "sample", run, "--out", str(out), *own]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        raise SystemExit(said)
    seconds = re.search(r"([\d.]+) s drawing", said)
    bound = re.search(r"at most ([\d.]+) times as fast", said)
    busy = re.search(r"at work (\d+) %", said)
    assert seconds, said
    return float(seconds[1]), float(bound[1]) if bound else 1.0, float(busy[1]) / 100 if busy else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    arguments = parser.parse_args()
    rows: dict[int, list[tuple[float, float, float]]] = {stages: [] for stages in (0, *arguments.stages)}
    same = dict.fromkeys(rows, True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = made(folder, arguments.set).store.url
        own = ["--count", str(arguments.count), f"evaluation.batch_size={arguments.batch}"]
        for _ in range(arguments.turns):
            for stages, found in rows.items():
                where = ["evaluation.resident=pipeline", f"evaluation.stages={stages}"]
                out = folder / f"{stages}.npy"
                found.append(drawn(run, out, [*own, *(where if stages else ["evaluation.resident=all"])]))
                same[stages] &= np.array_equal(np.load(out), np.load(folder / "0.npy"))
    table = Table("processes", "seconds", "times as fast", "bound", "of the bound", "busiest at work", "same bits")
    alone = statistics.median(seconds for seconds, _, _ in rows[0])
    for stages, found in rows.items():
        seconds = statistics.median(row[0] for row in found)
        spread = f"{min(row[0] for row in found):.1f} to {max(row[0] for row in found):.1f}"
        faster, bound, busy = alone / seconds, found[0][1], statistics.median(row[2] for row in found)
        cells = (f"{faster:.2f}", f"{bound:.2f}", f"{faster / bound:.3f}", f"{busy:.2f}", str(same[stages]))
        table.add_row(str(stages or "all blocks here"), f"{seconds:.1f} ({spread})", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
