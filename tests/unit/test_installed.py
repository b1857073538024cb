"""dbtrain as it is installed from a wheel, away from its repository; and the configurations that come with it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.config.shipped import about, located, shipped
from dbtrain.launch.slurm import sbatch_command
from tests.conftest import ROOT

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the content of a wheel, made from a copy of the sources."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("dbtrain", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(made), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = made.glob("dbtrain-*.whl")
    zipfile.ZipFile(wheel).extractall(made)
    return made


PROGRAM = """
import dbtrain, dbtrain.cli, dbtrain.config
print(dbtrain.__file__, dbtrain.config.load_config("vit_digits").blocks, flush=True)
dbtrain.cli.app(["configs", "--to", "mine"])
"""


def test_a_wheel_is_whole_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    sources = {path.relative_to(ROOT) for path in (ROOT / "dbtrain").rglob("*.py")}
    assert [path for path in sorted(sources) if not (installed / path).exists()] == []
    assert (installed / "dbtrain/py.typed").exists() and (installed / "dbtrain/launch/slurm.sbatch").exists()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = [f"{installed / 'dbtrain/__init__.py'} 3", f"{len(shipped())} configurations are in mine/"]
    assert done.stdout.splitlines() == said, done.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir()} == {
        p.name: p.read_bytes() for p in (ROOT / "configs").glob("*.yaml")
    }


def test_a_shipped_configuration_is_found_by_name_but_a_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("vit_digits") == load_config(ROOT / "configs/vit_digits.yaml")
    assert sbatch_command({}, Path("vit_digits"), [])[-1] == str(ROOT / "configs/vit_digits.yaml")
    Path("vit_digits").write_text("name: other\n")
    assert located("vit_digits") == Path("vit_digits") and located("mine/dit_digits") == Path("mine/dit_digits")


def test_each_shipped_configuration_says_what_it_trains() -> None:
    assert len(shipped()) > 10
    said = CliRunner().invoke(cli.app, ["configs"]).output
    for name, path in shipped().items():
        assert name in said and len(about(path)) > 40 and "Command" not in about(path)


def test_copies_do_not_overwrite_what_was_changed(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert CliRunner().invoke(cli.app, ["configs", "--to", str(folder)]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["configs", "--to", str(folder)]).exit_code == 0
    (folder / "vit_digits.yaml").write_text("name: mine\n")
    again = CliRunner().invoke(cli.app, ["configs", "--to", str(folder)])
    assert again.exit_code == 2 and "vit_digits.yaml is there already" in again.output.replace("\n", " ")
    assert (folder / "vit_digits.yaml").read_text() == "name: mine\n"
    blocked = CliRunner().invoke(cli.app, ["configs", "--to", str(folder / "vit_digits.yaml" / "in")])
    assert blocked.exit_code == 2 and "--to" in blocked.output
