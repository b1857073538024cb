"""Which block goes where: a pure first-fit over nodes, used to admit blocks and to show the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dbtrain.errors import PlacementError
from dbtrain.run.requests import Request

EPSILON = 1e-6
"""Fractions of a GPU are floats."""


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


def place(wanted: Sequence[Request], nodes: Sequence[Node]) -> dict[int, list[str] | None]:
    """Nodes of each block's workers; None for a block that must wait for another to end.

    Raises:
        PlacementError: a block would not fit on the empty cluster.
    """
    for request in wanted:
        if (why := obstacle(request, nodes)) is not None:
            raise PlacementError(why)
    free = _all_of(nodes)
    return {request.block: _fit(request, free) for request in wanted}


def fits(request: Request, busy: Sequence[Request], nodes: Sequence[Node]) -> bool:
    """Whether a block fits beside those that run; where exactly is Ray's business."""
    try:
        return place([*busy, request], nodes)[request.block] is not None
    except PlacementError:
        # a node went away and the block fits on none of the rest: it waits until one comes back
        return False


def count_at_once(wanted: Sequence[Request], nodes: Sequence[Node]) -> int:
    """How many of these blocks train at the same time on an empty cluster."""
    free = _all_of(nodes)
    return sum(_fit(request, free) is not None for request in wanted)


def obstacle(request: Request, nodes: Sequence[Node]) -> str | None:
    """Why a block would not fit even if nothing else ran; None if it would."""
    free = _all_of(nodes)
    return _why(request, nodes) if _fit(request, free) is None else None


def _all_of(nodes: Sequence[Node]) -> dict[str, dict[str, float]]:
    """What the nodes have when nothing runs, to be taken from."""
    return {node.name: dict(node.resources) for node in nodes}


def _fit(request: Request, free: dict[str, dict[str, float]]) -> list[str] | None:
    taken: list[str] = []
    for _ in range(request.workers):
        name = next((n for n, have in free.items() if _holds(have, request.resources)), None)
        if name is None:
            for used in taken:
                _change(free[used], request.resources, +1)
            return None
        _change(free[name], request.resources, -1)
        taken.append(name)
    return taken


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
