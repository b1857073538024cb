"""Reads a Chrome trace of PyTorch's profiler: what a process sent, and how long its GPU computed."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Event = Mapping[str, Any]
SIZES = {"double": 8, "float": 4, "long": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}
"""Bytes of an element, by the profiler's names; of others 1 is counted, such as bool and signed char."""
COMPUTES = ("kernel", "gpu_memcpy", "gpu_memset")


def sent_bytes(events: Iterable[Event], ring: int) -> float:
    """Bytes that a member of a ring of so many sends, by the operations of c10d and the sizes of their tensors.

    A ring sends 2 (n-1)/n of what it reduces to all, (n-1)/n of what it gathers or scatters as a whole, and
    all of what goes from one to another.
    """
    step = (ring - 1) / ring
    factors = {"allreduce_": 2 * step, "allreduce_coalesced_": 2 * step, "send": 1.0, "broadcast_": step}
    total = 0.0
    for event in events:
        name = event.get("name", "")
        if not name.startswith("c10d::"):
            continue
        operation = name.removeprefix("c10d::")
        tensors = list(_tensors(event["args"]))
        if operation in factors:
            total += factors[operation] * sum(tensors)
        elif "gather" in operation or "scatter" in operation:
            # the whole is the larger one of what goes in and what comes out
            total += step * max(_by_argument(event["args"]), default=0)
    return total


def _by_argument(arguments: Mapping[str, Any]) -> list[int]:
    """Bytes of each argument, a list of tensors counting as one."""
    kinds, shapes = arguments.get("Input type", []), arguments.get("Input Dims", [])
    return [sum(_bytes(kind, shape)) for kind, shape in zip(kinds, shapes, strict=False)]


def _tensors(arguments: Mapping[str, Any]) -> Iterator[int]:
    """Bytes of each tensor that an operation was given."""
    kinds, shapes = arguments.get("Input type", []), arguments.get("Input Dims", [])
    for kind, shape in zip(kinds, shapes, strict=False):
        yield from _bytes(kind, shape)


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
