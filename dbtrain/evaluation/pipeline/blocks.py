"""The blocks of a merged model that lie in processes of a cluster, and are asked there.

A process that dies is started again, on whatever node has room for it, and is asked again what it had not
answered. A cache of earlier positions lies where its block is; what it was made from is kept here, so that it
can be made again.
"""

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.errors import HostDiedError, PlacementError
from dbtrain.evaluation.pipeline.placement import fastest, loads, most_speedup
from dbtrain.evaluation.pipeline.stage import Stage, StageSetting
from dbtrain.evaluation.pipeline.tensors import Packed, pack, unpack
from dbtrain.evaluation.residency import Shell
from dbtrain.evaluation.speed import Speed
from dbtrain.method.interface import BlockModel, Example
from dbtrain.models.registry import own_architecture
from dbtrain.run.plan import RunPlan

IN_FLIGHT = 2
"""Batches in flight for each process: one that computes, and one that is there when it is done."""
MOST_DEATHS = 3
"""A process that dies so often without an answer to anything new is not started again."""
FOREIGN = ("example", "denoised", "loss", "unconditional")
"""Methods that may need weights in a class of the user's; of ours, only `predict` does."""


class Host(Protocol):
    """A process of the cluster that holds an object."""

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object gives; HostDiedError if the process is dead."""

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method and wait for nothing."""


class Hosts(Protocol):
    """A cluster that has room for such processes."""

    device: str
    """``cuda`` or ``cpu``: what each process computes with."""
    threads: int
    """CPUs of each process."""

    def room(self) -> int:
        """How many processes there is room for now."""

    def start(self, make: Callable[..., Any], *arguments: Any) -> Host:
        """Start a process and make its object there."""

    def close(self) -> None:
        """End all of them."""


OpenHosts = Callable[[Config], Hosts]
"""Connects to the cluster that a configuration names."""


