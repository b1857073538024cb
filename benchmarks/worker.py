"""A real worker's step beside a hand-written loop on the same block and data, in one process, in turn.

Command:  python benchmarks/worker.py [--rows vit:1024 ar:4096:4:16:1024 ...] [--rounds 5] [--steps 20]
          [--set training.deterministic=false] [--cuda-graphs] [--profile FOLDER] [--syncs] [--out worker.json]

A row is ARCH:DIM[:LAYERS[:BATCH[:TOKENS]]], ARCH one of vit, dit, ar, masked. The worker is what `dbtrain train`
starts in a process that it has for itself, but for Ray: its entry, plan, data, engine, average, log, watchdog and
process settings. It trains the first of two blocks of LAYERS layers. Whenever it has made `--steps` steps it lets
the hand-written loop make as many, which runs without the deterministic mode. So both see the same card, as warm and
as busy. Commits are left out, whose writer would slow the loop's turn down too: benchmarks/commit.py measures their
stall. The two share a process, hence peak memory is what each adds to the other's resting memory.

Where the device works for less than a step takes, as the profiles tell, the host is too slow at giving it kernels.
`--cuda-graphs` then tries whether recording them pays; both sides use it, though the product has no such setting.

Without a GPU it runs on the CPU in float32, uncompiled; then only the ratio means anything.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dbtrain.config import Config, load_config
from dbtrain.run.cost import estimate
from dbtrain.run.prepare import prepare, versions
from dbtrain.run.run import Run
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store
from dbtrain.training import entry
from dbtrain.training.assignment import Assignment
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker

ARCHITECTURES = {"vit": "vit", "dit": "dit", "ar": "ar_lm", "masked": "masked_lm"}
LAYERS = {384: 6, 1024: 8, 2048: 4, 4096: 2}
BATCHES = {"vit": 64, "dit": 64, "ar": 16, "masked": 16}
TOKENS = {"vit": 256, "dit": 256, "ar": 1024, "masked": 1024}
SAMPLES, CLASSES, PATCH = 1024, 10, 4
NEVER = 1_000_000
SIDE = 8192
"""Of the square matrices by which the card's matmul rate is measured."""
WORKER, HAND = "worker", "by hand"
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Row:
    """A block that is measured."""

    arch: str
    dim: int
    layers: int
    batch: int
    tokens: int

    @staticmethod
    def parse(text: str) -> "Row":
        arch, dim, *rest = text.split(":")
        if arch not in ARCHITECTURES:
            raise SystemExit(f"--rows {text}: the architecture is one of {', '.join(ARCHITECTURES)}")
        given = [int(n) for n in rest]
        usual = [LAYERS.get(int(dim), 2), BATCHES[arch], TOKENS[arch]]
        return Row(arch, int(dim), *(given + usual[len(given) :]))

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.dim}-{self.layers}-{self.batch}x{self.tokens}"

    def config(self, folder: Path, given: argparse.Namespace) -> Config:
        """The run whose block 0 is trained."""
        heads = max(1, self.dim // (128 if self.dim >= 2048 else 64))
        training = {"steps": NEVER, "checkpoint_every": NEVER, "log_every": given.steps, "batch_size": self.batch}
        training |= {"precision": "bf16" if GPU else "fp32", "compile": str(GPU).lower(), "ema": 0.999}
        keys: dict[str, Any] = {"name": "run", "out": folder, "blocks": 2, "model.arch": ARCHITECTURES[self.arch]}
        keys |= {"model.depth": 2 * self.layers, "model.dim": self.dim, "model.heads": heads}
        keys |= {f"training.{key}": value for key, value in training.items()}
        if self.arch in ("vit", "dit"):
            keys |= {"model.patch": PATCH, "data.source": "latents", "data.path": folder / "images.safetensors"}
            keys |= {"data.classes": CLASSES}
        else:
            keys |= {"data.source": "python_topics", "data.tokenizer": "bytes", "data.length": self.tokens}
            keys |= {"data.cache": folder / "cache"}
        if self.arch == "ar":
            keys |= {"codebook.source": "random"}
        return load_config(None, [*(f"{key}={value}" for key, value in keys.items()), *given.set])

    def write_images(self, folder: Path) -> None:
        from safetensors.torch import save_file

        side = PATCH * round(self.tokens**0.5)
        if self.arch in ("vit", "dit"):
            labels = torch.arange(SAMPLES) % CLASSES
            save_file({"latent": torch.randn(SAMPLES, 3, side, side), "label": labels}, folder / "images.safetensors")


class Enough(BaseException):
    """All turns are taken; no `Exception`, so that the worker neither commits nor counts it as a crash."""


class Turns:
    """Worker and hand-written loop in turn: a turn warms up, is timed, is profiled, or looks for waits."""

    def __init__(self, given: argparse.Namespace, row: Row) -> None:
        self.given, self.row = given, row
        self.plan = ["warm", "warm", *["time"] * given.rounds]
        self.plan += ["profile"] if given.profile else []
        self.plan += ["syncs"] if given.syncs and GPU else []
        self.seconds: dict[str, list[float]] = {WORKER: [], HAND: []}
        self.peaks: dict[str, int] = {WORKER: 0, HAND: 0}
        self.busy: dict[str, float] = {}
        """Seconds of a step in which kernels of the device ran, from the profile."""
        self.waits: dict[str, int] = {}
        self.resting = 0
        """Bytes that the hand-written loop holds between its turns."""
        self._worker_turn: Any = None
        self._hand: Any = None

    def before_step(self, worker: BlockWorker, step: int) -> None:
        """Called by the worker's loop; at the end of a turn the other one has its own."""
        if step % self.given.steps:
            return
        if self._worker_turn:
            self._worker_turn.__exit__(None, None, None)
        if not self.plan:
            raise Enough
        kind = self.plan.pop(0)
        with self._without_deterministic_mode():
            before = _allocated()
            self._hand = self._hand or self._written(worker)
            with self._turn(kind, HAND):
                self._hand.steps(self.given.steps)
            self.resting = self.resting or _allocated() - before
        self._worker_turn = self._turn(kind, WORKER)
        self._worker_turn.__enter__()

    def _written(self, worker: BlockWorker) -> Any:
        from hand_written import HandWritten

        plan, device = worker.run_plan, worker.device
        objective: Any = plan.objective(0).to(device)
        return HandWritten(objective, plan.data().train, plan.config.training, device)

    @contextmanager
    def _without_deterministic_mode(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    @contextmanager
    def _turn(self, kind: str, side: str) -> Iterator[None]:
        _wait()
        others = self.resting if side == WORKER else _allocated() - self.resting
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        if kind == "profile":
            yield from self._profiled(side)
        elif kind == "syncs":
            yield from self._watched(side)
        else:
            yield
        _wait()
        if kind == "time":
            self.seconds[side].append((time.perf_counter() - started) / self.given.steps)
            if GPU:
                self.peaks[side] = max(self.peaks[side], torch.cuda.max_memory_allocated() - others)

    def _profiled(self, side: str) -> Iterator[None]:
        """Write the 25 operations that take most time on the device, and on the host, to a file."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
        with profile(activities=activities) as taken:
            started = time.perf_counter()
            yield
            _wait()
            wall = time.perf_counter() - started
        averages = taken.key_averages()
        # of kernels alone: the same time is counted once more for the operations that launched them
        kernels = [event for event in averages if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        self.busy[side] = busy / self.given.steps
        keys = ["self_cuda_time_total"] * GPU + ["self_cpu_time_total"]
        tables = [averages.table(sort_by=key, row_limit=25, max_name_column_width=110) for key in keys]
        head = (
            f"{side}, {self.row.name}, {self.given.steps} steps: {wall:.4f} s, of which the device works {busy:.4f} s"
        )
        folder = Path(self.given.profile)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.row.name}-{side.replace(' ', '-')}.txt").write_text("\n\n".join([head, *tables]))

    def _watched(self, side: str) -> Iterator[None]:
        """Count the places at which the host waits for the device: single reads, and waits for all of its work."""
        whole: Counter[str] = Counter()

        def synchronize(*_: Any) -> None:
            caller = traceback.extract_stack(limit=2)[0]
            whole[f"{caller.filename}:{caller.lineno}"] += 1
            real()

        real = torch.cuda.synchronize
        with warnings.catch_warnings(record=True) as seen, mock.patch.object(torch.cuda, "synchronize", synchronize):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = whole + Counter(f"{w.filename}:{w.lineno}" for w in seen if "synchron" in str(w.message))
        self.waits |= {f"{side} {place}": count for place, count in places.items()}


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if GPU else 0


def matmul_rate() -> float:
    """FLOP/s of a product of two square bf16 matrices; 0 without a GPU."""
    if not GPU:
        return 0.0
    one, two = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for count in (20, 50):  # the first warm up
        _wait()
        started = time.perf_counter()
        for _ in range(count):
            one @ two
        _wait()
    return 2 * SIDE**3 * count / (time.perf_counter() - started)


def measure(row: Row, given: argparse.Namespace, out: Any) -> None:
    """Take all turns of a row in this process, and send what was found."""
    rate = matmul_rate()
    if given.cuda_graphs:
        from torch._inductor import config as inductor

        inductor.triton.cudagraphs = True
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cuda" if GPU else "cpu"}
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    turns = Turns(given, row)

    class InTurn(BlockWorker):
        """The worker, which lets the other loop have its turns."""

        def before_step(self, step: int) -> None:
            super().before_step(step)
            turns.before_step(self, step)

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        row.write_images(folder)
        config = row.config(folder, given)
        store = Store(config.run_url)
        store.makedirs()
        plan = prepare(config, Run(store), measured)
        cost = estimate(plan, 0, row.batch, 1)
        claim(store.child("blocks", "00"), 1, "benchmark")
        device: Any = "cuda" if GPU else "cpu"
        assignment = Assignment(store.url, 0, 1, "benchmark", "benchmark", 1, None, device, 1, 3600.0)
        try:
            with mock.patch.object(entry, "BlockWorker", InTurn):
                entry.work(assignment, 0, StopRequest())
        except Enough:
            out.put(summary(row, turns, cost, rate))
        dist.destroy_process_group()


def measured(*_: object) -> dict[str, Any]:
    """A measured distribution, as the pilot of a run writes it."""
    return {"kind": "calibrated", "levels": [0.5, 2.0, 5.0, 20.0], "shares": [0.0, 0.3, 0.8, 1.0]}


def summary(row: Row, turns: Turns, cost: Any, rate: float) -> dict[str, Any]:
    """What was found, as it goes into the JSON."""
    worker, hand = turns.seconds[WORKER], turns.seconds[HAND]
    ratios = [one / other for one, other in zip(worker, hand, strict=True)]
    middle = {WORKER: statistics.median(worker), HAND: statistics.median(hand)}
    share = {side: cost.flops / seconds / rate if rate else None for side, seconds in middle.items()}
    return {
        **asdict(row),
        "parameters": cost.count,
        "flops": cost.flops,
        "matmul_rate": rate,
        "worker_ms": 1000 * middle[WORKER],
        "hand_ms": 1000 * middle[HAND],
        "worker_ms_each": [1000 * s for s in worker],
        "hand_ms_each": [1000 * s for s in hand],
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "worker_utilisation": share[WORKER],
        "hand_utilisation": share[HAND],
        "worker_bytes": turns.peaks[WORKER],
        "hand_bytes": turns.peaks[HAND],
        "planned_bytes": cost.total,
        "busy_ms": {side: 1000 * seconds for side, seconds in turns.busy.items()},
        "waits": turns.waits,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("block", "worker ms", "by hand", "ratio (least, most)", "of matmul rate", "GiB", "planned")
    for row in rows:
        block = f"{row['arch']} {row['dim']} x {row['layers']}, {row['batch']}x{row['tokens']}"
        if "error" in row:
            table.add_row(block, row["error"])
            continue
        shares = [row[f"{side}_utilisation"] for side in ("worker", "hand")]
        table.add_row(
            block,
            f"{row['worker_ms']:.2f}",
            f"{row['hand_ms']:.2f}",
            f"{row['ratio']:.3f} ({row['ratio_min']:.3f}, {row['ratio_max']:.3f})",
            ", ".join(f"{share:.0%}" if share else "-" for share in shares),
            f"{row['worker_bytes'] / 2**30:.2f}, {row['hand_bytes'] / 2**30:.2f}",
            f"{row['planned_bytes'] / 2**30:.2f}",
        )
    return table


def commit() -> str:
    """Of the code that is measured; '' where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def in_own_process(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """A row in a process of its own, so that nothing of it is left in memory for the next one."""
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=measure, args=(row, given, out))
    process.start()
    process.join()
    if out.empty():
        return {**asdict(row), "error": f"ended with code {process.exitcode}; what it said stands above"}
    return out.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{arch}:{dim}" for dim in LAYERS for arch in ARCHITECTURES]
    parser.add_argument("--rows", nargs="+", default=every)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--steps", type=int, default=20, help="of one turn; the worker logs once in as many")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the run's configuration"
    )
    parser.add_argument("--profile", metavar="FOLDER")
    parser.add_argument("--cuda-graphs", action="store_true", help="record the kernels of compiled code")
    parser.add_argument("--syncs", action="store_true", help="tell where the host waits for the GPU")
    parser.add_argument("--out", metavar="FILE.json")
    given = parser.parse_args()
    console, rows = Console(width=130), []
    said = {"machine": torch.cuda.get_device_name() if GPU else "CPU", "versions": versions(), "commit": commit()}
    for row in map(Row.parse, given.rows):
        started = time.monotonic()
        rows.append(in_own_process(row, given))
        console.print(f"{row.name}: {time.monotonic() - started:.0f} s", rows[-1].get("error", ""))
        if given.out:
            Path(given.out).write_text(
                json.dumps({**said, "set": given.set, "cuda_graphs": given.cuda_graphs, "rows": rows}, indent=1)
            )
    for place, count in ((p, c) for row in rows for p, c in row.get("waits", {}).items()):
        console.print(f"waits: {place} {count} times in {given.steps} steps", soft_wrap=True)
    console.print(f"{said['machine']}, commit {said['commit'][:9]}", *given.set, table_of(rows))


if __name__ == "__main__":
    main()
