"""What one measurement is: a method, its sizes, and the run whose network it trains."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from dbtrain.config import Config, load_config
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store

ISOLATED, IDEAL = "dbtrain", "ideal"
METHODS = (ISOLATED, IDEAL, "ddp", "fsdp2", "fsdp2_accumulate", "zero3", "1f1b", "interleaved")
NEVER = 1_000_000
PATCH, CLASSES, SAMPLES = 4, 10, 1024


@dataclass(frozen=True)
class Job:
    """One point of a curve; travels to its processes as JSON."""

    method: str
    gpus: int
    micro_batch: int
    checkpointing: bool
    batch: int
    """Samples of an optimizer step, over all GPUs."""
    layers: int
    dim: int
    tokens: int
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    compile: bool
    warmup: int
    steps: int
    rounds: int
    folder: str
    workers: int = 1
    """GPUs of a block, which share it by data and by `training.zero_stage`; for dbtrain only."""
    overrides: tuple[str, ...] = ()
    """Of the configuration, such as training.deterministic=false."""

    @staticmethod
    def read(path: Path) -> "Job":
        """From the file that `write` made."""
        fields = json.loads(path.read_text())
        return Job(**{**fields, "overrides": tuple(fields["overrides"])})

    def write(self) -> Path:
        """Into its folder."""
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @property
    def processes(self) -> int:
        """The ideal is one GPU that trains one block and knows of no other."""
        return 1 if self.method == IDEAL else self.gpus

    @property
    def blocks(self) -> int:
        """Of the run; the others train the whole network end to end."""
        return self.gpus // self.workers if self.method in (ISOLATED, IDEAL) else 1

    def misfit(self) -> str | None:
        """Why the sizes do not fit the method, or None."""
        sharing = {ISOLATED: self.workers, IDEAL: 1, "1f1b": 1, "interleaved": 1}.get(self.method, self.gpus)
        unit = self.micro_batch * sharing
        if self.gpus % self.workers:
            return f"{self.gpus} GPUs are no multiple of {self.workers} a block"
        if self.batch % unit:
            return f"the batch of {self.batch} is no multiple of {unit}"
        stages = {"1f1b": self.gpus, "interleaved": 2 * self.gpus}.get(self.method, self.blocks)
        if self.layers % stages:
            return f"{self.layers} layers do not divide by {stages}"
        pipeline = self.method in ("1f1b", "interleaved")
        if pipeline and self.batch // self.micro_batch < self.gpus:
            return f"a pipeline of {self.gpus} needs as many micro-batches"
        return None

    def prepare(self) -> None:
        """Write data and run.json, as `dbtrain train` does before it starts workers."""
        folder = Path(self.folder)
        side = PATCH * round(self.tokens**0.5)
        torch.manual_seed(0)
        images = {"latent": torch.randn(SAMPLES, 3, side, side), "label": torch.arange(SAMPLES) % CLASSES}
        save_file(images, folder / "images.safetensors")
        store = Store(self.config().run_url)
        store.makedirs()
        prepare(self.config(), Run(store), _no_pilot)
        for block in range(self.blocks):
            claim(store.child("blocks", f"{block:02d}"), 1, "benchmark")

    def config(self) -> Config:
        """Of the run. No averages are kept, because the others keep none."""
        training: dict[str, Any] = {"steps": NEVER, "checkpoint_every": NEVER, "log_every": self.steps, "ema": 0}
        training |= {"batch_size": self.batch, "micro_batch": self.micro_batch, "precision": self.precision}
        training |= {"compile": self.compile, "activation_checkpointing": self.checkpointing}
        keys: dict[str, Any] = {"name": "run", "out": self.folder, "blocks": self.blocks, "model.arch": "dit"}
        keys |= {"cluster.workers": self.workers if self.method == ISOLATED else 1}
        keys |= {"model.depth": self.layers, "model.dim": self.dim, "model.heads": max(1, self.dim // 64)}
        keys |= {"model.patch": PATCH, "data.source": "latents", "data.classes": CLASSES}
        keys |= {"data.path": Path(self.folder) / "images.safetensors"}
        keys |= {f"training.{key}": value for key, value in training.items()}
        words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]
        return load_config(None, [*words, *self.overrides])


def _no_pilot(*_: object) -> dict[str, Any]:
    raise AssertionError("a DiT's levels are not measured")
