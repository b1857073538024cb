"""Which block goes where: a pure first-fit over nodes, used to admit blocks and to show the plan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbtrain.errors import PlacementError

if TYPE_CHECKING:  # it imports torch, which the process of the controllers does without
    from dbtrain.run.requests import Request

EPSILON = 1e-6
"""Fractions of a GPU are floats."""


SHORT_ID = 4
"""Characters of Ray's id of a node that its name has."""


def node_name(host: str, identifier: str) -> str:
    """Name of a node of Ray: its host, and the beginning of the id that ``ray list nodes`` shows, as in
    ``gpu7#3f9a``; one host may have several nodes. Without an id, the host alone."""
    return f"{host}#{identifier[:SHORT_ID]}" if identifier else host


@dataclass(frozen=True)
class Node:
    """A machine: a name and what it has, as Ray counts it (``CPU``, ``GPU``, custom names)."""

    name: str
    resources: Mapping[str, float]


def choose_device(wanted: str, nodes: Sequence[Node]) -> str:
    """``cuda`` or ``cpu``.

    Raises:
        PlacementError: a GPU is demanded and no node has one.
    """
    gpus = sum(node.resources.get("GPU", 0) for node in nodes)
    if wanted == "cuda" and not gpus:
        raise PlacementError(
            f"cluster.device=cuda, but none of the {len(nodes)} nodes has a GPU: set cluster.device=cpu or auto, or "
            "start Ray where its GPUs are visible"
        )
    return "cuda" if gpus and wanted != "cpu" else "cpu"


class Room:
    """What is left of nodes as blocks are put on them, first fit; nothing is given back.

    The search for a place begins where the last block that asked for the same found its own, and once one of
    them found none it is not tried again: a thousand blocks take about a thousand looks at a node, and not a
    million.

    Args:
        nodes: nodes with all resources that they have.
        busy: blocks that are there already.
    """

    def __init__(self, nodes: Sequence[Node], busy: Sequence[Request] = ()) -> None:
        self._names = [node.name for node in nodes]
        self._free = [dict(node.resources) for node in nodes]
        self._first: dict[Hashable, int] = {}
        self._full: set[Hashable] = set()
        for request in busy:
            self.take(request)

    def take(self, request: Request) -> list[str] | None:
        """Nodes of a block's workers, which are then taken; None, and nothing taken, if it does not fit."""
        want = tuple(sorted(request.resources.items()))
        if (want, request.workers) in self._full:
            return None
        at, taken = self._first.get(want, 0), list[int]()
        while len(taken) < request.workers and at < len(self._free):
            if _holds(self._free[at], request.resources):
                _change(self._free[at], request.resources, -1)
                taken.append(at)
            else:
                at += 1
        if len(taken) < request.workers:
            for used in taken:
                _change(self._free[used], request.resources, +1)
            self._full.add((want, request.workers))
            return None
        self._first[want] = at
        return [self._names[used] for used in taken]


def place(wanted: Sequence[Request], nodes: Sequence[Node]) -> dict[int, list[str] | None]:
    """Nodes of each block's workers; None for a block that must wait for another to end.

    Raises:
        PlacementError: a block would not fit on the empty cluster.
    """
    if why := next(filter(None, obstacles(wanted, nodes)), None):
        raise PlacementError(why)
    room = Room(nodes)
    return {request.block: room.take(request) for request in wanted}


def count_at_once(wanted: Sequence[Request], nodes: Sequence[Node]) -> int:
    """How many of these blocks train at the same time on an empty cluster."""
    room = Room(nodes)
    return sum(room.take(request) is not None for request in wanted)


def obstacles(wanted: Sequence[Request], nodes: Sequence[Node]) -> list[str | None]:
    """Why each block would not fit even if nothing else ran; None for a block that would."""
    known: dict[Hashable, bool] = {}
    found = list[str | None]()
    for request in wanted:
        key = (tuple(sorted(request.resources.items())), request.workers)
        if key not in known:
            known[key] = Room(nodes).take(request) is not None
        found.append(None if known[key] else _why(request, nodes))
    return found


def _holds(have: Mapping[str, float], want: Mapping[str, float]) -> bool:
    return all(have.get(name, 0) + EPSILON >= amount for name, amount in want.items())


def _change(have: dict[str, float], want: Mapping[str, float], sign: int) -> None:
    for name, amount in want.items():
        have[name] = have.get(name, 0) + sign * amount


def _why(request: Request, nodes: Sequence[Node]) -> str:
    want = ", ".join(f"{amount:g} {name}" for name, amount in request.resources.items())
    best = "; ".join(
        f"{node.name} has " + ", ".join(f"{node.resources.get(name, 0):g} {name}" for name in request.resources)
        for node in nodes
    )
    return (
        f"block {request.block} wants {request.workers} worker(s) of {want} and fits on no empty cluster like this one "
        f"({best or 'no nodes'}): ask for less (cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.workers) or "
        "add nodes"
    )
