"""What travels to a cluster: this package, the user's network, settings, and the listener for warnings."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dbtrain
from dbtrain.coordinator.ray.settings import SETTINGS
from dbtrain.errors import ConfigError

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit` in the environment of the driver that it starts."""


def runtime_env(address: str | None, modules: Sequence[Path] = ()) -> dict[str, Any]:
    """Ray's runtime environment of this driver.

    On somebody's cluster the code of this very package goes along, so nodes need Python, torch, DeepSpeed and
    Ray, not dbtrain, and never run another version of it. What `ray job submit` has fixed already is left to
    it: Ray refuses a key that is set twice.

    Args:
        address: address of the cluster; None for one of this machine's own, whose workers look where it does.
        modules: files and packages of the user's that workers import.
    """
    variables = {k: v for k, v in os.environ.items() if k.startswith("DBTRAIN_") or k in SETTINGS}
    wanted: dict[str, Any] = {
        "env_vars": variables,
        "worker_process_setup_hook": "dbtrain.coordinator.ray.signals.install",
    }
    if address is not None:
        wanted["py_modules"] = [str(Path(dbtrain.__file__).parent), *map(str, modules)]
    submitted = submitted_runtime_env()
    taken = submitted.get("env_vars", {})
    wanted["env_vars"] = {k: v for k, v in variables.items() if k not in taken}
    return {k: v for k, v in wanted.items() if k == "env_vars" or k not in submitted}


def submitted_runtime_env() -> dict[str, Any]:
    """What `ray job submit` has fixed for this driver; empty outside a submitted job."""
    return dict(json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {})


def refuse_lost_output(out: str) -> None:
    """A submitted job runs in a copy of the working directory that Ray removes afterwards.

    Raises:
        ConfigError: the runs would lie in there.
    """
    if "working_dir" in submitted_runtime_env() and "://" not in out and not Path(out).is_absolute():
        raise ConfigError(
            f"out={out} is relative, and a submitted job runs in a copy of its working directory that Ray removes: "
            f"give a place that outlives it and that all nodes see, such as out=/shared/{out} or out=s3://bucket/{out}"
        )
