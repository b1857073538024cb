"""One cluster of hosts for the tests of a module."""

import os
from collections.abc import Iterator

import pytest

from dbtrain.coordinator.ray.settings import SETTINGS
from tests.cluster.hosts import Network, missing
from tests.cluster.machines import HEAD, SPARE, WORKERS, Machines
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    reason = missing()
    if reason:
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with Network([HEAD, *WORKERS, SPARE], {**SETTINGS, "PYTHONPATH": str(ROOT)}) as network:
        yield Machines(network, tmp_path_factory.mktemp("hosts"))
