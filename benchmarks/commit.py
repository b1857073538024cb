"""What a commit costs: its stall in steps, its time beside dd, its memory, and resuming beside plain reading.

Command:  python benchmarks/commit.py [--dim 1024] [--layers 4] [--folder DIRECTORY] [--steps 12]

A stack of linear layers under the real engine, snapshots, background writer and checkpoints; on a GPU if there is one,
else on the CPU. `dd` writes as many bytes with fsync to the same disk right before and after each commit.
"""

import argparse
import os
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from dbtrain.config import TrainingConfig
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.format import Identity
from dbtrain.shards.storage.store import Store
from dbtrain.training.async_writer import BackgroundWriter
from dbtrain.training.engine import Engine
from dbtrain.training.host_copies import Snapshot

IDENTITY = Identity("benchmark", 0, 1, (0, 999), ((0.1).hex(), (2.0).hex()), "a" * 64, "")
PAGE = resource.getpagesize()
PIECE = 16 << 20


class Stack(nn.Module):
    """Layers of 12 dim^2 parameters, as a transformer's have; the loss is a mean of squares."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        widths = [(dim, 4 * dim), (4 * dim, dim), (dim, 4 * dim)] * layers
        self.layers = nn.ModuleList(nn.Linear(one, two, bias=False) for one, two in widths)
        self.model = self.layers

    def forward(self, batch: dict[str, Tensor], key: Tensor, positions: Tensor) -> Tensor:
        x = batch["x"]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            for one, two, three in zip(*(iter(self.layers),) * 3, strict=True):
                x = x + two(nn.functional.gelu(one(x))) + three(x)[..., : x.shape[-1]]
        return x.float().square().mean()


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class PeakRss:
    """The largest resident size while it is open, looked at every 5 ms."""

    def __enter__(self) -> "PeakRss":
        self.start = self.peak = rss()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.closing.wait(0.005):
            self.peak = max(self.peak, rss())

    @property
    def growth(self) -> int:
        return self.peak - self.start


def dd(folder: Path, count: int) -> float:
    """Seconds that dd takes to write as many bytes of zeros and sync them."""
    file = folder / "dd"
    start = time.monotonic()
    size = f"count={count // PIECE}"
    subprocess.run(["dd", "if=/dev/zero", f"of={file}", f"bs={PIECE}", size, "conv=fsync"], check=True, stderr=-3)
    seconds = time.monotonic() - start
    file.unlink()
    return seconds


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that the disk is read."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: Path) -> float:
    buffer, start = bytearray(PIECE), time.monotonic()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Bench:
    """An engine that trains and commits as a worker does."""

    def __init__(self, given: argparse.Namespace, folder: Path, tell: Any) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = TrainingConfig(ema=0.999, optimizer={"clip": 0.0})  # type: ignore[arg-type]
        self.engine = Engine(Stack(given.dim, given.layers).to(self.device), config, given.batch, 1, 1, tell)
        self.x = torch.randn(given.batch, given.dim, device=self.device)
        self.checkpoints = Checkpoints(Store(folder), IDENTITY)
        self.writer, self.number = BackgroundWriter(), 0

    def step(self) -> None:
        self.engine.accumulate({"x": self.x}, torch.tensor(0), torch.arange(len(self.x)))
        self.number += 1
        self.engine.update_ema(self.number)

    def steps(self, count: int, snapshot: bool = False) -> tuple[float, Snapshot | None]:
        """Seconds of so many steps, with a snapshot after the first one."""
        synchronize(self.device)
        taken, start = None, time.monotonic()
        for index in range(count):
            self.step()
            if snapshot and index == 0:
                taken = self.engine.snapshot()
        synchronize(self.device)
        return time.monotonic() - start, taken

    def commit(self, snapshot: Snapshot) -> float:
        """Seconds to write a snapshot, while nothing trains."""
        start = time.monotonic()
        snapshot.wait()
        self.checkpoints.commit(self.number, snapshot.parts, loss=1.0, attempt=1, fence=lambda: None)
        return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12, help="of each measurement of the stall")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29656", "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    console = Console(width=110)
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        measure(given, Path(made), console)
    dist.destroy_process_group()


def measure(given: argparse.Namespace, folder: Path, console: Console) -> None:
    bench = Bench(given, folder / "checkpoints", console.print)
    bench.steps(2)
    _, snapshot = bench.steps(2, snapshot=True)  # memory for snapshots is made here
    assert snapshot is not None
    total = sum(t.nbytes for part in snapshot.parts.values() for t in part.values())
    console.print(f"{bench.device}, d={given.dim}, a checkpoint of {total / 1e9:.2f} GB, disk {folder}")
    snapshot.release()
    stalls, ratios, beside, reads = [], [], [], []
    for _ in range(given.turns):
        plain, _ = bench.steps(given.steps)
        seconds, snapshot = bench.steps(given.steps, snapshot=True)
        assert snapshot is not None
        stalls.append((seconds - plain) / (plain / given.steps))
        first = dd(folder, total)
        with PeakRss() as memory:
            written = bench.commit(snapshot)
        snapshot.release()
        ratios.append((written, first, dd(folder, total)))
        beside.append(memory.growth)
        reads.append(read(bench, folder))
    report(console, stalls, ratios, beside, reads, total)


def read(bench: Bench, folder: Path) -> tuple[float, float, float]:
    """Seconds of plain reading, of a verified load from the disk, and of putting it into the engine."""
    newest = folder / "checkpoints" / f"step_{bench.number:08d}"
    forget(newest)
    plain = plain_read(newest)
    forget(newest)
    start = time.monotonic()
    loaded = bench.checkpoints.load(bench.number, roles=None)
    middle = time.monotonic()
    bench.engine.restore(loaded.parts, bench.number)
    synchronize(bench.device)
    return plain, middle - start, time.monotonic() - middle


def report(console: Console, stalls: Any, ratios: Any, beside: Any, reads: Any, total: int) -> None:
    middle = statistics.median(stalls)
    console.print(f"stall of a snapshot: {middle:.2f} steps ({min(stalls):.2f} to {max(stalls):.2f})")
    for written, one, two in ratios:
        rate, ratio = total / written / 1e9, written / ((one + two) / 2)
        console.print(f"commit {written:.2f} s ({rate:.2f} GB/s), dd {one:.2f} and {two:.2f} s: {ratio:.2f}")
    console.print(f"memory beside the snapshot: at most {max(beside) / 2**20:.0f} MiB")
    for plain, loaded, restored in reads:
        console.print(
            f"reading {plain:.2f} s, verified load {loaded:.2f} s: {loaded / plain:.2f}; "
            f"into the engine {restored:.2f} s"
        )


if __name__ == "__main__":
    main()
