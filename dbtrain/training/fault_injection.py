"""Faults injected by name and step, for tests: ``DBTRAIN_FAULTS=[{"block": 1, "step": 30, "kind": "kill"}]``.
The branch of a run is called ``"branch"`` in the place of a block's number.

Each fault fires once: before it does, it leaves a marker in the block's directory,
which also lets a test count it.
"""

import itertools
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.shards.storage.store import Store

VARIABLE = "DBTRAIN_FAULTS"
FLIPS = {
    "flip_model": "model.safetensors",
    "flip_ema": "ema.safetensors",
    "flip_optim": "optim.safetensors",
    "flip_commit": "COMMIT.json",
}
"""Flip a bit in that file of the newest checkpoint, then die."""
KINDS = ("kill", "term", "raise", "hang", "slow", "kill_in_commit", "memory", "nan", "gradient", *FLIPS)
MEMORY_SLACK = 256 << 20
"""Bytes that a process short of memory may still get, so that it can say what happened."""


@dataclass(frozen=True)
class FaultPlan:
    """The faults of one block."""

    faults: tuple[Mapping[str, Any], ...]
    store: Store

    @staticmethod
    def from_environment(block: int | str, store: Store) -> "FaultPlan":
        """Faults of this block, a number or `branch`, in the environment; none, normally.

        Raises:
            ConfigError: the variable is malformed.
        """
        text = os.environ.get(VARIABLE, "[]")
        try:
            faults = json.loads(text)
            if not all(isinstance(f["step"], int) and isinstance(f["kind"], str) for f in faults):
                raise TypeError("a step must be an integer and a kind a text")
            mine = tuple(f for f in faults if f["block"] == block)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{VARIABLE}={text!r} is no list of faults with block, step and kind ({error})") from None
        unknown = [f["kind"] for f in mine if f["kind"] not in KINDS]
        if unknown:
            raise ConfigError(f"{VARIABLE} names the unknown fault {unknown[0]!r}: choose of {', '.join(KINDS)}")
        return FaultPlan(mine, store)

    def planned(self, step: int) -> bool:
        """Whether anything may fire at this step."""
        return bool(self._due(step))

    def at_step(self, step: int) -> None:
        """Fire what is planned for this step."""
        for fault in self._due(step):
            if fault["kind"] not in ("kill_in_commit", "nan", "gradient") and self._first_time(fault):
                if fault["kind"] in FLIPS:
                    _flip(self.store, FLIPS[fault["kind"]])
                _fire(fault["kind"])

    def loss(self, step: int, loss: Tensor) -> Tensor:
        """The loss, or NaN if that is planned for this step."""
        planned = any(fault["kind"] == "nan" and self._first_time(fault) for fault in self._due(step))
        return loss * math.nan if planned else loss

    def gradient(self, step: int, module: nn.Module) -> None:
        """Make a gradient infinite from this step on, if that is planned for it."""
        if any(fault["kind"] == "gradient" and self._first_time(fault) for fault in self._due(step)):
            parameter = next(p for p in module.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient + math.inf)  # type: ignore[no-untyped-call]

    def in_commit(self, step: int, fence: Callable[[], None]) -> Callable[[], None]:
        """The fence of the commit of this step; a kill planned
        for it fires after the shards and before COMMIT.json."""
        calls = itertools.count(1)

        def then_kill() -> None:
            fence()
            # a commit asks before its first write, and right before COMMIT.json
            if next(calls) > 1 and any(f["kind"] == "kill_in_commit" and self._first_time(f) for f in self._due(step)):
                os.kill(os.getpid(), signal.SIGKILL)

        return then_kill

    def _due(self, step: int) -> list[Mapping[str, Any]]:
        return [fault for fault in self.faults if fault["step"] == step]

    def _first_time(self, fault: Mapping[str, Any]) -> bool:
        return self.store.create(f"faults/{fault['kind']}-{fault['step']}", str(time.time()).encode())


HEARD_S = 1.0
"""Time for a warning to be heard in the step that it was planned for: on a full machine the thread that hears
it was seen to come 18 small steps late."""


def _fire(kind: str) -> None:
    if kind == "raise":
        raise RuntimeError("injected fault")
    if kind == "memory":
        _exhaust_memory()
    if kind in ("hang", "slow"):
        time.sleep(86_400 if kind == "hang" else 3)
        return
    os.kill(os.getpid(), signal.SIGTERM if kind == "term" else signal.SIGKILL)
    time.sleep(HEARD_S)


def _flip(store: Store, name: str) -> None:
    newest = max(step for step in store.list() if step.startswith("step_") and store.exists(f"{step}/COMMIT.json"))
    path = store.path / newest / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _exhaust_memory() -> None:
    """Allocate under a limit of the address space until the allocator refuses:
    a MemoryError that nobody raised."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_SLACK, before[1]))
    held = []
    try:
        while True:
            held.append(bytearray(MEMORY_SLACK // 16))
    finally:
        held.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)
