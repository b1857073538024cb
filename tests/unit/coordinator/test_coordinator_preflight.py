"""What preflight and doctor say of machines and clusters that would not work."""

import os
import re
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dbtrain.coordinator import probe
from dbtrain.coordinator.preflight import check_packages
from dbtrain.coordinator.ray.address import connect
from dbtrain.coordinator.ray.settings import SETTINGS
from dbtrain.coordinator.ray.shipping import JOB, refuse_lost_output, runtime_env
from dbtrain.doctor import checks as examine
from dbtrain.doctor.checks import Finding, examine_cluster
from dbtrain.doctor.report import doctor, examine_machine
from dbtrain.errors import ConfigError, PlacementError, PreflightError, VersionError
from tests.conftest import ROOT


class Nodes:
    """Two nodes in this process; `changes` says what the second one answers instead."""

    def __init__(self, port: int, gpus: float = 0, **changes: Any) -> None:
        self.port, self.gpus, self.changes = port, gpus, changes

    def addresses(self) -> dict[str, tuple[str, int, float]]:
        return {"one": ("127.0.0.1", self.port, self.gpus), "two": ("127.0.0.1", self.port, 0)}

    def on_every_node(self, function: Any, *arguments: Any) -> dict[str, Any]:
        answer = {name: function(*arguments) for name in ("one", "two")}
        if function.__name__ in self.changes:
            changed = self.changes[function.__name__]
            answer["two"] = changed(answer["two"]) if callable(changed) else changed
        return answer


@pytest.fixture
def port() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def found(cluster: Nodes, folder: Path, nodes: int | None = None, gpus: int | None = None) -> dict[str, Finding]:
    """What is not fine."""
    return {f.what: f for f in examine_cluster(cluster, str(folder), nodes, gpus) if f.level != "ok"}


def test_a_sound_cluster(port: int, tmp_path: Path) -> None:
    assert found(Nodes(port), tmp_path, nodes=2, gpus=0) == {}
    assert list(tmp_path.iterdir()) == []  # nothing of the examination stays


def other_versions(fact: dict[str, Any]) -> dict[str, Any]:
    return {**fact, "versions": {**fact["versions"], "torch": "2.11.0", "deepspeed": "missing"}}


def test_another_version_is_refused_by_name(port: int, tmp_path: Path) -> None:
    cluster = Nodes(port, facts=other_versions)
    here = probe.versions()
    expected = f"two has torch 2.11.0, not {here['torch']}, deepspeed missing, not {here['deepspeed']}"
    assert found(cluster, tmp_path)["versions"].detail == expected
    with pytest.raises(VersionError, match="two has torch 2.11.0"):
        check_packages(cluster, "digits")


def test_a_node_without_a_package_that_workers_import_is_refused_by_name(port: int, tmp_path: Path) -> None:
    """Of any version, so it is not among those that are compared."""
    bare = Nodes(port, facts=lambda fact: {**fact, "absent": ["omegaconf"]})
    finding = found(bare, tmp_path)["packages"]
    assert (finding.level, finding.detail, finding.fix) == (
        "bad", "two: omegaconf missing", "pip install omegaconf",
    )  # fmt: skip
    with pytest.raises(VersionError, match="two lacks omegaconf: install it there"):
        check_packages(bare, "text")


@pytest.mark.parametrize(
    ("package", "sources"),
    [("scikit-learn", ["digits"]), ("pillow", ["images", "hf"]), ("datasets", ["hf", "hf_text"])],
)
def test_a_package_that_a_source_needs_is_asked_for_by_that_source(
    port: int, tmp_path: Path, package: str, sources: list[str]
) -> None:
    plain = Nodes(port, facts=lambda fact: {**fact, "absent": [package]})
    told = found(plain, tmp_path)["packages"]
    assert told.level == "warn" and all(f"data.source={source}" in told.fix for source in sources)
    check_packages(plain, "text")
    for source in sources:
        with pytest.raises(VersionError, match=f"two lacks {package}"):
            check_packages(plain, source)


@pytest.mark.parametrize(("package", "arch"), [("transformers", "hf_llama"), ("diffusers", "hf_wan")])
def test_a_package_that_an_architecture_needs_is_asked_for_by_that_architecture(
    port: int, tmp_path: Path, package: str, arch: str
) -> None:
    plain = Nodes(port, facts=lambda fact: {**fact, "absent": [package]})
    told = found(plain, tmp_path)["packages"]
    assert told.level == "warn" and f"model.arch={arch}" in told.fix
    check_packages(plain, "text", "vit")
    with pytest.raises(VersionError, match=f"two lacks {package}"):
        check_packages(plain, "text", arch)


def test_whatever_a_worker_imports_is_asked_for() -> None:
    """Of what this package declares; some come with others: psutil with DeepSpeed, annotated-types with pydantic."""
    code = "import sys, dbtrain.coordinator.ray.attempt, dbtrain.coordinator.ray.signals, dbtrain.training.entry"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", f"{code}; print(*(name for name in sys.modules if '.' not in name))"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    packages = metadata.packages_distributions()
    imported = {package for module in shown.stdout.split() for package in packages.get(module, [])}
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    needed = imported & set(re.findall(r'^  "([a-z-]+)', declared, re.MULTILINE))
    asked = {*probe.DECISIVE, *probe.PRESENT}
    assert {"torch", "omegaconf"} <= needed and needed - {"psutil", "annotated-types"} <= asked


