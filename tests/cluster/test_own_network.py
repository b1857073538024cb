"""The network of docs/own-network.md by its commands: trained, killed, resumed, moved, and sent to a cluster."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command, shards
from tests.own_network import command_lines, write_files

SHORT = ["training.steps=20", "training.checkpoint_every=8", "cluster.backoff_s=0.1", "blocks=2"]
RANGE = ["noise.ranges=uniform", "noise.sigma_min=0.5", "noise.sigma_max=20"]

pytestmark = pytest.mark.cluster


def test_the_commands_of_the_document_work_as_they_stand(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    write_files(tmp_path)
    for line in command_lines():
        done = dbtrain(*line)
        assert done.wait() == 0, done.output()
        assert f"model.arch=my_net:MyModel: importing my_net from {tmp_path}/my_net.py" in done.output()
    assert "accuracy" in done.output()


def test_it_resumes_bitwise_and_is_evaluated_elsewhere_and_a_changed_file_is_refused(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    write_files(tmp_path)
    train = ["train", "my_net.yaml", *SHORT, *RANGE]
    quiet = dbtrain(*train, "out=quiet", "--blocks", "1")
    assert quiet.wait() == 0, quiet.output()
    killed = dbtrain(*train, "out=killed", faults=[{"block": 1, "step": 13, "kind": "kill"}])
    assert killed.wait() == 0, killed.output()
    assert len(list((tmp_path / "killed/my-net/blocks/01/attempts").iterdir())) == 2
    one, two = (shards(tmp_path / out / "my-net", 20) for out in ("quiet", "killed"))
    assert len(one) == 3 and len(two) == 6 and one.items() <= two.items()

    whole = dbtrain("baseline", "my_net.yaml", *SHORT, *RANGE, "--kind", "end_to_end")
    assert whole.wait() == 0, whole.output()

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "killed/my-net", other / "my-net")
    net = (tmp_path / "my_net.py").rename(other / "my_net.py")
    missing = dbtrain("eval", "other/my-net")
    assert missing.wait() == 2 and "there is no module my_net in" in missing.output()
    path = os.pathsep.join([str(other), os.environ.get("PYTHONPATH", "")])
    scored = dbtrain("eval", "other/my-net", PYTHONPATH=path)
    assert scored.wait() == 0, scored.output()

    net.write_text(net.read_text() + "# another\n")
    for command in ("resume", "eval"):
        refused = dbtrain(command, "other/my-net", PYTHONPATH=path)
        assert refused.wait() == 2 and "put the file back as it was" in refused.output(), refused.output()
