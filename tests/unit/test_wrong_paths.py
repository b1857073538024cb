"""Paths that are not what a command wants: each is told for what it is, and what to give instead."""

import os

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.coordinator.ray.address import check_address
from dbtrain.coordinator.train import train
from dbtrain.errors import ConfigError, ShardError
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store

YAML = "name: toy\nmodel: {arch: vit}\ndata: {source: digits}\n"
READERS = ["eval", "losses", "sample", "generate", "status", "resume", "merge", "inspect", "extend"]


def told(*command):
    result = CliRunner().invoke(cli.app, list(command))
    assert "bug" not in result.output and "storage is healthy" not in result.output
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def places(tmp_path, make_run):
    """Wrong paths by name, beside a run that is settled."""
    _, run = make_run()
    (tmp_path / "my config.yaml").write_text(YAML)
    (tmp_path / "notes").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "empty ordner ü").mkdir()
    return {
        "config": (tmp_path / "my config.yaml", "it is a configuration file; give the directory of a run"),
        "file": (tmp_path / "notes", "it is a file; give the directory of a run"),
        "through": (tmp_path / "notes" / "toy", "there is nothing of that name"),
        "dangling": (tmp_path / "dangling", "it is a link to nowhere, which does not exist"),
        "absent": (tmp_path / "absent", "there is nothing of that name"),
        "above": (tmp_path, "it has no run.json, but runs lie in it; give one of them: toy"),
        "inside": (run.path / "blocks", f"it is in the run {run.path}; give that"),
        "manifest": (run.path / "run.json", f"it is in the run {run.path}; give that"),
        "empty": (tmp_path / "empty ordner ü", "it has no run.json; check the path"),
    }


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    "which", ["config", "file", "through", "dangling", "absent", "above", "inside", "manifest", "empty"]
)
def test_where_a_run_is_wanted(command, which, places):
    path, words = places[which]
    code, said = told(command, str(path))
    assert code == 1 and f"{path} is not a run directory: {words}" in said


def test_a_circle_of_links_is_told(places, tmp_path):
    assert told("eval", str(tmp_path / "circle"))[0] == 1


def test_a_run_and_one_that_is_being_prepared_are_left_alone(make_run, tmp_path):
    check_run_path(make_run()[1])
    check_run_path(Store("memory://absent/run"))
    (tmp_path / "soon").mkdir()
    (tmp_path / "soon" / "LOCK.json").write_text("{}")
    check_run_path(Store(tmp_path / "soon"))


@pytest.mark.parametrize("command", [["train"], ["plan"], ["compare"], ["baseline"], ["punish"], ["prepare"]])
def test_where_a_configuration_is_wanted(command, make_run, tmp_path):
    _, run = make_run()
    if command != ["train"]:  # which takes both
        code, said = told(*command, run.url)
        assert code == 2 and f"to continue the run, dbtrain resume {run.url}" in said
    (tmp_path / "other").mkdir()
    code, said = told(*command, str(tmp_path / "other"))
    assert code == 2 and "is a directory, and a configuration file is wanted" in said


class Silent:
    """A view that nobody looks at."""

    def tell(self, line):
        pass

    show = table = tell


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("dangling", "dangling is a link to nowhere, which does not exist: make that directory"),
        ("dangling/deep", "dangling is a link to nowhere, which does not exist"),
        ("notes", "notes is a file: choose another out= or name="),
        ("notes/deep", "notes is a file: choose another"),
        ("toy", "inside of another run, .*toy: choose an out= beside it, such as out="),
        ("toy/blocks/00", "inside of another run"),
        ("x" * 300, "too long"),
        ("circle", "circle"),
    ],
    ids=lambda value: value[:20],
)
def test_where_no_run_can_lie(out, words, places, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("dbtrain.coordinator.train.connect", lambda *_: pytest.fail("Ray was started"))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises((ConfigError, ShardError), match=words) as caught:
        train(make_config(f"out={tmp_path}/{out}", "name=new"), Silent(), lambda *_: pytest.fail("a pilot"))
    assert "storage is healthy" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_run_beside_another_and_one_by_a_link_that_leads_somewhere_may_lie_there(places, make_config, tmp_path):
    from dbtrain.shards.storage.directory import run_directory

    (tmp_path / "real ü").mkdir()
    (tmp_path / "link").symlink_to("real ü")
    for out in (f"{tmp_path}", f"{tmp_path}/link", f"{tmp_path}/a b/c"):
        with run_directory(Store(make_config(f"out={out}", "name=new").run_url)):
            pass


def test_a_folder_for_temporary_files_whose_name_is_too_long_for_sockets(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    room = 107 - len("/ray/session_2026-01-01_00-00-00_000000_/sockets/plasma_store") - len(str(os.getpid()))
    for length, fits in ((room, True), (room + 1, False)):
        folder = "/tmp/" + "d" * (length - 5)
        monkeypatch.setenv("TMPDIR", folder)
        try:
            if fits:
                assert check_address(None)
                continue
            with pytest.raises(ConfigError, match=rf"TMPDIR={folder} is too long .*{length} bytes, at most {room}"):
                check_address(None)
            monkeypatch.setenv("RAY_TMPDIR", str(tmp_path)[:room] if len(str(tmp_path)) <= room else "/tmp")
            assert check_address(None)
        finally:
            if fits:
                os.rmdir(folder)


def test_a_folder_for_temporary_files_that_is_none(monkeypatch, tmp_path):
    file = f"/tmp/dbtrain-file-{os.getpid()}"
    try:
        with open(file, "w"):
            pass
        monkeypatch.setenv("RAY_TMPDIR", file)
        with pytest.raises(ConfigError, match=f"RAY_TMPDIR={file} cannot hold the files that Ray makes there"):
            check_address(None)
    finally:
        os.remove(file)
