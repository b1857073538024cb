"""The commands of places that share nothing: a run that is sealed, trained block by block, packed and gathered."""

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.coordinator import train as command
from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.run.places import other_versions, place_of
from dbtrain.run.run import Run
from dbtrain.shards.manifest import write_manifest
from dbtrain.shards.storage.lock import RunLock
from dbtrain.shards.storage.store import Store
from tests.unit.run.carried import commit, copied, sealed
from tests.unit.small_runs import BASE
from tests.unit.test_elsewhere import TEXT as ELSEWHERE

TEXT = {**ELSEWHERE, "name": "toy", "training": {"steps": 4, "batch_size": 4}}


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert "bug" not in result.output, result.output
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({**BASE, "out": str(tmp_path / "runs")}))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the controller is told, by each call of the command; nothing is trained."""
    told: list[SimpleNamespace] = []

    class Controller:
        stopping = False

        def __init__(self, run: Run, config: Any, *rest: Any) -> None:
            *_, only, place = rest
            told.append(SimpleNamespace(run=run, config=config, only=only, place=place))
            self.states = [BlockState(0, Phase.ELSEWHERE)]

        def run(self) -> list[BlockState]:
            return self.states

    monkeypatch.setattr(command, "connect", lambda *_: SimpleNamespace(nodes=list, close=lambda: None))
    monkeypatch.setattr(command, "choose_device", lambda *_: "cpu")
    monkeypatch.setattr(command, "Controller", Controller)
    return told


def test_prepare_seals_a_run_and_trains_nothing(config: Path, tmp_path: Path) -> None:
    code, output = said("prepare", config)
    assert code == 0 and f"sealed {tmp_path}/runs/toy: 2 block(s), data " in output
    files = sorted(path.name for path in (tmp_path / "runs/toy").iterdir() if not path.name.startswith("."))
    assert files == ["codebook.safetensors", "run.json"]
    assert sum(path.stat().st_size for path in (tmp_path / "runs/toy").iterdir()) < 10_000
    before = (tmp_path / "runs/toy/run.json").read_bytes()
    assert said("prepare", config)[0] == 0  # again: checked
    assert (tmp_path / "runs/toy/run.json").read_bytes() == before
    code, output = said("prepare", config, "seed=3")
    assert code == 2 and "seed: 0 in run.json, 3 now" in output


def test_a_sealed_run_is_trained_at_a_place_with_what_that_place_has(
    config: Path, tmp_path: Path, asked: list[SimpleNamespace]
) -> None:
    said("prepare", config)
    shutil.copytree(tmp_path / "runs/toy", tmp_path / "far/toy")
    mine = ["training.micro_batch=4", "cluster.workers=2", "cluster.cpus_per_worker=0.5", "training.log_every=7"]
    code, output = said("train", tmp_path / "far/toy", "--blocks", "1", *mine)
    assert code == 0, output
    (told,) = asked
    assert told.run.store.url == str(tmp_path / "far/toy") and told.only == [1]
    assert (told.config.training.micro_batch, told.config.cluster.workers, told.config.training.log_every) == (4, 2, 7)
    assert f"place {told.place}; " in output
    assert "not merged, since block 0 (nothing), block 1 (nothing)" in output
    said("train", config, "--blocks", "0")
    assert asked[1].only == [0] and asked[1].place != told.place


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optimizer.lr=0.5", "training.optimizer.lr: 0.001 in run.json, 0.5 now"),
        ("seed=1", "seed: 0 in run.json, 1 now"),
        ("name=other", "name=other would say where the run lies or what it is called"),
        ("out=/elsewhere", "out=/elsewhere would say where the run lies"),
        ("data.validation=0.2", "data.validation: 0.1 in run.json, 0.2 now"),
        ("training.stepps=9", "did you mean"),
    ],
)
def test_what_binds_is_not_said_anew(
    config: Path, tmp_path: Path, asked: list[SimpleNamespace], override: str, words: str
) -> None:
    said("prepare", config)
    code, output = said("train", tmp_path / "runs/toy", override)
    assert code == 2 and words in output and not asked


@pytest.mark.parametrize("target", ["config", "run"])
@pytest.mark.parametrize(
    ("blocks", "words"),
    [("2", "there is no block 2: the run has blocks 0 to 1"), ("0,x", "is no list of whole numbers")],
)
def test_blocks_that_do_not_exist(
    config: Path, tmp_path: Path, asked: list[SimpleNamespace], target: str, blocks: str, words: str
) -> None:
    if target == "run":
        said("prepare", config)
    code, output = said("train", tmp_path / "runs/toy" if target == "run" else config, "--blocks", blocks)
    assert code == 2 and words in output and not asked
    assert target == "run" or not (tmp_path / "runs").exists()


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Make a room with a corpus in it, and stand there."""

    def room(name: str, words: str = "the quick brown fox jumps over the lazy dog ") -> Path:
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data/corpus.txt").write_text(words * 60)
        (tmp_path / name / "toy.yaml").write_text(
            yaml.safe_dump({**TEXT, "data": {**TEXT["data"], "path": "data/corpus.txt"}})
        )
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return room


