"""Rules of the code base that a linter does not know."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import dbtrain

PACKAGE = Path(dbtrain.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def functions():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_the_rules_look_at_the_whole_package():
    assert len(MODULES) > 50 and len(list(functions())) > 200


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in MODULES if drawers & set(path.relative_to(PACKAGE).with_suffix("").parts)]


def test_no_function_is_longer_than_60_lines():
    assert not [(where, lines) for where, lines in functions() if lines > 60]


def test_functions_are_short():
    assert statistics.median(lines for _, lines in functions()) <= 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_is_read(path):
    names = set(imported(TREES[path]))
    assert not {name.split(".")[0] for name in names} & PICKLES
    assert not names & {"torch.load", "torch.save", "numpy.load"}
    loads = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute)
        and node.attr in ("load", "save")
        and isinstance(node.value, ast.Name)
        and node.value.id in ("torch", "np", "numpy")
    ]
    assert not loads, f"torch.load, torch.save or numpy.load in lines {loads}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_architecture_is_asked_for_by_name(path):
    """Different in kind is a class behind the plug, never ``if arch ==``."""
    asked = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Compare)
        and any(isinstance(side, ast.Attribute) and side.attr == "arch" for side in (node.left, *node.comparators))
    ]
    assert not asked


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_words_are_those_of_the_field(path):
    """Words that readers stumbled over."""
    assert not re.search(r"\b(mend|mends|mended)\b", path.read_text(), re.IGNORECASE)


def test_tests_of_clusters_and_faults_lie_where_make_test_looks_for_them():
    root = Path(__file__).parents[2]
    places = re.search(r"^SLOW := ([^#\n]+)", (root / "Makefile").read_text(), re.MULTILINE)[1].split()
    mark = re.compile(r"pytest\.mark\.(cluster|fault)\b")
    marked = [str(path.relative_to(root)) for path in (root / "tests").rglob("*.py") if mark.search(path.read_text())]
    assert len(marked) > 20 and [path for path in marked if not path.startswith(tuple(places))] == []
