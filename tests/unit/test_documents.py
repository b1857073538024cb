"""Every command line in the documents is one that dbtrain takes, commands.md has them all, and links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown.extensions.toc import slugify

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.config.shipped import shipped
from tests.conftest import ROOT

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.yaml"))]
FACE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")]
PAGES = [*FACE, *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(dbtrain [^`]+)`")
OF_CONFIG = re.compile(r"^# Command: +(.*?)(?: {3,}.*)?$", re.MULTILINE)
COMMAND = re.compile(r"(?<![\w/-])(?:\.venv/bin/)?dbtrain +([a-z][^\n;&|']*)")
COMPLETE = ("version", "doctor")
"""Commands that need no argument."""
RUNNING = typer.main.get_command(cli.app)


def commands(path: Path) -> list[list[str]]:
    """Arguments of the command lines of a document; prose in backquotes that has only a command's name is left out."""
    text = path.read_text()
    if path.suffix == ".yaml":
        lines = [line for found in OF_CONFIG.findall(text) for line in found.split("&&")]
    else:
        blocks = [block.replace("\\\n", " ") for block in FENCED.findall(text)]
        lines = [line for block in blocks for line in block.splitlines()] + [
            line.replace("\n", " ") for line in INLINE.findall(text)
        ]
    lines = [line for line in lines if not line.startswith("docker run")]  # there it is the image's name
    found = [shlex.split(each, comments=True) for line in lines for each in COMMAND.findall(line)]
    return [words for words in found if words not in ([words[0]], ["launch", "slurm"]) or words[0] in COMPLETE]


def all_commands(command: Any, name: str = "") -> list[str]:
    if not hasattr(command, "commands"):
        return [name.strip()]
    return [each for key, part in command.commands.items() for each in all_commands(part, f"{name} {key}")]


def accept(arguments: list[str]) -> Any:
    """Parse as the command line does, and run nothing."""
    command: Any = RUNNING
    rest = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command.make_context(command.name, rest).params


ALL = [(path.name, shlex.join(arguments)) for path in FILES for arguments in commands(path)]


@pytest.mark.parametrize(("name", "line"), ALL, ids=[f"{name}: {line}"[:60] for name, line in ALL])
def test_a_command_of_a_document_is_one(name: str, line: str) -> None:
    """Command, options and arguments; and where it names a shipped configuration, that takes the overrides."""
    told = accept(shlex.split(line))
    config = Path(told.get("config") or told.get("target") or ".")
    if config.parts[:1] == ("configs",) or str(config) in shipped():
        load_config(config if str(config) in shipped() else ROOT / config, told["overrides"] or [])


def test_there_is_a_line_of_every_command() -> None:
    shown = {" ".join(arguments) for arguments in commands(ROOT / "docs" / "commands.md")}
    missing = [name for name in all_commands(RUNNING) if not any(f"{line} ".startswith(f"{name} ") for line in shown)]
    assert not missing


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What a link may name behind `#`, as the site and GitHub make it of headings."""
    return {slugify(heading.replace("`", ""), "-") for heading in HEADING.findall(prose(path))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_a_file_and_a_heading_that_are_there(path: Path) -> None:
    wrong = []
    for link in LINK.findall(prose(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        found = "://" in link or target.exists() and (not anchor or anchor in anchors(target))
        wrong += [] if found else [link]
    assert wrong == []


def test_what_a_link_may_name_is_read_from_headings_alone() -> None:
    assert {"goodput-what-failures-cost-at-scale", "not-measured"} <= anchors(ROOT / "docs" / "benchmarks.md")
    assert "room-one" not in anchors(ROOT / "docs" / "places.md")  # a comment in a block of code


UNWRAPPED = {"CHANGELOG.md", "concepts.md", "keys.md", "log.md"}
"""Documents from before there was the rule, and one that is made; take one out once its prose is wrapped."""


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in UNWRAPPED], ids=lambda p: p.name)
def test_prose_has_lines_of_at_most_110_characters(path: Path) -> None:
    lines = [line for line in prose(path).splitlines() if not line.startswith(("|", "![", "#"))]
    assert [line for line in lines if len(line) > 110] == []


CALLS = re.compile(r"\bdbtrain\.(\w+)\(")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_documents_call_in_python_is_there(path: Path) -> None:
    import dbtrain

    assert set(CALLS.findall(path.read_text())) <= set(dbtrain.__all__)


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("line", ["train configs/a.yaml --adress auto", "status", "sample runs/a --solver rk4"])
def test_a_wrong_line_would_be_found(line: str) -> None:
    with pytest.raises(Exception, match=r"--adress|Missing|rk4"):
        accept(line.split())


def test_lines_are_found_in_all_kinds_of_documents() -> None:
    lines = {line for _, line in ALL}
    assert len(ALL) > 40 and {"version", "doctor", "train configs/ar_tiny.yaml", "compare vit_digits"} <= lines
    assert "train configs/vit_digits.yaml out=/shared/runs --address auto" in lines  # after a backslash
    assert "train CONFIG out=/shared/runs --address HEAD:6379" in lines  # in quotes, for ssh


NAMED = re.compile(r"`{1,2}((?:\w+/)+\w+\.(?:py|yaml|sh|md|toml))`{1,2}")
MAPS = [path for path in PAGES if path.name not in ("log.md", "CHANGELOG.md")]


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.name)
def test_the_files_that_a_document_names_are_there(path: Path) -> None:
    """From the root, or from the package; docs/log.md tells of files as they were."""
    named = set(NAMED.findall(path.read_text()))
    assert [name for name in sorted(named) if not any((at / name).exists() for at in (ROOT, ROOT / "dbtrain"))] == []


def test_the_map_of_a_death_names_files_that_are_there() -> None:
    import dbtrain.coordinator

    named = re.findall(r"``([\w/]+\.py)``", dbtrain.coordinator.__doc__ or "")
    rooms = (ROOT / "dbtrain" / "coordinator", ROOT / "dbtrain")
    assert len(named) > 8 and [name for name in named if not any((room / name).exists() for room in rooms)] == []