def test_a_silent_node_is_not_told_to_install_versions(port: int, tmp_path: Path) -> None:
    silent = Nodes(port, facts=RuntimeError("broken"))
    with pytest.raises(PlacementError, match="^two does not answer .RuntimeError: broken.: see in its logs") as caught:
        check_packages(silent, "digits")
    assert "versions" not in str(caught.value)
    findings = found(silent, tmp_path)
    assert "two does not answer" in findings["answers"].detail and "versions" not in findings


def test_plans_that_do_not_hold(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "JOIN_S", 0.1)
    findings = found(Nodes(port), tmp_path, nodes=3, gpus=1)
    assert "planned 3" in findings["nodes"].detail
    assert "planned 1" in findings["GPUs"].detail
    assert "nvidia-smi does not see them" in found(Nodes(port, gpus=8), tmp_path)["GPUs"].fix


def test_storage_that_is_not_shared(port: int, tmp_path: Path) -> None:
    """The second node's folder of that name is its own: it reads nothing, or writes where nobody sees it."""
    unseen = Nodes(port, read_mark={"error": "no such file"})
    assert found(unseen, tmp_path)["storage"].detail == "two: no such file"
    elsewhere = Nodes(port, echo_mark={"name": ".preflight-elsewhere"})
    assert "does not see" in found(elsewhere, tmp_path)["storage"].detail
    stale = Nodes(port, read_mark={"content": "of yesterday"})
    assert "reads something else" in found(stale, tmp_path)["storage"].detail


def test_clocks_and_ports(port: int, tmp_path: Path) -> None:
    assert found(Nodes(port, clock=time.time() - 60), tmp_path)["clocks"].level == "bad"
    assert found(Nodes(port, clock=time.time() + 5), tmp_path)["clocks"].level == "warn"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, and nobody listens
        findings = found(Nodes(bound.getsockname()[1]), tmp_path)
    assert (findings["ports"].level, "refused" in findings["ports"].detail) == ("warn", True)


def test_a_node_that_lacks_things(port: int, tmp_path: Path) -> None:
    poor = {"compiler": None, "shared_memory": 2**20, "temporary": {"path": "/small", "free": 2**20}}
    findings = found(Nodes(port, facts=lambda fact: {**fact, **poor}), tmp_path)
    assert {what: finding.level for what, finding in findings.items()} == {
        "compiler": "warn",
        "shared memory": "bad",
        "temporary files": "bad",
    }


def test_doctor_on_this_machine(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    doctor(None, str(tmp_path / "runs"), None, None, console)
    assert "a run would work here" in console.export_text()
    assert list((tmp_path / "runs").iterdir()) == []


def test_doctor_doubts_a_storage_whose_parent_it_had_to_make(tmp_path: Path) -> None:
    def doubts(place: Path) -> list[str]:
        return [f.detail for f in examine_machine(str(place)) if f.what == "storage" and f.level == "warn"]

    assert doubts(tmp_path / "runs") == []
    assert doubts(tmp_path / "unmounted" / "runs") == [f"{tmp_path}/unmounted did not exist and was made to try it"]


def test_doctor_refuses_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"1 thing\(s\) would not work: storage"):
        doctor(None, str(tmp_path / "file" / "runs"), None, None, Console(quiet=True))


def test_doctor_names_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DECISIVE", ("torch", "no-such-package"))
    wrong = [f for f in examine_machine(str(tmp_path)) if f.level == "bad"]
    assert [(f.what, f.fix) for f in wrong] == [("versions", "pip install no-such-package")]


def test_doctor_only_warns_of_what_no_run_of_this_machine_may_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {**probe.facts(), "absent": ["datasets", "diffusers"]}
    monkeypatch.setattr(probe, "facts", lambda: facts)
    [found] = [f for f in examine_machine(str(tmp_path)) if f.what == "packages"]
    assert (found.level, found.detail) == ("warn", "datasets, diffusers missing")
    assert found.fix.endswith("needs it: pip install datasets diffusers") and "model.arch=hf_wan" in found.fix
    doctor(None, str(tmp_path), None, None, Console(quiet=True))


def test_an_address_where_nothing_listens(port: int) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(PlacementError, match="nothing answers at cluster.address=127.0.0.1:"):
            connect(f"127.0.0.1:{bound.getsockname()[1]}")
    for address in ("somewhere", "ray://head", ":6379", "head:port"):
        with pytest.raises(ConfigError, match="write auto, host:port"):
            connect(address)


def test_code_goes_to_a_cluster_and_not_to_an_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "py_modules" not in runtime_env(None)
    assert [Path(p).name for p in runtime_env("auto")["py_modules"]] == ["dbtrain"]
    monkeypatch.setenv("DBTRAIN_FAULTS", "[]")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    variables = runtime_env("auto")["env_vars"]
    assert variables["DBTRAIN_FAULTS"] == "[]"
    assert {name for name in variables if not name.startswith("DBTRAIN_")} <= set(SETTINGS)  # no token among them


def test_what_a_submitted_job_has_fixed_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a key that both set."""
    monkeypatch.setenv("DBTRAIN_FAULTS", "[]")
    monkeypatch.setenv(JOB, '{"runtime_env": {"py_modules": ["x"], "env_vars": {"DBTRAIN_FAULTS": "y"}}}')
    assert "py_modules" not in runtime_env("auto")
    assert "DBTRAIN_FAULTS" not in runtime_env("auto")["env_vars"]


def test_runs_are_not_left_in_a_folder_that_ray_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_lost_output("runs")
    monkeypatch.setenv(JOB, '{"runtime_env": {"working_dir": "gcs://x.zip"}}')
    refuse_lost_output("/shared/runs")
    refuse_lost_output("s3://bucket/runs")
    with pytest.raises(ConfigError, match="out=/shared/runs"):
        refuse_lost_output("runs")
