import ast
from pathlib import Path

import pytest

import dbtrain

ROOT = Path(dbtrain.__file__).parent
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
READERS = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"}
METHODS = {"load_checkpoint", "save_checkpoint", "load_state", "save_state"}
"""Of DeepSpeed's engine and of Accelerate, which pickle."""


def offences(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in PICKLERS)
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                yield from (f"torch.{a.name}" for a in node.names if f"torch.{a.name}" in READERS)
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in READERS or node.attr in METHODS):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import cloudpickle.x as y",
        "engine.load_checkpoint('x')",
    ],
)
def test_the_search_finds_them(source):
    assert list(offences(source))


def test_no_module_reads_or_writes_pickles():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 10
    found = {str(file.relative_to(ROOT)): list(offences(file.read_text())) for file in files}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_safetensors_stays_in_this_room():
    outside = [f for f in ROOT.rglob("*.py") if f.parent.name != "shards"]
    users = [
        str(file.relative_to(ROOT))
        for file in outside
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safetensors"))
        or (isinstance(node, ast.Import) and any(a.name.startswith("safetensors") for a in node.names))
    ]
    assert outside and users == []
