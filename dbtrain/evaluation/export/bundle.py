"""One Python file that holds some definitions of this package and all that they use.

Definitions are copied as they are written, module by module, so that the code without the package is the same
as with it. Methods that only training or the configuration calls are left out.
"""

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

PACKAGE = "dbtrain"
STAND_INS = "dbtrain.evaluation.export.stand_ins"
LEFT_OUT = frozenset({
    # of architectures
    "check", "loss", "predict_loss", "compile_parts",
    # of networks of other libraries
    "settled", "from_file", "unread",
    # of noise processes
    "plan", "split", "in_other_terms", "weight", "draw_uniforms", "corrupt",
    # of ranges
    "widened", "trained_at",
})  # fmt: skip
"""Methods that only training or the configuration calls."""
LEFT_OUT_ATTRIBUTES = frozenset({"cross_entropy"})
"""Attributes of `self` that only those methods read."""

Definition = tuple[str, str]
"""(module, name)."""


@dataclass
class Source:
    """A module of the package: what it defines and what it imports, by name."""

    lines: list[str]
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    inside: dict[str, Definition] = field(default_factory=dict)
    """Names imported from the package, with the definition that each stands for."""
    outside: dict[str, str] = field(default_factory=dict)
    """Names imported from elsewhere, with the import statement of each."""
    removed: set[int] = field(default_factory=set)
    """Numbers of lines that are left out, from 1."""


def bundle(roots: Sequence[Definition], title: str, end: str) -> str:
    """The text of the file.

    Args:
        roots: definitions that it must have.
        title: its docstring.
        end: code after all definitions, which may use the roots and the imports that it brings.

    Raises:
        ValueError: a name is defined or imported twice, or a form of import is not understood.
    """
    needed = _needed(roots)
    parts = [f'"""{title}"""\n\nfrom __future__ import annotations\n', *_imports(needed)]
    for module in _in_order(needed):
        source = _source(module)
        names = sorted((name for of, name in needed if of == module), key=lambda n: source.definitions[n][0].lineno)
        if names:
            # several names may be assigned by one statement
            texts = dict.fromkeys(_text(source, name) for name in names)
            parts += [f"# From {module.replace('.', '/')}.py", *texts]
    return _joined([*parts, end])


def _joined(parts: Sequence[str]) -> str:
    """Parts with as many blank lines between them as PEP 8 has."""
    text = parts[0]
    for before, part in zip(parts, parts[1:], strict=False):
        wide = any(block.lstrip().startswith(("class ", "def ", "@", "# From")) for block in (before, part))
        text += ("\n\n\n" if wide else "\n") + part
    return text


def _needed(roots: Sequence[Definition]) -> dict[Definition, set[str]]:
    """All definitions, each with the import statements that it needs."""
    needed: dict[Definition, set[str]] = {}
    waiting = [_origin(*root) for root in roots]
    while waiting:
        definition = waiting.pop()
        if definition in needed:
            continue
        source, imports = _source(definition[0]), set()
        for name in _names(source.definitions[definition[1]]):
            if name in source.outside:
                imports.add(source.outside[name])
            elif name in source.definitions or name in source.inside:
                waiting.append(_origin(definition[0], name))
        needed[definition] = imports
    _refuse_clashes(needed)
    return needed


def _origin(module: str, name: str) -> Definition:
    """Where a name is defined, through any modules that import it; a stand-in comes first."""
    if name in _source(STAND_INS).definitions:
        return STAND_INS, name
    source = _source(module)
    if name in source.definitions:
        return module, name
    if name not in source.inside:
        _refuse(f"{module} has no {name}")
    return _origin(*source.inside[name])


def _refuse_clashes(needed: dict[Definition, set[str]]) -> None:
    by_name: dict[str, str] = {}
    for module, name in needed:
        if by_name.setdefault(name, module) != module:
            _refuse(f"{name} is defined by {by_name[name]} and by {module}")
    for statement in {s for imports in needed.values() for s in imports}:
        name = statement.split()[-1].split(".")[0]
        if by_name.setdefault(name, statement) != statement:
            _refuse(f"{name} is {by_name[name]} and {statement}")


