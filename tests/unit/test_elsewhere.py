"""A run whose data lies at a relative path, used from another folder, another machine, and after it was moved."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.config import Config, load_config
from dbtrain.coordinator import train as command
from dbtrain.errors import DataError
from dbtrain.evaluation.report import evaluate_run
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest, write_manifest
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never
from tests.unit.evaluation.test_evaluation_pictures import merged_run

TEXT: dict[str, Any] = {
    "name": "run",
    "blocks": 2,
    "model": {"arch": "ar_lm", "depth": 2, "dim": 16, "heads": 2, "level_dim": 8},
    "data": {"source": "text", "path": "corpus.txt", "length": 8, "cache": "packed"},
    "codebook": {"dim": 32},
    "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    "training": {"steps": 1, "batch_size": 2},
    "evaluation": {"texts": 2, "batch_size": 2},
}


def words(folder: Path, seed: int = 0) -> None:
    letters = random.Random(seed)
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text(" ".join("".join(letters.choices("abcde", k=4)) for _ in range(500)))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run is started; then the tests go to an empty folder."""
    words(tmp_path / "home")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    merged_run(TEXT)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_a_run_is_evaluated_and_continues_text_from_any_folder(home: Path, tmp_path: Path) -> None:
    _, scores = evaluate_run(Run(Store(home / "runs" / "run")))
    assert scores["test"]
    said = CliRunner().invoke(
        app, ["generate", str(home / "runs" / "run"), "--prompt", "ab", "--length", "3", "--keep"]
    )
    assert said.exit_code == 0, said.output
    kept = json.loads((home / "runs" / "run" / "texts.json").read_text())
    assert [row["weights"] for row in kept] == [MergedDirectory(Store(home / "runs/run/merged")).weights_hash]
    assert list((tmp_path / "elsewhere").iterdir()) == []  # nor is the text packed again here


@pytest.mark.parametrize("options", [[], ["--prompt", "ab"]])
def test_by_default_as_much_is_written_as_the_window_has_room_for(home: Path, options: list[str]) -> None:
    said = CliRunner().invoke(app, ["generate", str(home / "runs" / "run"), *options])
    assert said.exit_code == 0, said.output
    assert len(said.output.rstrip("\n")) == 8  # data.length, of which the prompt is a part


def test_a_prompt_that_leaves_no_room_is_refused(home: Path) -> None:
    said = CliRunner().invoke(app, ["generate", str(home / "runs" / "run"), "--prompt", "abcdeabc"])
    assert said.exit_code == 2 and "a prompt of 8 tokens and --length 1 exceed the 8 tokens" in said.output


def test_a_shard_is_described_in_numbers_that_people_read(home: Path) -> None:
    shard = home / "runs" / "run" / "blocks" / "00" / "step_00000001" / "model.safetensors"
    said = CliRunner().invoke(app, ["inspect", str(shard)])
    assert said.exit_code == 0, said.output
    assert "run run, block 0 of 2, step 1, model" in said.output
    assert "layers 0-0, noise levels 3.16228 to 20 (exactly 0x1.94c583ada" in said.output
    assert " to 0x1.4000000000000p+4)" in said.output


def test_a_merged_model_names_no_folder_and_is_evaluated_where_the_data_is_said_to_lie(
    home: Path, tmp_path: Path
) -> None:
    (tmp_path / "given" / "model").mkdir(parents=True)
    (home / "runs" / "run" / "merged").rename(tmp_path / "given" / "model" / "merged")
    written = [path for path in (tmp_path / "given").rglob("*") if path.is_file()]
    assert len(written) >= 4 and not any(str(tmp_path).encode() in path.read_bytes() for path in written)
    given = Store(tmp_path / "given" / "model")
    with pytest.raises(DataError, match="data.path=corpus.txt was looked for below"):
        evaluate_run(Run(given))
    words(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="the data is not what run run was started with"):
        evaluate_run(Run(given), [f"data.path={tmp_path}/other/corpus.txt"])
    assert evaluate_run(Run(given), [f"data.path={home}/corpus.txt"])[1]["test"]


