"""The processes of a pipeline: who is asked, and what happens when one dies."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dbtrain.config import Config
from dbtrain.errors import HostDiedError, PlacementError
from dbtrain.evaluation.pipeline.stage import Stage, StageSetting
from dbtrain.evaluation.speed import Speed

MOST_DEATHS = 3
"""A process that dies so often without an answer to anything new is not started again."""


class Host(Protocol):
    """A process of the cluster that holds an object."""

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object gives; HostDiedError if the process is dead."""

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method and wait for nothing, also if the process is dead."""


class Hosts(Protocol):
    """A cluster that has room for such processes."""

    device: str
    """``cuda`` or ``cpu``: what each process computes with."""
    threads: int
    """CPUs of each process."""

    def room(self) -> int:
        """How many processes there is room for now."""

    def start(self, make: Callable[..., Any], *arguments: Any) -> Host:
        """Start a process and make its object there."""

    def close(self) -> None:
        """End all of them."""


OpenHosts = Callable[[Config], Hosts]
"""Connects to the cluster that a configuration names."""


@dataclass
class Place:
    """A process that holds some models, and those that stood in its place before."""

    units: tuple[int, ...]
    """The models, each by the number of its last shard."""
    asked: int = 0
    """Calls that it has not answered."""
    host: Host | None = None
    deaths: int = 0
    """How often it died since it last answered something new."""
    given_up: str = ""
    """Why no process is started here again."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Places:
    """All processes of a pipeline. A call to one that dies is repeated by the one that replaces it.

    Args:
        hosts: the cluster; it is closed with the places.
        url: of the merged directory, as the cluster sees it.
        units: models of each process.
    """

    def __init__(self, hosts: Hosts, url: str, units: Sequence[tuple[int, ...]]) -> None:
        self._hosts, self._url = hosts, url
        self._places = [Place(each) for each in units]
        self._choosing = threading.Lock()
        self._closed = False
        self.speed = Speed("fp32", False, torch.device(hosts.device))
        """How the blocks predict; to be set before the first process is started."""

    def start(self) -> None:
        """Start all processes at once.

        Raises:
            PlacementError: there is no room for one of them any more.
            ShardError: the blocks cannot be read there.
        """
        errors: list[BaseException] = []

        def start(place: Place) -> None:
            try:
                self.call(place, "facts")
            except BaseException as error:  # told below
                errors.append(error)

        threads = [threading.Thread(target=start, args=(place,), daemon=True) for place in self._places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def call(self, place: Place, method: str, *arguments: Any, again: bool = False) -> Any:
        """Ask a place, and the process that replaces it if it dies; `again` if it was answered before."""
        while True:
            host = None
            try:
                host = self._host(place)
                answer = host.call(method, *arguments)
            except HostDiedError as error:
                self._note_death(place, host, error)
                continue
            if answer is not None and not again:
                place.deaths = 0
            return answer

    def call_all(self, method: str) -> list[Any]:
        """What a method gives at each place."""
        return [self.call(place, method) for place in self._places]

    def tell(self, place: Place, method: str, *arguments: Any) -> None:
        """Call a method of the process that is there, if any, and wait for nothing."""
        host = place.host
        if host is not None:
            host.tell(method, *arguments)

    def choose(self, unit: int) -> Place:
        """The place with the fewest calls under way, of those with the model; it has one more from now on."""
        with self._choosing:
            place = min((place for place in self._places if unit in place.units), key=lambda place: place.asked)
            place.asked += 1
            return place

    def leave(self, place: Place) -> None:
        """A call is over."""
        with self._choosing:
            place.asked -= 1

    @contextmanager
    def chosen(self, unit: int) -> Iterator[Place]:
        """The place for one call."""
        place = self.choose(unit)
        try:
            yield place
        finally:
            self.leave(place)

    def close(self) -> None:
        """End the processes and leave the cluster."""
        self._closed = True
        self._hosts.close()

    def _host(self, place: Place) -> Host:
        """The process of a place, started if there is none."""
        with place.lock:
            if place.given_up:
                raise PlacementError(place.given_up)
            if place.host is None:
                speed, hosts = self.speed, self._hosts
                setting = StageSetting(self._url, hosts.device, hosts.threads, speed.precision, speed.compiled)
                place.host = hosts.start(Stage, setting, place.units)
            return place.host

    def _note_death(self, place: Place, host: Host | None, error: HostDiedError) -> None:
        if self._closed:
            raise error
        with place.lock:
            if place.host is not host:
                return  # another thread has noticed it, and started the next one
            place.host, place.deaths = None, place.deaths + 1
            if place.deaths >= MOST_DEATHS:
                blocks = " and ".join(map(str, place.units))
                place.given_up = (
                    f"the process with block {blocks} of the pipeline died {place.deaths} times without an answer, at "
                    f"last: {error}: if its memory was full, lower evaluation.batch_size or take more processes"
                )