def _imports(needed: dict[Definition, set[str]]) -> list[str]:
    """Statements of all names, one for each module."""
    statements = sorted({statement for imports in needed.values() for statement in imports})
    modules: dict[str, list[str]] = {}
    for statement in statements:
        head, _, name = statement.rpartition(" import ")
        modules.setdefault(head or statement, []).append(name if head else "")
    return [f"{head} import {', '.join(names)}" if any(names) else head for head, names in sorted(modules.items())]


def _in_order(needed: dict[Definition, set[str]]) -> list[str]:
    """The modules, each after those that it imports."""
    wanted, ordered = {module for module, _ in needed}, list[str]()

    def visit(module: str, seen: tuple[str, ...] = ()) -> None:
        if module in ordered or module in seen:
            return
        for imported, _ in sorted(_source(module).inside.values()):
            visit(imported, (*seen, module))
        ordered.append(module)

    for module in (STAND_INS, *sorted(wanted)):
        visit(module)
    return [module for module in ordered if module in wanted]


def _names(statements: Sequence[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        yield from (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))


def _text(source: Source, name: str) -> str:
    """A definition as it is written, with the comments above it, without what is left out."""
    statements = source.definitions[name]
    first, last = _first_line(source, statements[0]), statements[-1].end_lineno or 0
    return "\n".join(source.lines[n - 1] for n in range(first, last + 1) if n not in source.removed)


def _first_line(source: Source, node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    while first > 1 and source.lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first


@lru_cache
def _source(module: str) -> Source:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        _refuse(f"{module} has no source")
    text = Path(spec.origin).read_text(encoding="utf-8")
    source, tree = Source(text.splitlines()), ast.parse(text)
    for place, statement in enumerate(tree.body):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            _read_import(source, statement)
            continue
        if isinstance(statement, ast.ClassDef):
            _leave_out(source, statement)
        following = tree.body[place + 1] if place + 1 < len(tree.body) else None
        for name in _bound(statement):
            source.definitions[name] = [statement, *([following] if _is_text(following) and following else [])]
    return source


def _bound(statement: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = [part for t in statement.targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_text(statement: ast.stmt | None) -> bool:
    """Whether a statement is a bare string: the docstring of the assignment above it."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _read_import(source: Source, statement: ast.Import | ast.ImportFrom) -> None:
    for alias in statement.names:
        name = alias.asname or alias.name.split(".")[0]
        written = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
        if isinstance(statement, ast.Import):
            source.outside[name] = f"import {written}"
        elif (statement.module or "").split(".")[0] != PACKAGE and not statement.level:
            source.outside[name] = f"from {statement.module} import {written}"
        elif not alias.asname and not statement.level:
            source.inside[name] = str(statement.module), alias.name
        else:
            _refuse(f"line {statement.lineno}: {ast.unparse(statement)} renames what is in the package")


def _leave_out(source: Source, kind: ast.ClassDef) -> None:
    """Take methods and attributes out of a class, and their lines out of its text."""
    for method in [node for node in kind.body if isinstance(node, ast.FunctionDef)]:
        if method.name in LEFT_OUT:
            kind.body.remove(method)
            _remove(source, _first_line(source, method), method.end_lineno or 0)
            continue
        for statement in [node for node in method.body if _sets_left_out(node)]:
            method.body.remove(statement)
            _remove(source, statement.lineno, statement.end_lineno or 0)


def _sets_left_out(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
        return False
    return node.targets[0].attr in LEFT_OUT_ATTRIBUTES


def _remove(source: Source, first: int, last: int) -> None:
    """Lines of a definition, and the blank ones above it."""
    while not source.lines[first - 2].strip():
        first -= 1
    source.removed.update(range(first, last + 1))


def _refuse(problem: str) -> NoReturn:
    raise ValueError(f"the source of {PACKAGE} cannot be bundled: {problem}")