def test_a_run_whose_paths_are_absolute_is_evaluated_where_they_lead_though_its_merged_model_names_none(
    home: Path, tmp_path: Path
) -> None:
    data = {**TEXT["data"], "path": f"{home}/corpus.txt", "cache": f"{home}/packed"}
    run = merged_run({**TEXT, "name": "absolute", "data": data, "out": str(tmp_path / "runs")})
    assert str(tmp_path) not in run.child("merged").read_text("config.json")
    assert evaluate_run(Run(run))[1]["test"]
    moved = home.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=f"data.path='{home}/corpus.txt' is no file"):
        evaluate_run(Run(run))
    assert evaluate_run(Run(run), [f"data.path={moved}/corpus.txt", f"data.cache={tmp_path}/again"])[1]["test"]


def run_plan(run: Path) -> RunPlan:
    return Run.at(run).plan


def test_a_run_keeps_to_its_data_where_another_lies_at_the_same_path(home: Path, tmp_path: Path) -> None:
    words(tmp_path / "elsewhere", seed=1)
    data = run_plan(home / "runs" / "run").located().data
    assert data.model_dump()["path"] == str(home / "corpus.txt")


def test_a_run_that_was_moved_with_its_data_is_used_from_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.rename(tmp_path / "other-machine")
    run = tmp_path / "other-machine" / "runs" / "run"
    with pytest.raises(DataError) as caught:
        evaluate_run(Run.at(run))
    told = f"data.path=corpus.txt was looked for at {home}/corpus.txt, where the run found it when it was started, and "
    assert told + f"below {tmp_path}/elsewhere: put it there, or run this command where it lies" in str(caught.value)
    monkeypatch.chdir(tmp_path / "other-machine")
    assert evaluate_run(Run.at(run))[1]["test"]


def test_a_run_of_before_continues_and_is_evaluated_where_its_data_lies(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json says nothing of where that was."""
    run = Store(home / "runs" / "run")
    manifest = read_manifest(run)
    assert manifest.data_paths == {"path": f"{home}/corpus.txt", "cache": f"{home}/packed"}
    write_manifest(run, replace(manifest, data_paths={}))
    with pytest.raises(DataError, match=rf"data.path=corpus.txt was looked for below {tmp_path}/elsewhere: put it"):
        run_plan(run.path).data()
    monkeypatch.chdir(home)
    assert prepare(load_config(None, base=TEXT), Run(run), never).data().train
    assert read_manifest(run).config_hash == load_config(None, base=TEXT).content_hash()


def test_a_run_without_relative_paths_says_nothing_of_this_machine(home: Path, tmp_path: Path) -> None:
    for data in ({"source": "digits"}, {**TEXT["data"], "path": f"{home}/corpus.txt", "cache": f"{home}/packed"}):
        arch = {} if "path" in data else {"model": {"arch": "vit"}}
        config = load_config(None, base={**TEXT, **arch, "name": data["source"], "data": data, "out": str(tmp_path)})
        prepare(config, Run(Store(config.run_url)), never)
        assert "data_paths" not in json.loads((tmp_path / data["source"] / "run.json").read_text())


def test_workers_of_a_run_that_is_resumed_elsewhere_get_its_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Config] = []

    class Controller:
        stopping = False

        def __init__(self, run: Store, config: Config, *_: Any) -> None:
            told.append(config)

        states: list[Any] = []

        def run(self) -> list[Any]:
            return []

    cluster = SimpleNamespace(nodes=list, close=lambda: None)
    monkeypatch.setattr(command, "connect", lambda *_: cluster)
    monkeypatch.setattr(command, "choose_device", lambda *_: "cpu")
    monkeypatch.setattr(command, "Controller", Controller)
    said = CliRunner().invoke(app, ["resume", str(home / "runs" / "run")])
    assert said.exit_code == 0, said.output
    assert told[0].data.model_dump()["path"] == str(home / "corpus.txt")