@dataclass
class _Place:
    """A process that holds some models, and those that stood in its place before."""

    units: tuple[int, ...]
    asked: int = 0
    """Calls that it has not answered."""
    host: Host | None = None
    deaths: int = 0
    """How often it died since it last answered something new."""
    given_up: str = ""
    """Why no process is started here again."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class PlacedCache:
    """Stands for a cache that lies with its block."""

    def __init__(self, unused: "deque[tuple[_Place, str]]") -> None:
        self.length = 0
        """Positions that it holds."""
        self.key = uuid.uuid4().hex
        self.place: _Place | None = None
        """Where it lies, once it was used."""
        self.calls: list[tuple[Any, ...]] = []
        """All that it was made from."""
        self._unused = unused

    def __del__(self) -> None:
        # told later: this may run within any call, also one of Ray's that holds a lock
        if self.place is not None:
            self._unused.append((self.place, self.key))


class PlacedBlocks(Sequence[BlockModel]):
    """The blocks of a merged model, each a module without weights,
    whose `predict` asks the process that has them.

    Args:
        run_plan: plan of the run.
        url: of its merged directory, as the cluster sees it.
        hosts: the cluster; it is closed with the blocks.
        device: where inputs and answers are.

    Raises:
        PlacementError: the cluster has no room for a single process.
    """

    def __init__(self, run_plan: RunPlan, url: str, hosts: Hosts, device: torch.device) -> None:
        section = run_plan.config.evaluation
        self._url, self._hosts, self._device = url, hosts, device
        self._loads = loads(run_plan, section)
        room = hosts.room()
        if not room:
            raise PlacementError(
                "evaluation.resident=pipeline: the cluster has no room for a process that holds blocks: wait until "
                "others give GPUs and CPUs back, or lower cluster.cpus_per_worker"
            )
        self._places = [_Place(units) for units in fastest(self._loads, min(room, section.stages or room))]
        self._choosing = threading.Lock()
        self._unused: deque[tuple[_Place, str]] = deque()
        """Caches that are not needed any more."""
        self._largest = 0
        self._closed = False
        self._speed = Speed("fp32", False, device)
        self._begun: float | None = None
        units = [run_plan.scheme.sources(block)[-1] for block in range(run_plan.split.blocks)]
        shells = {unit: self._shell(run_plan, unit) for unit in dict.fromkeys(units)}
        self.shells = [shells[unit] for unit in units]
        """The blocks' modules."""

    def _shell(self, run_plan: RunPlan, unit: int) -> BlockModel:
        shell = Shell(run_plan, unit, self._device).model
        own: dict[str, Any] = {"predict": partial(self._predict, unit)}
        if hasattr(shell, "new_cache"):
            own["new_cache"] = partial(PlacedCache, self._unused)
        if own_architecture(run_plan.config.model.arch) is not None:
            own |= {method: partial(self._ask, unit, method) for method in FOREIGN}
        vars(shell).update(own)
        return shell

    def __len__(self) -> int:
        return len(self.shells)

    def __getitem__(self, block: Any) -> Any:
        return self.shells[block]

    @property
    def in_flight(self) -> int:
        """Batches that are worth having in flight."""
        return IN_FLIGHT * len(self._places)

    @property
    def computes_on(self) -> torch.device:
        """Device of the processes."""
        return torch.device(self._hosts.device)

    def expect(self, largest: int) -> None:
        """Batches of up to so many samples come: whichever of them a process gets first, a compiled block
        computes all of them as if they were of that size."""
        self._largest = max(self._largest, largest)

    def begin(self, speed: Speed) -> None:
        """Start all processes at once, whose blocks then predict at this speed.

        Raises:
            PlacementError: there is no room for one of them any more.
            ShardError: the blocks cannot be read there.
        """
        self._speed = speed
        errors: list[BaseException] = []

        def start(place: _Place) -> None:
            try:
                self._host(place)
            except BaseException as error:  # told below
                errors.append(error)

        threads = [threading.Thread(target=start, args=(place,), daemon=True) for place in self._places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def told(self) -> str:
        """Where the blocks are, and how busy the process with most to do was, for people."""
        placed = [place.units for place in self._places]
        where = ", ".join("+".join(map(str, units)) for units in placed)
        line = (
            f"a pipeline of {len(placed)} processes ({self._hosts.device}) with the blocks {where}: at most "
            f"{most_speedup(self._loads, placed):.2f} times as fast as one"
        )
        self._drop_unused()
        facts = [self._call(place, "facts") for place in self._places]
        self._speed.compiling_s = max(compiling for _, compiling in facts)
        if self._begun is not None:
            passed = time.monotonic() - self._begun
            line += f", the busiest at work {100 * max(busy for busy, _ in facts) / passed:.0f} % of the time"
        return line

    def close(self) -> None:
        """End the processes and leave the cluster."""
        self._closed = True
        self._hosts.close()

    def _host(self, place: _Place) -> Host:
        """The process of a place, started if there is none."""
        with place.lock:
            if place.given_up:
                raise PlacementError(place.given_up)
            if place.host is None:
                speed, hosts = self._speed, self._hosts
                setting = StageSetting(self._url, hosts.device, hosts.threads, speed.precision, speed.compiled)
                place.host = hosts.start(Stage, setting, place.units)
            return place.host

    def _call(self, place: _Place, method: str, *arguments: Any, again: bool = False) -> Any:
        """Ask a place, and the process that replaces it if it dies; `again` if it was answered before."""
        while True:
            host = None
            try:
                host = self._host(place)
                answer = host.call(method, *arguments)
            except HostDiedError as error:
                self._note_death(place, host, error)
                continue
            if answer is not None and not again:
                place.deaths = 0
            return answer

    def _note_death(self, place: _Place, host: Host | None, error: HostDiedError) -> None:
        if self._closed:
            raise error
        with place.lock:
            if place.host is not host:
                return  # another thread has noticed it, and started the next one
            place.host, place.deaths = None, place.deaths + 1
            if place.deaths >= MOST_DEATHS:
                blocks = " and ".join(map(str, place.units))
                place.given_up = (
                    f"the process with block {blocks} of the pipeline died {place.deaths} times without an answer, at "
                    f"last: {error}: if its memory was full, lower evaluation.batch_size or take more processes"
                )

    def _chosen(self, unit: int) -> _Place:
        """The place with the fewest calls under way, of those that have the model."""
        with self._choosing:
            place = min((place for place in self._places if unit in place.units), key=lambda place: place.asked)
            place.asked += 1
            return place

    def _answered(self, place: _Place) -> None:
        with self._choosing:
            place.asked -= 1

    def _predict(
        self,
        unit: int,
        layers: Sequence[int],
        noisy: Tensor,
        level: Tensor,
        context: Tensor,
        cache: PlacedCache | None = None,
    ) -> Tensor:
        self._begun = self._begun or time.monotonic()
        arguments = (unit, tuple(layers), *map(pack, (noisy, level, context)))
        if cache is not None:
            return unpack(self._extend(cache, arguments), self._device)
        place = self._chosen(unit)
        try:
            return unpack(self._call(place, "predict", self._largest, *arguments), self._device)
        finally:
            self._answered(place)

    def _extend(self, cache: PlacedCache, arguments: tuple[Any, ...]) -> Packed:
        """Ask where the cache is; if that process died, make it again from all that came before."""
        self._drop_unused()
        place = cache.place = cache.place or self._chosen(arguments[0])
        cache.calls.append(arguments)
        number = len(cache.calls) - 1
        answer = self._call(place, "extend", cache.key, number, *arguments)
        while answer is None:
            for earlier, before in enumerate(cache.calls):
                # else a process whose memory is full at the end would be started for ever
                answer = self._call(place, "extend", cache.key, earlier, *before, again=earlier < number)
        cache.length += arguments[-1].shape[1]
        found: Packed = answer
        return found

    def _drop_unused(self) -> None:
        while self._unused:
            place, key = self._unused.popleft()
            self._answered(place)
            if place.host is not None:
                place.host.tell("drop", key)

    def _ask(self, unit: int, method: str, *arguments: Any) -> Any:
        """What a method of a class that is not ours gives, asked where its weights are."""
        packed = [
            pack(given) if isinstance(given, Tensor) else {name: pack(tensor) for name, tensor in given.items()}
            for given in arguments
        ]
        place = self._chosen(unit)
        try:
            found = [unpack(part, self._device) for part in self._call(place, "ask", unit, method, *packed)]
        finally:
            self._answered(place)
        return found[0] if len(found) == 1 else Example(*found)
