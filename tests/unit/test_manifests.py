"""Manifests fit the schemas of those who read them. None of them is run here."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.conftest import ROOT

CRDS = Path(os.environ.get("DBTRAIN_KUBERAY_CRDS", ROOT / ".." / "shared" / "kuberay-crds-v1.7.0"))
KINDS = {"raycluster.yaml": "ray.io_rayclusters.yaml", "rayjob.yaml": "ray.io_rayjobs.yaml"}
AUTOSCALER = sorted((ROOT / "cluster" / "ray").glob("*.yaml"))
SECRETS = re.compile(r"password|secret_key|access_key|\bprivate_key:|\btoken:")


def closed(schema: Any) -> Any:
    """Refuse unknown fields, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        new.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    return new


@cache
def schema_of(kind: str) -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip(f"no CustomResourceDefinitions in {CRDS}: set DBTRAIN_KUBERAY_CRDS to KubeRay's config/crd/bases")
    crd = yaml.load((CRDS / KINDS[kind]).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": {"type": "string"}}}
    return dict(closed(schema))


def manifest(name: str) -> Any:
    return yaml.safe_load((ROOT / "cluster" / "kuberay" / name).read_text())


@pytest.mark.parametrize("name", KINDS)
def test_kuberay_manifests_fit_the_crds(name: str) -> None:
    schema = schema_of(name)
    good = manifest(name)
    validator = jsonschema.Draft202012Validator(schema)  # checking the schema itself would take seconds
    validator.validate(good)
    spec = good["spec"].get("rayClusterSpec", good["spec"])
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolcy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolcy"):
        validator.validate(good)


def test_the_job_brings_the_same_cluster() -> None:
    assert manifest("rayjob.yaml")["spec"]["rayClusterSpec"] == manifest("raycluster.yaml")["spec"]


def test_pods_have_no_more_rights_than_needed() -> None:
    spec = manifest("raycluster.yaml")["spec"]
    assert spec["authOptions"]["mode"] == "token"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("path", AUTOSCALER, ids=lambda path: path.name)
def test_autoscaler_files_fit_the_schema_of_ray(path: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "max_wrokers": 3}, schema)
    if "available_node_types" in content:
        kinds = content["available_node_types"]
        assert content["head_node_type"] in kinds
        # dbtrain asks for no node, so the autoscaler starts those that are always to be there and no more
        assert min(kind["min_workers"] for name, kind in kinds.items() if name != content["head_node_type"]) > 0
    # the command runs in the home directory, and names a file of the package's
    assert "'cd ~/dbtrain && dbtrain train configs/" in path.read_text()
    for part in ("head", "worker"):
        command = content[f"{part}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in command and "0.0.0.0" not in command


def test_there_is_a_file_for_each_place() -> None:
    assert [path.stem for path in AUTOSCALER] == ["aws", "gcp", "onprem"]


@pytest.mark.parametrize("folder", ["cluster", "docker", "launchers"])
def test_no_manifest_holds_a_secret_or_opens_to_all(folder: str) -> None:
    for path in (ROOT / folder).rglob("*"):
        if path.is_file():
            lines = [line.split("#")[0].lower() for line in path.read_text().splitlines()]
            assert not [line for line in lines if "0.0.0.0" in line], path
            held = [line for line in lines if SECRETS.search(line)]
            assert not [line for line in held if not allowed(line)], (path, held)


def allowed(line: str) -> bool:
    """Places of secrets, not secrets."""
    return any(place in line for place in ("~/.ssh/", "~/.ray/auth_token", "token:/run/dbtrain", "token: {}"))
