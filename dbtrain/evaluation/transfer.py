"""How a block gets from its files to the device that computes, beside the computation."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from mmap import mmap
from typing import Protocol

import torch
from torch import Tensor

from dbtrain.shards.safetensors_file import Destination
from dbtrain.shards.storage.content import PIECE


class Transfer(Protocol):
    """How blocks get from their files to a device, beside what it computes."""

    @property
    def destination(self) -> Destination:
        """Where tensors of a file are put as they are read."""

    def beside(self) -> AbstractContextManager[None]:
        """Everything inside happens beside what the device computes, and has happened at the end."""

    def hold_back(self) -> None:
        """What is transferred from now on waits, on the device, for what was computed so far."""


class OnHost:
    """Blocks are used in the memory that they are read into, which the system has back when a block goes.

    Of what is freed, malloc keeps pieces below 32 MiB for the thread that used them, and a block that is read
    ahead is read on another thread each time.
    """

    @property
    def destination(self) -> Destination:
        """Itself."""
        return self

    def room(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """A new tensor in memory of its own, to be filled."""
        size = math.prod(shape) * dtype.itemsize
        return torch.frombuffer(mmap(-1, size), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)

    def fill(self, tensor: Tensor, take: Callable[[memoryview], object], settle: Callable[[], None]) -> None:
        """Read straight into the tensor."""
        take(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def beside(self) -> AbstractContextManager[None]:
        """Nothing is needed."""
        return nullcontext()

    def hold_back(self) -> None:
        """Nothing is under way."""


class ToGpu:
    """Blocks are read through two pinned buffers, and copied to the GPU on a stream of their own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [(_pinned(PIECE), torch.cuda.Event()) for _ in range(2)]  # type: ignore[no-untyped-call]

    @property
    def destination(self) -> Destination:
        """Itself."""
        return self

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Use the stream, and wait for it in the end."""
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def hold_back(self) -> None:
        """Memory that is freed now may still be read on the stream that computes."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def room(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """A new tensor on the GPU, to be filled."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def fill(self, tensor: Tensor, take: Callable[[memoryview], object], settle: Callable[[], None]) -> None:
        """Read piece by piece into the buffers in turn, while the other one is copied."""
        into = tensor.reshape(-1).view(torch.uint8)
        for part in torch.split(into, PIECE):
            self._buffers.reverse()
            buffer, copied = self._buffers[0]
            settle()
            copied.synchronize()
            piece = buffer[: len(part)]
            take(piece.numpy().data)
            part.copy_(piece, non_blocking=True)
            copied.record(self._stream)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def transfer_to(device: torch.device) -> Transfer:
    """How blocks get to a device."""
    return ToGpu(device) if device.type == "cuda" else OnHost()
