"""A command that fails before anything is trained leaves no folder behind, and takes none away that is not its own."""

from types import SimpleNamespace

import pytest

from dbtrain.coordinator.train import train
from dbtrain.errors import ConfigError, DataError, RunLockedError
from dbtrain.shards.storage.directory import run_directory
from dbtrain.shards.storage.lock import RunLock
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never

VIEW = SimpleNamespace(tell=lambda line: None)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["data={source: text, path: not-there}"], DataError),
        (["data={source: idx, path: not-there}"], DataError),
        (["blocks=99"], ConfigError),
        (["model.patch=3"], ConfigError),  # found when the models are built
    ],
)
def test_what_fails_before_training_leaves_nothing(make_config, tmp_path, overrides, error):
    config = make_config(f"out={tmp_path}/some/runs", *overrides)
    with pytest.raises(error):
        train(config, VIEW, never)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_pilot_leaves_nothing_and_a_settled_run_stays(make_config, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config("noise.ranges=calibrated"), VIEW, interrupted)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("dbtrain.coordinator.train.connect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), VIEW, never)
    assert Store(tmp_path / "toy").list() == ["codebook.safetensors", "run.json"]


def test_directories_that_were_there_stay(tmp_path):
    (tmp_path / "runs").mkdir()
    with run_directory(Store(tmp_path / "runs" / "one")), RunLock(Store(tmp_path / "runs" / "one"), "a"):
        pass
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "runs" / "mine").mkdir()
    with run_directory(Store(tmp_path / "runs" / "mine")):
        pass
    assert (tmp_path / "runs" / "mine").exists()


@pytest.mark.parametrize("name", ["note.txt", ".note", ".LOCK.json.1.tmp"])
def test_whatever_somebody_put_there_stays(tmp_path, name):
    run = Store(tmp_path / "one")
    with run_directory(run), RunLock(run, "a"):
        (tmp_path / "one" / name).write_text("x")
    assert (tmp_path / "one" / name).read_text() == "x"


def test_a_command_that_came_meanwhile_keeps_its_lock(tmp_path):
    run = Store(tmp_path / "one")
    with run_directory(run):
        with RunLock(run, "a"), pytest.raises(RunLockedError), run_directory(run), RunLock(run, "b"):
            pass
        lock = RunLock(run, "c", ttl_s=0.3)
        lock.acquire()
    lock.check()
    assert run.exists("LOCK.json")
    lock.release()


def test_an_object_store_has_no_directories(tmp_path):
    with run_directory(Store(f"memory://{tmp_path.name}/one")) as nothing:
        assert nothing is None
