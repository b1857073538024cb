"""A block's state on the host: copied while the GPU goes on, into memory that is kept between commits."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dbtrain.shards.side_by_side import Beside

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""Shape of each tensor, by part and name."""
PORTABLE = 1
"""Flag of cudaHostRegister: pinned for all contexts of the process."""


class Copier(Protocol):
    """How tensors get to the host."""

    def pin(self, memory: Tensor) -> str | None:
        """Make host memory fit for copies that nobody waits for; returns why it cannot be."""

    def begin(self) -> None:
        """What is copied from now on is what all work so far has made of it."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy to the host, perhaps later."""

    def mark(self) -> Any:
        """The end of all copies so far, with a method `synchronize`; None if they have ended."""

    def hold_back(self, mark: Any) -> None:
        """What the device is told from now on begins after these copies have ended."""


class FromHost:
    """Copies of tensors that are on the host already."""

    def pin(self, memory: Tensor) -> str | None:
        """Nothing is needed."""
        return None

    def begin(self) -> None:
        """Nothing is under way."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy at once."""
        into.copy_(source)

    def mark(self) -> None:
        """All copies have ended."""

    def hold_back(self, mark: Any) -> None:
        """Nothing is under way."""


class FromGpu:
    """Copies on a stream of their own, beside the one that trains.

    Args:
        device: the device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pin(self, memory: Tensor) -> str | None:
        """Register it with the driver: PyTorch's own pinned memory comes in powers of two."""
        address = memory.data_ptr()
        with torch.cuda.device(self._device):
            driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(driver.cudaHostRegister(address, memory.nbytes, PORTABLE))
        if code:
            return f"cudaHostRegister: error {code}"
        weakref.finalize(memory, _unpin, address).atexit = False
        return None

    def begin(self) -> None:
        """Wait, on the GPU, for the steps so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Put a copy on the stream."""
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event after the copies."""
        return self._stream.record_event()

    def hold_back(self, mark: torch.cuda.Event) -> None:
        """Let the GPU wait; the host does not."""
        torch.cuda.current_stream(self._device).wait_event(mark)


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class _Memory:
    """Host memory for one snapshot: float32 tensors, end to end in one allocation."""

    def __init__(self, shapes: Shapes) -> None:
        sizes = [math.prod(shape) for part in shapes.values() for shape in part.values()]
        self.flat = torch.empty(sum(sizes), dtype=torch.float32)
        pieces = iter(torch.split(self.flat, sizes))
        self.parts = {
            part: {name: next(pieces).view(tuple(shape)) for name, shape in named.items()}
            for part, named in shapes.items()
        }


class Snapshot:
    """A block's state as it was after some step; its holder
    gives it back once it is written or not wanted."""

    def __init__(self, memory: _Memory, give_back: Callable[[_Memory], None]) -> None:
        self._memory = memory
        self._give_back = give_back
        self._mark: Any = None
        self._sources: list[Tensor] = []

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Float32 tensors by part and name, complete after :meth:`wait` and valid until `release`."""
        return self._memory.parts

    def wait(self) -> None:
        """Wait until the last copy has ended; may be called on any thread."""
        if self._mark is not None:
            self._mark.synchronize()
        self._sources.clear()

    def release(self) -> None:
        """Give the memory back for the next snapshot."""
        self.wait()
        self._give_back(self._memory)


class HostCopies:
    """Snapshots of tensors of fixed shapes; memory for as many as are held at the same time is kept.

    The copies of a snapshot go on while the next step's gradients are computed; its update waits for them, on
    the device. So a snapshot delays a step only if its copies take longer than the next forward and backward
    pass.

    Args:
        shapes: shapes of the tensors that a snapshot has.
        copier: how they get to the host.
        tell: gets one line if memory for it cannot be pinned; copies are then waited for.
    """

    def __init__(self, shapes: Shapes, copier: Copier, tell: Callable[[str], None]) -> None:
        self._shapes = shapes
        self._copier = copier
        self._tell = tell
        self._free: list[_Memory] = []
        self._under_way: Any = None
        # pinning takes a second for some gigabytes, which pass while the model is compiled
        self._first: Beside[_Memory] | None = Beside(self._allocate) if isinstance(copier, FromGpu) else None

    def begin(self) -> Snapshot:
        """A snapshot to be filled, in memory that nobody holds."""
        if self._first is not None:
            self._free.append(self._first.result())
            self._first = None
        # on a thread of its own: CUDA keeps an error for the thread that made it, so not for the training
        memory = self._free.pop() if self._free else Beside(self._allocate).result()
        self._copier.begin()
        return Snapshot(memory, self._free.append)

    def copy(self, snapshot: Snapshot, part: str, name: str, source: Tensor, passing: bool) -> None:
        """Copy a tensor into its place.

        Args:
            passing: it was made for this copy, and its memory is needed for the next one: wait.
        """
        self._copier.copy(snapshot.parts[part][name], source)
        if passing:
            mark = self._copier.mark()
            if mark is not None:
                mark.synchronize()
        else:
            snapshot._sources.append(source)

    def end(self, snapshot: Snapshot) -> None:
        """All tensors were copied, or will have been when the snapshot's `wait` returns."""
        snapshot._mark = self._under_way = self._copier.mark()

    def before_update(self) -> None:
        """Called before what was copied may change."""
        if self._under_way is not None:
            self._copier.hold_back(self._under_way)
            self._under_way = None

    def _allocate(self) -> _Memory:
        memory = _Memory(self._shapes)
        why = self._copier.pin(memory.flat) if memory.flat.numel() else None
        if why:
            size = memory.flat.nbytes / 1e9
            self._tell(
                f"{size:.1f} GB of host memory for a snapshot cannot be pinned ({why}): commits stop the training for "
                "longer; give the worker more memory, or raise its limit of locked memory (ulimit -l)"
            )
        return memory
