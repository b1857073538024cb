"""A worker's step beside a hand-written loop on the same block, in one run, in turn; and peak GPU memory.

Usage: python benchmarks/step_time.py [--dim 1024 --depth 24 --blocks 3 --batch 128 --tokens 256] [--rounds 7]
Without a GPU it runs on the CPU, in float32 and without compilation; then only the ratio means anything.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dbtrain.config import OptimizerConfig, TrainingConfig
from dbtrain.method.codebook import make_codebook
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogUniform
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import Direct
from dbtrain.models.layers import compile_recomputed, recompute
from dbtrain.models.vit import ViT

CLASSES, CODE = 10, 64


def objective(arguments: argparse.Namespace, layers: range, device: torch.device) -> BlockObjective:
    """The module that a worker trains, for these layers."""
    torch.manual_seed(0)
    side = int(arguments.tokens**0.5) * 4
    model = ViT(
        codebook=make_codebook("orthogonal", CLASSES, CODE, 0),
        noise=GaussianNoise(LogUniform(2.0, 15.0), CODE**-0.5),
        parametrisation=Direct(CODE**-0.5),
        image=(3, side, side),
        depth=arguments.depth,
        dim=arguments.dim,
        heads=arguments.dim // 64,
        patch=4,
        layers=layers,
    )
    precision = "bf16" if device.type == "cuda" else "fp32"
    return BlockObjective(model, layers, 2.0, 15.0, precision).to(device)


def inputs(arguments: argparse.Namespace, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch, its key and positions."""
    side = int(arguments.tokens**0.5) * 4
    image = torch.randn(arguments.batch, 3, side, side, device=device)
    label = torch.randint(0, CLASSES, (arguments.batch,), device=device)
    return (
        {"image": image, "label": label},
        torch.tensor(1, device=device),
        torch.arange(arguments.batch, device=device),
    )


def hand_written(module: nn.Module, compiled: bool) -> Callable[..., None]:
    """torch.compile, fused AdamW, clipping: nothing else."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    if compiled:
        module.compile()

    def step(*args: object) -> None:
        module(*args).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def worker(module: nn.Module, batch: int, compiled: bool) -> Callable[..., None]:
    """What dbtrain's loop does in a step, without the data."""
    from dbtrain.training.engine import Engine

    config = TrainingConfig(compile=compiled, ema=0.0, optimizer=OptimizerConfig(clip=1.0))
    engine = Engine(module, config, batch, 1, 1)

    def step(*args: object) -> None:
        engine.set_lr(1.0)
        engine.accumulate(*args)  # type: ignore[arg-type]
        engine.update_ema(1)

    return step


def milliseconds(step: Callable[..., None], args: tuple[object, ...], count: int, device: torch.device) -> float:
    """Mean time of `count` steps."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(count):
        step(*args)
    _wait(device)
    return 1000 * (time.perf_counter() - started) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(arguments: argparse.Namespace, own: range, device: torch.device) -> dict[str, float]:
    """GiB of one block and of all layers, without and with activation checkpointing."""
    whole = range(arguments.depth)
    cases = {
        "one block": (own, False),
        "end-to-end": (whole, False),
        "end-to-end, activation checkpointing": (whole, True),
    }
    return {name: peak_memory(arguments, layers, device, again) for name, (layers, again) in cases.items()}


def peak_memory(arguments: argparse.Namespace, layers: range, device: torch.device, again: bool) -> float:
    """GiB allocated at most in a hand-written, compiled step of these layers."""
    torch.compiler.reset()
    module = objective(arguments, layers, device)
    if again:
        recompute(cast(nn.Module, module.model))
        compile_recomputed(cast(nn.Module, module.model))
    # compiled as a worker's is: without it the backward pass of one layer alone needs 4 GiB more at the default size
    step, args = hand_written(module, not again), inputs(arguments, device)
    step(*args)
    torch.cuda.reset_peak_memory_stats()
    step(*args)
    return torch.cuda.max_memory_allocated() / 2**30


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A group of one, which DeepSpeed needs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ["DS_ACCELERATOR"] = device.type
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("dim", 1024), ("depth", 24), ("blocks", 3), ("batch", 128), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled, own, console = device.type == "cuda", range(arguments.depth // arguments.blocks), Console()
    # before the two sides are made: what they hold would count as well
    peaks = memory(arguments, own, device) if compiled else {}
    with process_group(device):
        args = inputs(arguments, device)
        sides = {
            "hand-written": hand_written(objective(arguments, own, device), compiled),
            "dbtrain": worker(objective(arguments, own, device), arguments.batch, compiled),
        }
        for step in sides.values():
            milliseconds(step, args, 5, device)
        rounds = [
            {n: milliseconds(s, args, arguments.steps, device) for n, s in sides.items()}
            for _ in range(arguments.rounds)
        ]
    table = Table("step of one block", "median ms", "min", "max")
    for name in sides:
        times = [r[name] for r in rounds]
        table.add_row(name, *(f"{v:.2f}" for v in (statistics.median(times), min(times), max(times))))
    ratios = [r["dbtrain"] / r["hand-written"] for r in rounds]
    table.add_row("ratio", *(f"{v:.3f}" for v in (statistics.median(ratios), min(ratios), max(ratios))))
    console.print(f"{torch.cuda.get_device_name() if compiled else 'CPU'}, {vars(arguments)}", table)
    if compiled:
        whole = peaks["end-to-end"]
        table = Table("peak GPU memory", "GiB", "of end-to-end")
        for label, peak in peaks.items():
            table.add_row(label, f"{peak:.2f}", f"{peak / whole:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
