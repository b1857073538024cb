"""Reads a Chrome trace of PyTorch's profiler: what a process sent, and how long its GPU computed."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]
SIZES = {"double": 8, "float": 4, "long": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}
"""Bytes of an element, by the profiler's names; of others 1 is counted, such as bool and signed char."""
COMPUTES = ("kernel", "gpu_memcpy", "gpu_memset")


NCCL_SIZES = {"Double": 8, "Float": 4, "Long": 8, "Int": 4, "BFloat16": 2, "Half": 2}
"""The same, by the names in what NCCL's operations say of themselves."""


def sent_bytes(events: Sequence[Event], ring: int) -> float:
    """Bytes that a member of a ring of so many sends, by its operations and the sizes of their tensors.

    What NCCL's operations say of themselves has their types; gloo's say nothing, so there the tensors given to c10d
    count, and those in lists, whose type a trace does not tell, as float32.

    A ring sends 2 (n-1)/n of what it reduces to all, (n-1)/n of what it gathers, scatters or broadcasts as a whole,
    and all of what goes from one to another.
    """
    of_nccl = [event["args"] for event in events if event.get("name") == "record_param_comms"]
    if any(int(said.get("In msg nelems", 0)) for said in of_nccl):
        return sum(_nccl_bytes(said) for said in of_nccl)
    operations = [event for event in events if event.get("name", "").startswith("c10d::")]
    return sum(
        _factor(e["name"].removeprefix("c10d::"), ring) * max(_by_argument(e["args"]), default=0) for e in operations
    )


def _nccl_bytes(said: Mapping[str, Any]) -> float:
    whole = max(int(said.get("In msg nelems", 0)), int(said.get("Out msg nelems", 0)))
    size = NCCL_SIZES.get(said.get("dtype", ""), 1)
    return _factor(said.get("Collective name", ""), int(said.get("Group size", 1))) * whole * size


def _factor(operation: str, ring: int) -> float:
    """Of the bytes of an operation's larger side, which are the whole, the share that is sent."""
    step = (ring - 1) / ring
    if operation == "send":
        return 1.0
    if "reduce" in operation and "scatter" not in operation:
        return 2 * step
    return step if any(word in operation for word in ("gather", "scatter", "broadcast", "alltoall")) else 0.0


def _by_argument(arguments: Mapping[str, Any]) -> list[int]:
    """Bytes of each argument, a list of tensors counting as one."""
    kinds, shapes = arguments.get("Input type", []), arguments.get("Input Dims", [])
    return [sum(_bytes(kind, shape)) for kind, shape in zip(kinds, shapes, strict=False)]


def _bytes(kind: Any, shape: Any) -> Iterator[int]:
    if isinstance(kind, list):
        for one, its in zip(kind, shape, strict=False):
            yield from _bytes(one, its)
    elif kind and shape and isinstance(shape[0], list):
        # a list of tensors has one name for its type, or TensorList
        for its in shape:
            yield SIZES.get(kind, 4) * math.prod(its)
    elif kind and shape:
        yield SIZES.get(kind, 1) * math.prod(shape)


def busy_seconds(events: Iterable[Event]) -> float:
    """Seconds in which the GPU computes or copies: the union over its streams, without NCCL's kernels."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in COMPUTES and not event["name"].startswith("nccl")
    )
    total, end = 0.0, -math.inf
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6
