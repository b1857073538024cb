"""What the controller needs of a cluster: `ray/cluster.py` and `ray/attempt.py` have it, tests a fake one."""

from typing import Protocol

from dbtrain.coordinator.placement import Node
from dbtrain.run.requests import Request
from dbtrain.training.assignment import Assignment


class Attempt(Protocol):
    """A running attempt."""

    @property
    def over(self) -> bool:
        """Whether its workers have ended."""
        ...

    @property
    def error(self) -> str | None:
        """All that the cluster says of their death, if they died."""
        ...


class Cluster(Protocol):
    """What the controller needs of a cluster."""

    def nodes(self) -> list[Node]:
        """Nodes that are alive."""
        ...

    def start(self, assignment: Assignment, request: Request, name: str) -> Attempt:
        """Start the workers of an attempt."""
        ...
