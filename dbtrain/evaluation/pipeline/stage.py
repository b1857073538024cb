"""What runs in a process of the cluster: some blocks of a merged model, which predict when they are asked."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from dbtrain.errors import PlacementError, first_line
from dbtrain.evaluation.loading import load_model, merged_plan
from dbtrain.evaluation.pipeline.tensors import Packed, pack, unpack
from dbtrain.evaluation.speed import Speed
from dbtrain.method.interface import BlockModel, Example
from dbtrain.method.objective import Precision
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store

OF_BATCH = ("a batch", "lower evaluation.batch_size")


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Say what does not fit into the memory of a GPU.

    Raises:
        PlacementError: something inside did not.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlacementError(f"{what} does not fit into the GPU's memory ({first_line(error)}): {advice}") from None


@dataclass(frozen=True)
class StageSetting:
    """Where a stage finds its blocks, and how they compute."""

    url: str
    """URL of the merged directory."""
    device: str
    threads: int
    """Threads that a CPU computes with."""
    precision: Precision
    compiled: bool


@dataclass
class _Cache:
    cache: Any
    calls: int = 0
    answer: Packed | None = None
    """Answer to the last call, which is asked again where it was lost on its way."""


class Stage:
    """Some blocks of a merged model.

    Two threads may ask at once: while the answer of one is on its way from the device, the other computes.

    Args:
        setting: where the blocks are, and how they compute.
        units: models to hold, each by the number of its last shard.

    Raises:
        ShardError: files of the merged model are missing or damaged.
        PlacementError: they do not fit into the memory of the device.
    """

    def __init__(self, setting: StageSetting, units: Sequence[int]) -> None:
        torch.set_num_threads(setting.threads)
        self._device = torch.device(setting.device)
        merged = MergedDirectory(Store(setting.url))
        run_plan = merged_plan(merged)
        self._speed = Speed(setting.precision, setting.compiled, self._device)
        self._models: dict[int, BlockModel] = {}
        advice = "evaluation.resident=one keeps one block at a time there, and of more GPUs each holds fewer"
        with enough_memory(f"the model of block {' and '.join(map(str, units))}", advice):
            for unit in units:
                model = load_model(run_plan, unit, merged.block, merged.where).to(self._device)
                self._models[unit] = self._speed.apply(model)
        self._caches: dict[str, _Cache] = {}
        self._lock = Lock()
        self._work = Work()

    @torch.no_grad()
    def predict(self, largest: int, unit: int, layers: Sequence[int], *inputs: Packed) -> Packed:
        """What a block predicts of (noisy, level, context), where batches have up to `largest` samples."""
        with self._work.going_on(), enough_memory(*OF_BATCH):
            there = [unpack(packed, self._device) for packed in inputs]
            with self._lock:
                self._speed.expect(largest)
                output = self._models[unit].predict(layers, *there)
            return pack(output)

    @torch.no_grad()
    def extend(self, key: str, number: int, unit: int, layers: Sequence[int], *inputs: Packed) -> Packed | None:
        """The same with a cache of earlier positions; None if this process lacks the calls before.

        Args:
            key: of the cache.
            number: how many calls came before this one.
            unit, layers, inputs: as of `predict`.
        """
        model: Any = self._models[unit]
        with self._work.going_on(), self._lock, enough_memory(*OF_BATCH):
            held = self._caches.setdefault(key, _Cache(model.new_cache()))
            if held.calls == number:
                there = [unpack(packed, self._device) for packed in inputs]
                held.answer, held.calls = pack(model.predict(layers, *there, held.cache)), number + 1
            return held.answer if held.calls == number + 1 else None

    def drop(self, key: str) -> None:
        """A cache is not needed any more."""
        with self._lock:
            self._caches.pop(key, None)

    @torch.no_grad()
    def ask(self, unit: int, method: str, *arguments: Packed | Mapping[str, Packed]) -> tuple[Packed, ...]:
        """What another method of a block gives, which may need its weights: a tensor, or an `Example`."""
        with self._work.going_on(), self._lock, enough_memory(*OF_BATCH):
            there = [
                unpack(given, self._device)
                if isinstance(given, Packed)
                else {name: unpack(packed, self._device) for name, packed in given.items()}
                for given in arguments
            ]
            found = getattr(self._models[unit], method)(*there)
        parts = (found.clean, found.context, found.target) if isinstance(found, Example) else (found,)
        return tuple(map(pack, parts))

    def facts(self) -> tuple[float, float]:
        """Seconds in which something was asked of it, and seconds of compiling."""
        return self._work.seconds, self._speed.compiling_s


class Work:
    """Seconds in which at least one thread is at work."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._threads = 0
        self._since = 0.0
        self.seconds = 0.0

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """The thread is at work inside."""
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                self._since = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self.seconds += time.monotonic() - self._since
