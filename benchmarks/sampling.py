"""How long the shipped DiT takes to draw samples, by the command's own function, beside its arithmetic.

Command:  python benchmarks/sampling.py [--count 10000] [--steps 25] [--batches 512 2048] [--set model.dim=256 ...]

A run of configs/dit_fashion_mnist.yaml is prepared on random pictures of that size, its blocks are committed with
random weights, which draw as fast as trained ones, and merged. Each row is `dbtrain sample` in a precision, compiled or
not: what starts, compiles and draws is told apart. The arithmetic is the FLOPs of all evaluations, without attention's
softmax and other pointwise work, at the rate of a bf16 product of two 8192 x 8192 matrices.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from worker import commit, matmul_rate

from dbtrain.config import load_config
from dbtrain.evaluation.images.pictures import sample_run
from dbtrain.method.sampler import spaced_levels
from dbtrain.method.split import global_name
from dbtrain.run.cost import CPU_ATTENTION
from dbtrain.run.merge import merge
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import prepare, versions
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store

CONFIG = Path(__file__).parent.parent / "configs" / "dit_fashion_mnist.yaml"
PICTURE, CLASSES = (1, 28, 28), 10


def made(folder: Path, overrides: list[str]) -> Run:
    """A merged run with random weights."""
    from safetensors.torch import save_file

    data = folder / "pictures.safetensors"
    save_file({"latent": torch.randn(200, *PICTURE), "label": torch.arange(200) % CLASSES}, data)
    given = ["data=null", "data.source=latents", f"data.path={data}", f"data.classes={CLASSES}", f"out={folder}"]
    config = load_config(CONFIG, [*given, *overrides])
    run = Run(Store(config.run_url))
    run.store.makedirs()
    plan = prepare(config, run, lambda *_: {})
    for block in run.blocks:
        weights = {n: p.detach() + 0.02 * torch.randn_like(p) for n, p in plan.model(block.number).named_parameters()}
        named = {global_name(block.number, name): tensor for name, tensor in weights.items()}
        block.checkpoints.commit(block.steps, {"model": named}, loss=1.0, attempt=1, fence=lambda: None)
    merge(run)
    return run


def flops(plan: RunPlan, count: int, steps: int) -> int:
    """Of all evaluations that Heun makes for so many samples."""
    each = []
    for block in range(plan.split.blocks):
        with FlopCounterMode(display=False, custom_mapping=dict(CPU_ATTENTION)) as counter, torch.no_grad():
            inputs = torch.randn(1, *PICTURE), torch.ones(1), torch.zeros(1, dtype=torch.int64)
            plan.model(block).predict(plan.runs(block), *inputs)
        each.append(counter.get_total_flops())
    owners = [plan.ranges.owner(level) for level in spaced_levels(plan.noise(), plan.ranges, steps, "karras")]
    # one evaluation at each level, and one that corrects the step to it, but for the first
    return count * (2 * sum(each[owner] for owner in owners) - each[owners[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", metavar="FILE.json")
    given = parser.parse_args()
    console, rows, rate = Console(width=130), [], matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        run = made(Path(folder), given.set)
        work = flops(run.plan, given.count, given.steps)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        arithmetic = f"{work / rate:.2f} s at {rate / 1e12:.0f} TFLOP/s" if rate else "no rate without a GPU"
        console.print(f"{name}, {given.count} samples, Heun, {given.steps} steps: {work:.3g} FLOPs, {arithmetic}")
        for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
            for batch in given.batches:
                told: list[str] = []
                fixed = {"steps": given.steps, "solver": "heun", "spacing": "karras", "guidance": 1.0}
                how = {"precision": precision, "compile": str(compiled).lower(), "batch_size": batch}
                overrides = [f"evaluation.{key}={value}" for key, value in (fixed | how).items()]
                sample_run(run, Path(folder) / "samples.npy", given.count, 0, overrides, tell=told.append)
                console.print(f"{precision}, {'compiled' if compiled else 'eager'}, batches of {batch}: {told[0]}")
                rows.append({**how, "took": told[0]})
    said = {"machine": name, "versions": versions(), "commit": commit(), "rate": rate, "flops": work, "rows": rows}
    if given.out:
        Path(given.out).write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