def test_a_place_has_its_own_copy_of_the_data(text: Any, asked: list[SimpleNamespace], tmp_path: Path) -> None:
    one = text("one")
    assert said("prepare", "toy.yaml", f"data.path={one}/data/corpus.txt")[0] == 0
    two = text("two")
    shutil.copytree(one / "runs/toy", two / "toy")
    shutil.rmtree(one / "data")
    code, output = said("train", two / "toy", "--blocks", "0")
    assert code == 1 and f"data.path='{one}/data/corpus.txt' is no file" in output
    for path in ("data/corpus.txt", f"{two}/data/corpus.txt"):
        assert said("train", two / "toy", "--blocks", "0", f"data.path={path}")[0] == 0
        assert asked.pop().config.data.model_dump()["path"] == f"{two}/data/corpus.txt"
    (two / "data/corpus.txt").write_text("other words " * 300)
    code, output = said("train", two / "toy", "--blocks", "0", "data.path=data/corpus.txt")
    assert code == 1 and "the data is not what run toy was started with" in output


def test_a_finished_run_is_merged_at_a_place_that_has_the_data_elsewhere(text: Any, tmp_path: Path) -> None:
    one = text("one")
    assert said("prepare", "toy.yaml", f"data.path={one}/data/corpus.txt")[0] == 0
    two = text("two")
    shutil.copytree(one / "runs/toy", two / "toy")
    shutil.rmtree(one / "data")
    run = Run.at(str(two / "toy"))
    for block in (0, 1):
        commit(run, block, 4, seed=block)
    code, output = said("merge", two / "toy", "seed=4")
    assert code == 2 and "would change the run, which is trained" in output
    assert said("merge", two / "toy")[0] == 1
    code, output = said("merge", two / "toy", "data.path=data/corpus.txt")
    assert code == 0 and "merged 2 block(s)" in output


