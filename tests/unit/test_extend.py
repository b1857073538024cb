"""What docs/extend.md adds works as it stands there: a data source in a copy of the package, and a metric."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import dbtrain
from dbtrain.evaluation.metrics import METRICS
from tests.conftest import ROOT
from tests.unit.small_runs import commit, settled

CODE = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "extend.md").read_text(), re.MULTILINE | re.DOTALL)

PROGRAM = """
from dbtrain.config import load_config
from dbtrain.config.reference import groups
from dbtrain.data.registry import load
config = load_config("vit_digits", ["data={source: stripes, count: 50}"])
data = load("stripes", {k: v for k, v in config.data.model_dump().items() if k != "source"})
print(len(data.train), len(data.validation), len(data.test), data.class_names, data.train.labels[:4].tolist())
print(any("stripes" in group.title + group.about for group in groups("data")))
"""


def block(name: str) -> str:
    (found,) = [code for code in CODE if code.startswith(f"# {name}\n")]
    return found.partition("\n")[2]


def insert(path, before: str, text: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1
    path.write_text(content.replace(before, text + before))


def test_the_data_source_of_the_document_is_one(tmp_path):
    for name in ("dbtrain", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "dbtrain"
    (package / "data" / "stripes.py").write_text(block("dbtrain/data/stripes.py"))
    insert(package / "config" / "data.py", "DataConfig = Annotated[", block("config/data.py") + "\n\n")
    insert(package / "config" / "data.py", "    | PythonTopicsConfig", "    | StripesConfig\n")
    insert(package / "data" / "registry.py", '    "latents": latents,', "    " + block("data/registry.py"))
    insert(package / "data" / "registry.py", "from dbtrain.data.splits", "from dbtrain.data.stripes import stripes\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["36 4 10 ('standing', 'lying') [0, 0, 1, 1]", "True"], done.stderr


def test_the_metric_of_the_document_is_one(tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "top_two", None)  # taken back after the test
    (code,) = [each for each in CODE if "METRICS[" in each]
    exec(code, {})
    run = settled(tmp_path)
    commit(run)
    dbtrain.merge(run.url)
    one = dbtrain.evaluate(run.url, ["evaluation.metric=accuracy"]).scores["test"]["chain"]
    two = dbtrain.evaluate(run.url, ["evaluation.metric=top_two"]).scores["test"]["top_two"]
    assert two > one or two == pytest.approx(1.0)
