"""The blocks of a merged model that lie in processes of a cluster, and are asked there.

A process that dies is started again, on whatever node has room for it, and is asked again what it had not
answered. A cache of earlier positions lies where its block is; what it was made from is kept here, so that it
can be made again.
"""

import time
import uuid
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import PlacementError
from dbtrain.evaluation.pipeline.placement import fastest, loads, most_speedup
from dbtrain.evaluation.pipeline.places import Hosts, Place, Places
from dbtrain.evaluation.pipeline.tensors import Packed, pack, unpack
from dbtrain.evaluation.pipeline.walks import InFlight, Walks
from dbtrain.evaluation.residency import Shell
from dbtrain.evaluation.speed import Speed
from dbtrain.method.interface import BlockModel, Example
from dbtrain.models.registry import own_architecture
from dbtrain.run.plan import RunPlan

IN_FLIGHT = 2
"""Batches in flight for each process: one that computes, and one that is there when it is done."""
FOREIGN = ("example", "denoised", "loss", "unconditional")
"""Methods that may need weights in a class of the user's; of ours, only `predict` does."""


class PlacedCache:
    """Stands for a cache that lies with its block.

    Args:
        unused: where it notes that nobody needs it any more.
    """

    def __init__(self, unused: "deque[tuple[Place, str]]") -> None:
        self.length = 0
        """Positions that it holds."""
        self.key = uuid.uuid4().hex
        self.place: Place | None = None
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

    all_here = False

    def __init__(self, run_plan: RunPlan, url: str, hosts: Hosts, device: torch.device) -> None:
        section = run_plan.config.evaluation
        self._device = device
        self._loads = loads(run_plan, section)
        room = hosts.room()
        if not room:
            raise PlacementError(
                "evaluation.resident=pipeline: the cluster has no room for a process that holds blocks: wait until "
                "others give GPUs and CPUs back, or lower cluster.cpus_per_worker"
            )
        self._placed = fastest(self._loads, min(room, section.stages or room))
        self._places = Places(hosts, url, self._placed)
        self.walks: Walks = InFlight(IN_FLIGHT * len(self._placed))
        self.computes_on = torch.device(hosts.device)
        self._unused: deque[tuple[Place, str]] = deque()
        """Caches that are not needed any more."""
        self._largest = 0
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

    def expect(self, largest: int) -> None:
        """Batches of up to so many samples come: whichever of them a process gets first, a compiled block
        computes all of them as if they were of that size."""
        self._largest = max(self._largest, largest)

    def apply(self, speed: Speed) -> None:
        """Start all processes, whose blocks then predict at this speed.

        Raises:
            PlacementError: there is no room for one of them any more.
            ShardError: the blocks cannot be read there.
        """
        self._places.speed = speed
        self._places.start()

    def told(self) -> str:
        """Where the blocks are, and how busy the process with most to do was, for people."""
        where = ", ".join("+".join(map(str, units)) for units in self._placed)
        many = f"{len(self._placed)} process{'' if len(self._placed) == 1 else 'es'}"
        line = (
            f"a pipeline of {many} ({self.computes_on.type}) with the blocks {where}: at most "
            f"{most_speedup(self._loads, self._placed):.2f} times as fast as one"
        )
        self._drop_unused()
        facts = self._places.call_all("facts")
        self._places.speed.compiling_s = max(compiling for _, compiling in facts)
        if self._begun is not None:
            passed = time.monotonic() - self._begun
            line += f", the busiest at work {100 * max(busy for busy, _ in facts) / passed:.0f} % of the time"
        return line

    def close(self) -> None:
        """End the processes and leave the cluster."""
        self._places.close()

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
        with self._places.chosen(unit) as place:
            return unpack(self._places.call(place, "predict", self._largest, *arguments), self._device)

    def _extend(self, cache: PlacedCache, arguments: tuple[Any, ...]) -> Packed:
        """Ask where the cache is; if that process died, make it again from all that came before."""
        self._drop_unused()
        place = cache.place = cache.place or self._places.choose(arguments[0])
        cache.calls.append(arguments)
        number = len(cache.calls) - 1
        answer = self._places.call(place, "extend", cache.key, number, *arguments)
        while answer is None:
            for earlier, before in enumerate(cache.calls):
                # else a process whose memory is full at the end would be started for ever
                answer = self._places.call(place, "extend", cache.key, earlier, *before, again=earlier < number)
        cache.length += arguments[-1].shape[1]
        found: Packed = answer
        return found

    def _drop_unused(self) -> None:
        while self._unused:
            place, key = self._unused.popleft()
            self._places.leave(place)
            self._places.tell(place, "drop", key)

    def _ask(self, unit: int, method: str, *arguments: Any) -> Any:
        """What a method of a class that is not ours gives, asked where its weights are."""
        packed = [
            pack(given) if isinstance(given, Tensor) else {name: pack(tensor) for name, tensor in given.items()}
            for given in arguments
        ]
        with self._places.chosen(unit) as place:
            found = [unpack(part, self._device) for part in self._places.call(place, "ask", unit, method, *packed)]
        return found[0] if len(found) == 1 else Example(*found)
