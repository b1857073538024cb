"""A run whose data holds something else than when it was started is not continued, trained or evaluated."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.config import Config, load_config
from dbtrain.errors import DataError
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest, write_manifest
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import read_events
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import work
from dbtrain.training.watchdog import StopRequest
from tests.unit.conftest import never
from tests.unit.evaluation.test_evaluation_pictures import DIT, merged_run
from tests.unit.test_elsewhere import TEXT, words

LATENTS = np.random.default_rng(0).normal(size=(60, 2, 4, 4)).astype(np.float32)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of text that was trained and merged; the tests are in it."""
    words(tmp_path)
    monkeypatch.chdir(tmp_path)
    merged_run(TEXT)
    return tmp_path


def store(home: Path) -> Store:
    return Store(home / "runs" / "run")


@pytest.mark.parametrize("command", ["eval", "losses", "resume", "merge"])
def test_a_text_that_changed_is_refused_in_one_line_and_welcome_again_once_restored(home: Path, command: str) -> None:
    before = (home / "corpus.txt").read_text()
    (home / "corpus.txt").write_text(f"one more sentence {before}")
    said = CliRunner().invoke(app, [command, "runs/run"])
    assert said.exit_code == 1, said.output
    line = said.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: the data is not what run run was started with: data.path={home}/corpus.txt holds ")
    known = read_manifest(store(home)).data_hash[:16]
    assert f"run.json says {known}: restore it, or start another run (name=...)" in line
    assert "Traceback" not in said.output + said.stderr
    (home / "corpus.txt").write_text(before)
    assert prepare(load_config(None, base=TEXT), Run(store(home)), never).data().content.startswith(known)


def test_the_same_text_at_another_place_and_packed_by_gzip_is_the_same_data(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress((home / "corpus.txt").read_bytes())
    (home / "corpus.txt").unlink()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "corpus.txt").write_bytes(packed)
    monkeypatch.chdir(tmp_path / "there")
    assert CliRunner().invoke(app, ["eval", str(home / "runs" / "run")]).exit_code == 0


def test_another_text_of_the_same_name_is_not_taken_where_the_first_is_gone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "corpus.txt").unlink()
    words(tmp_path / "there", seed=1)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(DataError, match=f"data.path={tmp_path}/there/corpus.txt holds"):
        prepare(load_config(None, base={**TEXT, "out": str(home / "runs")}), Run(store(home)), never)


def test_a_run_of_before_says_nothing_of_its_data_and_goes_on(home: Path) -> None:
    manifest = read_manifest(store(home))
    assert manifest.data_hash
    write_manifest(store(home), replace(manifest, data_hash=""))
    words(home, seed=1)
    assert prepare(load_config(None, base=TEXT), Run(store(home)), never).data().train


def test_a_worker_on_a_node_with_other_data_fails_for_good(home: Path) -> None:
    words(home, seed=1)
    block = store(home).child("blocks", "01")
    claim(block, 2, "mine")
    work(Assignment(store(home).url, 1, 2, "mine", "session", 1, None, "cpu", 1, 60.0), 0, StopRequest())
    end = read_events(block.child("attempts", "2"))[-1]
    assert (end["outcome"], end["retry"]) == ("failed", False)
    assert "the data is not what run run was started with" in end["error"]


def latents(folder: Path, count: int = 60, **changes: Any) -> Config:
    np.save(folder / "x.npy", changes.pop("values", LATENTS)[:count])
    np.save(folder / "y.npy", changes.pop("labels", np.arange(60) % 3)[:count])
    data = {"source": "latents", "path": f"{folder}/x.npy", "labels": f"{folder}/y.npy", "classes": 3}
    return load_config(None, base={**DIT, "out": str(folder), "data": {**data, **changes}})


def test_latents_with_one_more_sample_are_refused(tmp_path: Path) -> None:
    run = Store(tmp_path / "toy")
    run.makedirs()
    prepare(latents(tmp_path, 59), Run(run), never)
    prepare(latents(tmp_path, 59), Run(run), never)
    with pytest.raises(DataError, match=f"data.path={tmp_path}/x.npy, data.labels={tmp_path}/y.npy holds"):
        prepare(latents(tmp_path, 60), Run(run), never)


def test_data_of_one_shape_differ_by_a_value_a_label_or_the_order(tmp_path: Path) -> None:
    other = LATENTS.copy()
    other[7, 1, 2, 3] += 1e-6
    swapped = np.arange(60) % 3
    swapped[[4, 5]] = swapped[[5, 4]]
    changes: list[dict[str, Any]] = [{}, {"values": other}, {"labels": swapped}, {"values": LATENTS[::-1].copy()}]
    assert len({load_data(latents(tmp_path, **change)).content for change in changes}) == len(changes)
    assert load_data(latents(tmp_path)).content == load_data(latents(tmp_path, scale=2.0)).content
