"""A Ray of the command's own: signals to the command's group do not reach it, and its death is told in one line."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from ray._private import services
from ray._private.node import Node

from dbtrain.coordinator.ray import own_cluster
from dbtrain.errors import PlacementError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def daemon() -> Iterator[subprocess.Popen[bytes]]:
    with own_cluster._in_sessions_of_their_own():
        process = services.ConsolePopen(SLEEP)
    yield process
    process.kill()
    process.wait()


def test_what_ray_starts_has_a_session_and_a_group_of_its_own(daemon: subprocess.Popen[bytes]) -> None:
    assert os.getsid(daemon.pid) == os.getpgid(daemon.pid) == daemon.pid != os.getpgid(0)
    assert services.ConsolePopen.__name__ == "ConsolePopen"  # as before


def test_ray_still_starts_its_processes_with_this_class() -> None:
    """A new version may not, and then a signal to the command's group ends Ray first."""
    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process)


def test_ray_still_starts_its_helpers_with_these_methods() -> None:
    """A new version may not, and then they run again, or something else calls what is missing."""
    source = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    assert all(source.count(f"self.{name}(") == 1 for name in own_cluster.HELPERS)
    before = {name: getattr(Node, name) for name in own_cluster.HELPERS}
    with own_cluster._without_helpers():
        assert all(getattr(Node, name) is not method for name, method in before.items())
    assert {name: getattr(Node, name) for name in own_cluster.HELPERS} == before


def test_a_cluster_that_has_ended_is_told(daemon: subprocess.Popen[bytes]) -> None:
    daemons = [psutil.Process(daemon.pid)]
    own_cluster.check_alive(daemons)
    own_cluster.check_alive([])  # somebody else's cluster
    daemon.kill()
    with pytest.raises(PlacementError, match="has ended.*the same command continues"):
        while True:  # until the kernel has ended it; nobody waits for it here, so it stays as a zombie
            own_cluster.check_alive(daemons)
    daemon.wait()
    with pytest.raises(PlacementError, match="has ended"):
        own_cluster.check_alive(daemons)
