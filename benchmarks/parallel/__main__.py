"""Samples a second against memory: isolated blocks beside DDP, FSDP2, ZeRO-3 and pipelines, on the GPUs of one host.

Command:  python -m benchmarks.parallel [--gpus 2] [--methods dbtrain ideal ddp fsdp2 ...] [--micro-batches 8 32 128]
          [--checkpointing off on] [--layers 24] [--dim 1024] [--out parallel.json] [--plot parallel.svg]
          python -m benchmarks.parallel --device cpu --links none 10g 1g 100m --layers 4 --dim 128 --tokens 64 ...
          python -m benchmarks.parallel --gpus 4 --workers 2 --set training.zero_stage=3 --methods dbtrain ideal fsdp2

One diffusion transformer, the same optimizer, batch and clipping for all. `dbtrain` trains it as so many blocks as
there are GPUs, each by the worker that `dbtrain train` starts, but for Ray; the others train it end to end. `ideal` is
a GPU that trains one block alone, by hand, times `--workers`. A sample counts once it has been through all layers, so
a block has to process as many samples a second as all GPUs together. Every method takes `--batch` samples a step of
the optimizer, in micro-batches: the memory of a GPU follows the micro-batch. `fsdp2` scatters gradients after every
micro-batch, `fsdp2_accumulate` once a step.

Each row has processes of its own; running out of memory is a row. Bytes sent are those of one step and GPU: the
operations of c10d in a profile, their tensors' sizes, and the share of them that a ring sends. Idle is the share of a
step in which no kernel but NCCL's runs, from the same profile. On CPUs memory is that of the whole process.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.parallel.job import METHODS, Job
from benchmarks.parallel.launch import measure
from benchmarks.parallel.links import bits, hosts
from benchmarks.parallel.report import plot, table_of
from dbtrain.run.prepare import versions

LARGEST = 128


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cards = parser.add_argument, torch.cuda.device_count()
    add("--gpus", type=int, default=cards or 2, help="processes, one a GPU")
    add("--workers", type=int, default=1, help="GPUs of each of dbtrain's blocks (--set training.zero_stage=...)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--micro-batches", type=int, nargs="+", default=[8, 16, 32, 64, LARGEST])
    add("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"], help="of activations")
    add("--batch", type=int, help=f"samples of an optimizer step; {LARGEST} a GPU by default")
    add("--layers", type=int, default=24)
    add("--dim", type=int, default=1024)
    add("--tokens", type=int, default=256, help="a square number")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cards else "cpu")
    add("--precision", choices=("fp32", "bf16"), help="bf16 on GPUs, fp32 on CPUs by default")
    add("--compile", action=argparse.BooleanOptionalAction, help="on GPUs by default")
    add("--warmup", type=int, default=4)
    add("--steps", type=int, default=5, help="of one timed round")
    add("--rounds", type=int, default=5)
    add("--limit", type=float, default=300, help="seconds of one row")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the run's configuration")
    add("--links", nargs="+", help="none or bits a second (10g, 1g, 100m): hosts in network namespaces, CPU only")
    add("--turns", type=int, default=1, help="so many times over all rows, for a spread between processes")
    add("--out", metavar="JSON")
    add("--plot", metavar="SVG")
    return parser


def jobs(given: argparse.Namespace) -> Iterator[Job]:
    """All rows, those of one micro-batch beside each other."""
    cuda = given.device == "cuda"
    for micro in given.micro_batches:
        for again in given.checkpointing:
            for method in given.methods:
                yield Job(
                    method=method,
                    gpus=given.gpus,
                    workers=given.workers,
                    micro_batch=micro,
                    checkpointing=again == "on",
                    batch=given.batch or LARGEST * given.gpus,
                    layers=given.layers,
                    dim=given.dim,
                    tokens=given.tokens,
                    device=given.device,
                    precision=given.precision or ("bf16" if cuda else "fp32"),
                    compile=cuda if given.compile is None else given.compile,
                    warmup=given.warmup,
                    steps=given.steps,
                    rounds=given.rounds,
                    folder="",
                    overrides=tuple(given.set),
                )


def rows_of(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all; the links of a row one after the other, so that they see the same machine."""
    for turn in range(given.turns):
        for job in jobs(given):
            if not given.links:
                yield {**measure(job, given.limit), "turn": turn}
            for link in given.links or ():
                with hosts(given.gpus, bits(link)) as (start, address, network):
                    row = measure(job, given.limit, start, address)
                    traffic = sum(network.traffic.read().values())
                    yield {**row, "turn": turn, "link": link, "bytes_on_the_bridge": traffic}


def check(given: argparse.Namespace) -> None:
    """What is wrong with the arguments.

    Raises:
        SystemExit: it says what, and what to do.
    """
    cards = torch.cuda.device_count()
    if given.device == "cuda" and given.gpus > cards:
        raise SystemExit(f"--gpus {given.gpus}: this machine has {cards}; give --gpus {cards} or --device cpu")
    if given.links and given.device != "cpu":
        raise SystemExit("--links limits TCP between processes on CPUs: add --device cpu")
    if round(given.tokens**0.5) ** 2 != given.tokens:
        raise SystemExit(f"--tokens {given.tokens}: an image is a square of patches, such as 64 or 256")


def commit() -> str:
    """Of the code that is measured; '' where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    given = arguments().parse_args()
    check(given)
    console, rows = Console(width=150), []
    machine = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    said = {"machine": machine, "versions": versions(), "commit": commit(), "arguments": vars(given)}
    started = time.monotonic()
    for row in rows_of(given):
        rows.append(row)
        words = row.get("error") or f"{row['samples_per_s']:.4g} samples/s, {row['peak_bytes'] / 2**30:.2f} GiB"
        at = f"{row['method']} {row['micro_batch']}{' checkpointing' * row['checkpointing']} {row.get('link', '')}"
        console.print(f"{time.monotonic() - started:.0f} s: {at}: {words}", soft_wrap=True, markup=False)
        if given.out:
            Path(given.out).write_text(json.dumps({**said, "rows": rows}, indent=1))
    console.print(f"{given.gpus} x {machine}, commit {said['commit'][:9]}", *given.set, table_of(rows))
    if given.plot:
        sizes = f"{given.layers} layers, d={given.dim}, {given.tokens} tokens, {given.gpus} x {machine}"
        plot(rows, given.plot, sizes)


if __name__ == "__main__":
    main()
