"""What `dbtrain launch` refuses and shows; a real Slurm runs it in tests/cluster/test_slurm.py."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from dbtrain.errors import ConfigError, PlacementError
from dbtrain.launch.slurm import SCRIPT, sbatch_command, submit
from tests.conftest import ROOT

DIGITS = ROOT / "configs" / "vit_digits.yaml"
SHELL = sorted([*(ROOT / "launchers").rglob("*.s*"), *(ROOT / "docker").glob("*.sh"), *(ROOT / "scripts").glob("*.sh")])


def test_options_reach_sbatch_and_the_rest_the_run() -> None:
    command = sbatch_command({"nodes": 4, "time": "8:00:00", "account": None}, DIGITS, ["blocks=2"])
    assert command == ["sbatch", "--nodes=4", "--time=8:00:00", str(SCRIPT), str(DIGITS), "blocks=2"]


def test_a_dry_run_is_the_job(tmp_path: Path) -> None:
    """Saved and submitted without a command line it asks for the same nodes, and trains the same."""
    options = {"nodes": 4, "cpus-per-task": 8, "time": None}
    shown = submit(options, DIGITS, ["out=/shared/my runs", "blocks=2"], 1, dry_run=True)
    asked = [line for line in shown.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=4" in asked and "#SBATCH --cpus-per-task=8" in asked
    assert sum("--nodes=" in line or "--cpus-per-task=" in line for line in asked) == 2
    assert shown.startswith("#!/bin/bash\n#SBATCH")
    told, rest = shown.split("\nset -uo pipefail\n")
    assert rest == SCRIPT.read_text().split("\nset -uo pipefail\n")[1]
    show = 'printf "%s\\n" "$DBTRAIN_STORAGE" "$DBTRAIN_GPUS" "$@"'
    done = subprocess.run(["bash", "-c", f"{told}\n{show}"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["/shared/my runs", "1", str(DIGITS), "out=/shared/my runs", "blocks=2"]


@pytest.mark.parametrize(("gpus", "more", "cpus"), [(4, [], 4), (4, ["cluster.cpus_per_worker=3"], 12), (1, [], 2)])
def test_every_gpu_has_a_cpu_or_those_that_its_worker_asks_for(gpus: int, more: list[str], cpus: int) -> None:
    assert f"#SBATCH --cpus-per-task={cpus}\n" in submit({"cpus-per-task": None}, DIGITS, more, gpus, dry_run=True)


def test_mistakes_are_told_before_anything_waits_in_a_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean model.depth"):
        submit({}, DIGITS, ["model.dpeth=3"], None, dry_run=False)
    with pytest.raises(ConfigError, match="the job starts a cluster of its own"):
        submit({}, DIGITS, ["cluster.address=auto"], None, dry_run=False)
    with pytest.raises(ConfigError, match="adds up to 5"):
        submit({}, DIGITS, ["layers_per_block=[1,2,2]"], None, dry_run=True)
    with pytest.raises(ConfigError, match="a worker computes on one GPU"):
        submit({}, DIGITS, ["cluster.gpus_per_worker=4"], None, dry_run=True)
    with pytest.raises(ConfigError, match="holds no spaces or line breaks"):
        submit({"partition": "a\nb"}, DIGITS, [], None, dry_run=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlacementError, match="sbatch is not on the PATH"):
        submit({}, DIGITS, [], None, dry_run=False)


def test_what_sbatch_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PlacementError, match="sbatch refused: sbatch: error: invalid partition"):
        submit({"partition": "nope"}, DIGITS, [], None, dry_run=False)


@pytest.mark.parametrize(
    ("variables", "arguments", "storage"),
    [
        ({}, "CONFIG blocks=2", "runs"),
        ({}, "CONFIG 'out=/shared/my runs' blocks=2", "/shared/my runs"),
        ({"DBTRAIN_STORAGE": "/of/the/file"}, "CONFIG name=out", "/of/the/file"),
        ({"DBTRAIN_STORAGE": "/of/the/file"}, "CONFIG out=a out=s3://b/c", "s3://b/c"),
    ],
)
def test_the_preflight_of_a_job_looks_where_the_run_will_lie(
    variables: dict[str, str], arguments: str, storage: str
) -> None:
    found = re.search(r"^storage\(\) \{\n.*?^\}$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert found and '--storage "$(storage "$@")"' in SCRIPT.read_text()
    command = ["bash", "-uc", f"{found[0]}\nstorage {arguments}"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{storage}\n", "")


def test_the_launcher_is_the_packages_script() -> None:
    assert (ROOT / "launchers" / "slurm" / "dbtrain.sbatch").resolve() == SCRIPT.resolve()


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


def test_there_are_shell_scripts() -> None:
    assert {"dbtrain.sbatch", "cluster.sh", "node.sh", "install.sh"} <= {path.name for path in SHELL}
