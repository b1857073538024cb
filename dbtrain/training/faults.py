"""Faults injected by name and step, for tests: ``DBTRAIN_FAULTS=[{"block": 1, "step": 30, "kind": "kill"}]``.

Each fault fires once: before it does, it leaves a marker in the block's directory, which also lets a test count it.
"""

import json
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.shards.store import Store

VARIABLE = "DBTRAIN_FAULTS"
KINDS = ("kill", "term", "raise", "hang", "slow", "kill_in_commit", "memory", "nan")


@dataclass(frozen=True)
class FaultPlan:
    """The faults of one block."""

    faults: tuple[Mapping[str, Any], ...]
    store: Store

    @staticmethod
    def from_environment(block: int, store: Store) -> "FaultPlan":
        """Faults of this block in the environment; none, normally.

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

    def at_step(self, step: int) -> None:
        """Fire what is planned for this step."""
        for fault in self._due(step):
            if fault["kind"] not in ("kill_in_commit", "nan") and self._first_time(fault):
                _fire(fault["kind"])

    def loss(self, step: int, loss: Tensor) -> Tensor:
        """The loss, or NaN if that is planned for this step."""
        planned = any(fault["kind"] == "nan" and self._first_time(fault) for fault in self._due(step))
        return loss * math.nan if planned else loss

    def in_commit(self, step: int) -> None:
        """Fire a kill planned for the commit of this step, after a pause that lets some of its files be written."""
        for fault in self._due(step):
            if fault["kind"] == "kill_in_commit" and self._first_time(fault):
                os.kill(os.getpid(), signal.SIGKILL)

    def _due(self, step: int) -> list[Mapping[str, Any]]:
        return [fault for fault in self.faults if fault["step"] == step]

    def _first_time(self, fault: Mapping[str, Any]) -> bool:
        return self.store.create(f"faults/{fault['kind']}-{fault['step']}", str(time.time()).encode())


def _fire(kind: str) -> None:
    if kind == "raise":
        raise RuntimeError("injected fault")
    if kind == "memory":
        raise MemoryError("injected fault: out of memory")
    if kind in ("hang", "slow"):
        time.sleep(86_400 if kind == "hang" else 3)
        return
    os.kill(os.getpid(), signal.SIGTERM if kind == "term" else signal.SIGKILL)
