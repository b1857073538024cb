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
ROOT = PACKAGE.parent
STUMBLES = re.compile(
    r"\b(mend|mends|mended|whilst|amongst|thereof|therein|hereby|wherein|aforementioned|utili[sz]e[sd]?|leverag\w+"
    r"|seamless\w*|state-of-the-art|cutting-edge)\b",
    re.IGNORECASE,
)
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
def test_words_are_plain(path):
    """Words that readers stumbled over."""
    assert STUMBLES.findall(path.read_text()) == []


DOCUMENTS = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.name != "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_words_of_documents_are_plain(path):
    """CONTRIBUTING names such a word as one to leave."""
    assert STUMBLES.findall(path.read_text()) == []


PREPOSITIONS = re.compile(
    r"(after|at|before|behind|below|beside|between|by|for|from|in|into|of|on|since|through|to|under|until|with|within"
    r"|without)\b",
    re.IGNORECASE,
)


def docstrings(tree):
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield f"{statement.lineno}: {value.value.strip()}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_docstring_does_not_begin_in_the_middle_of_a_sentence(path):
    """Of what? "Hash of the file", not "Of the file"."""
    assert [each for each in docstrings(TREES[path]) if PREPOSITIONS.match(each.partition(": ")[2])] == []


def test_tests_of_clusters_and_faults_lie_where_make_test_looks_for_them():
    root = Path(__file__).parents[2]
    places = re.search(r"^SLOW := ([^#\n]+)", (root / "Makefile").read_text(), re.MULTILINE)[1].split()
    mark = re.compile(r"pytest\.mark\.(cluster|fault)\b")
    marked = [str(path.relative_to(root)) for path in (root / "tests").rglob("*.py") if mark.search(path.read_text())]
    assert len(marked) > 20 and [path for path in marked if not path.startswith(tuple(places))] == []
