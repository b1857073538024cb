"""One undisturbed run of one machine, to which those of hosts, containers and Slurm are compared bit for bit."""

import pytest

from tests.conftest import ROOT, TINY, Command, shards

STEPS = 60
RUN = [str(ROOT / "configs" / "vit_digits.yaml"), "name=run", "blocks=3", *TINY]


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Its last shards."""
    folder = tmp_path_factory.mktemp("local")
    command = Command(folder, ["train", *RUN, "out=runs", "cluster.cpus_per_worker=0.5"])
    try:
        assert command.wait(240) == 0, command.output()
    finally:
        command.kill()
    return shards(folder / "runs/run", STEPS)
