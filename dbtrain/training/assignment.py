"""What a worker is told; plain values, so that it travels."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells the workers of one attempt."""

    run_url: str
    block: int
    attempt: int
    token: str
    """Token of the fence: a newer attempt has another one."""
    session: str
    """Session of the coordinator: a stop request names it."""
    workers: int
    micro_batch: int | None
    device: Literal["cpu", "cuda"]
    threads: int
    """CPU threads of a worker; fixed, because the order of sums follows it."""
    hang_timeout_s: float
    place: str = ""
    """Name of the copy of the run that the attempt runs in."""
    config: dict[str, Any] | None = None
    """Configuration of this start of the run, which may differ from the one in run.json in what does not
    determine the weights."""
