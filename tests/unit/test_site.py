"""The site is built whole: every page is in its navigation, and no link or reference leads nowhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PUBLIC = ("load_config", "prepare", "train", "status", "merge", "evaluate", "load_merged", "predict")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder / "site")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "dbtrain", tmp_path / "dbtrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def test_the_site_is_built_and_a_wrong_link_would_be_found(copy: Path) -> None:
    built = build(copy)
    assert built.returncode == 0, built.stderr
    api = (copy / "site" / "api" / "index.html").read_text()
    assert [name for name in PUBLIC if f'id="dbtrain.api.{name}"' not in api] == []
    (copy / "docs" / "api.md").unlink()  # the page that takes long; others link to it
    broken = build(copy)
    assert broken.returncode == 1 and "api.md" in broken.stderr