def test_pack_and_gather_say_what_they_did_and_what_is_missing(tmp_path: Path) -> None:
    home = sealed(tmp_path / "home")
    there = copied(home, tmp_path / "there")
    commit(there, 1, 50, place="far-00beef", attempt=3)
    code, output = said("pack", there.store.url, "--blocks", "1", "--to", tmp_path / "one.packed")
    assert code == 0 and "block 1: step 50 (loss 0.25, attempt 3 at far-00beef, digest" in output
    assert re.search(r"packed into .*one.packed, SHA-256 [0-9a-f]{64}", output)
    code, output = said("gather", home.store.url, tmp_path / "one.packed")
    assert code == 0 and "taken from" in output and output.endswith("missing: block 0 (nothing)")
    code, output = said("status", home.store.url)
    assert "block 1: 1 attempt(s), last commit at step 50 by attempt 3 at far-00beef" in output
    assert "missing here: block 0 (step 0 of 50)" in output
    commit(home, 0, 50)
    code, output = said("gather", home.store.url, tmp_path / "one.packed")
    assert code == 0 and f"all blocks are done; now: dbtrain merge {home.store.url}" in output
    assert "missing here" not in said("status", home.store.url)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gather", "RUN"], "nothing to gather from"),
        (["gather", "RUN", "x", "--blocks", "7"], "there is no block 7: run toy has blocks 0 to 1"),
        (["gather", "absent", "x"], "absent is not a run directory"),
        (["pack", "RUN", "--to", "x", "--blocks", "7"], "there is no block 7: run toy has blocks 0 to 1"),
        (["pack", "absent", "--to", "x"], "absent is not a run directory"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    home = sealed(tmp_path / "home")
    code, output = said(*(home.store.url if argument == "RUN" else argument for argument in arguments))
    assert code in (1, 2) and words in output


def test_a_full_disk_under_the_packed_file_is_not_taken_for_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = sealed(tmp_path / "home")
    commit(home, 0, 20)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dbtrain.shards.storage.local._write_new", full)
    code, output = said("pack", home.store.url, "--to", tmp_path / "a.packed")
    assert code == 1 and f"cannot write {tmp_path}/a.packed: the disk is full; free space there, or give --to" in output
    assert "move the run" not in output


@pytest.mark.parametrize("command", ["train", "resume"])
def test_the_branch_of_a_run_is_trained_with_the_run(tmp_path: Path, command: str) -> None:
    home = sealed(tmp_path / "home")
    shutil.copytree(home.store.path, home.store.path / "branch")
    branch = Run(Store(home.store.path / "branch"))
    config = {**branch.manifest.config, "name": "branch"}
    write_manifest(branch.store, replace(branch.manifest, config=config, run="toy/branch", branch=True))
    code, output = said(command, branch.store.url)
    assert code == 2 and f"is the branch of the run {home.store.url}, which is trained with it" in output
    assert "out=" not in output


def test_a_place_keeps_its_name_and_a_copy_of_its_folder_gets_another(tmp_path: Path) -> None:
    home = sealed(tmp_path / "home")
    name = place_of(home.store)
    assert re.fullmatch(r"[A-Za-z0-9-]+-[0-9a-f]{6}", name) and place_of(home.store) == name
    for way in (["cp", "-a"], ["cp", "-r"]):
        import subprocess

        there = tmp_path / way[1]
        there.mkdir()
        subprocess.run([*way, home.store.url, str(there)], check=True)
        other = place_of(Store(there / "toy"))
        assert other != name and place_of(Store(there / "toy")) == other
    (tmp_path / "home/toy").rename(tmp_path / "moved")
    assert place_of(Store(tmp_path / "moved")) == name
    (tmp_path / "moved/place.json").write_text("{")
    assert place_of(Store(tmp_path / "moved")) != name


def test_a_place_in_an_object_store(tmp_path: Path) -> None:
    store = Store("memory://place-test/toy")
    store.write("run.json", sealed(tmp_path).store.read("run.json"))
    try:
        assert place_of(store) == place_of(store)
    finally:
        store.remove("run.json")


def test_other_versions_are_told_and_block_nothing(config: Path, tmp_path: Path, asked: list[SimpleNamespace]) -> None:
    said("prepare", config)
    run = Run.at(str(tmp_path / "runs/toy"))
    assert other_versions(run.manifest) is None
    import dataclasses

    versions = {**run.manifest.versions, "torch": "2.0.1"}
    write_manifest(run.store, dataclasses.replace(run.manifest, versions=versions))
    code, output = said("train", tmp_path / "runs/toy", "--blocks", "0")
    assert code == 0 and f"this place has torch {torch.__version__}, not 2.0.1" in output and len(asked) == 1


def test_status_does_not_send_away_who_waits_for_a_worker_to_start(tmp_path: Path) -> None:
    home = sealed(tmp_path / "home")
    home.block(0).store.write_json("state.json", {"phase": "placed", "since": 0.0, "error": None})
    assert "missing here" in said("status", home.store.url)[1]
    with RunLock(home.store, "dbtrain train"):
        assert "missing here" not in said("status", home.store.url)[1]
