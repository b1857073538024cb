"""The network, configuration and commands of docs/own-network.md, as they stand there."""

import re
import shlex
from pathlib import Path

from tests.conftest import ROOT

DOCUMENT = ROOT / "docs" / "own-network.md"


def fenced(language: str, holding: str = "") -> str:
    """The one block of code in this language that holds a text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if holding in block]
    assert len(found) == 1
    return str(found[0])


def write_files(folder: Path) -> None:
    """Network and configuration under the names that the document gives them."""
    (folder / "my_net.py").write_text(fenced("python"))
    (folder / "my_net.yaml").write_text(fenced("yaml"))


def command_lines() -> list[list[str]]:
    """Arguments of its commands, in order."""
    return [shlex.split(line.removeprefix("dbtrain ")) for line in fenced("sh").splitlines()]
