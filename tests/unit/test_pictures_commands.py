"""Plan, run.json and the tables of an evaluation say what the pictures are, by the names of their classes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.evaluation.metrics import METRICS
from dbtrain.evaluation.report import MOST_CLASSES, comparison, scores_table
from dbtrain.run.plan import read_plan
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import SMALL, never
from tests.unit.data.pictures import class_folders
from tests.unit.evaluation.test_evaluation_pictures import merged_run

CLASSES = {"[cat]": 9, "dog": 8, "eel": 7}
"""Rich would take the first for a style."""


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "pets", CLASSES)
    data = {"source": "images", "path": "pets", "size": [20, 28], "validation": 0.3, "test": 0.3}
    return {**SMALL, "blocks": 2, "data": data, "training": {**SMALL["training"], "steps": 1}}


def test_a_plan_says_what_the_data_is_and_where_it_does_not_fit(base, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps(base))
    said = CliRunner().invoke(app, ["plan", "c.yaml"])
    assert said.exit_code == 0, said.output
    assert "data: 12 training, 5 validation, 7 test pictures of 28x20 (width x height) in 3 channel(s)" in said.output
    assert "3 class(es): [cat], dog, eel" in said.output and "the test split is the 30%" in said.output
    refused = CliRunner().invoke(app, ["plan", "c.yaml", "data.size=[21,28]"])
    assert refused.exit_code == 2 and "model.patch=4 does not divide the 21x28 image" in refused.stderr
    assert "data.size" in refused.stderr
    refused = CliRunner().invoke(app, ["plan", "c.yaml", "data.classes=4"])
    assert refused.exit_code == 1 and "data.classes=4, and the data has 3: [cat], dog, eel" in refused.stderr


def test_run_json_keeps_the_classes_and_splits_and_the_tables_name_them(base):
    run = merged_run(base)
    manifest = read_manifest(run)
    assert manifest.class_names == tuple(CLASSES) and manifest.shape == {"image": [3, 20, 28], "classes": 3}
    assert any("the validation split is the 30% of the others" in note for note in manifest.data_notes)
    assert read_plan(manifest, None).class_names == tuple(CLASSES)
    said = CliRunner().invoke(app, ["eval", str(run.url)])
    assert said.exit_code == 0, said.output
    assert all(f"class {name}" in said.output for name in CLASSES)
    scores = json.loads(Path(run.url, "evaluation.json").read_text())["scores"]
    data = read_plan(manifest, None).data()
    for split, samples in (("validation", data.validation), ("test", data.test)):
        counts = samples.labels.bincount(minlength=3).tolist()
        shares = [scores[split].get(f"class_{name}") for name in CLASSES]
        assert [share is None for share in shares] == [count == 0 for count in counts]
        right = sum(share * count for share, count in zip(shares, counts, strict=True) if count)
        assert right / sum(counts) == pytest.approx(scores[split]["mean"])


def test_other_pictures_under_the_same_path_are_refused(base, tmp_path):
    config, run = load_config(None, base=base), Store(load_config(None, base=base).run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    assert prepare(config, Run(run), never).class_names == tuple(CLASSES)
    (tmp_path / "pets" / "dog" / "000.png").write_bytes((tmp_path / "pets" / "eel" / "001.png").read_bytes())
    with pytest.raises(Exception, match="the data is not what run toy was started with"):
        prepare(config, Run(run), never)
    with pytest.raises(ConfigError, match="data.size"):
        prepare(load_config(None, ["data.size=[24,28]"], base=base), Run(run), never)


def rows(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_of_many_classes_the_worst_are_shown_and_a_comparison_has_none():
    by_class = {f"class_{i}": i / 50 for i in range(50)}
    scores = {"validation": {"mean": 0.5, "class_0": 0.25}, "test": {"mean": 0.5, **by_class}}
    shown = rows(scores_table(METRICS["accuracy"], scores))
    assert shown[0] == ("mean over the chain", "50.00", "50.00")
    assert shown[1] == ("class 0", "25.00", "0.00") and shown[2] == ("class 1", "-", "2.00")
    assert len(shown) == 1 + MOST_CLASSES + 1 and shown[-1][0].startswith("30 more classes")
    compared = rows(comparison(METRICS["accuracy"], scores["test"], scores["test"], "mean"))
    assert [row[0] for row in compared] == ["mean over the chain (default readout)"]


def test_a_dit_draws_classes_by_name(base):
    dit = {"arch": "dit", "depth": 2, "dim": 16, "heads": 2, "patch": 4}
    run = merged_run({**base, "model": dit, "noise": {}})
    said = CliRunner().invoke(app, ["sample", str(run.url), "--count", "4", "--steps", "2"])
    assert said.exit_code == 0, said.output
    assert "classes in turn: [cat], dog, eel" in said.output
