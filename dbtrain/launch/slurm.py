"""Submit a run to Slurm: `slurm.sbatch` beside this file, with the options of this run."""

import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dbtrain.config import Config, load_config
from dbtrain.config.shipped import located
from dbtrain.errors import ConfigError, PlacementError
from dbtrain.run.make_plan import split_of
from dbtrain.run.requests import requests

SCRIPT = Path(__file__).with_name("slurm.sbatch")
PROGRAMS = Path(sys.executable).parent
"""Where a job finds the programs of this very environment, activated or not."""


def sbatch_command(options: Mapping[str, object], config: Path, overrides: Sequence[str]) -> list[str]:
    """The command that submits; options of value None are left to the script.

    Args:
        options: of sbatch, by their long names without dashes.
        config: YAML file of the run, or the name of a shipped one.
        overrides: of the configuration.
    """
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["sbatch", *given, str(SCRIPT), str(located(config).resolve()), *overrides]


def job_script(
    options: Mapping[str, object], config: Path, overrides: Sequence[str], variables: Mapping[str, str]
) -> str:
    """The script with all that is told to sbatch beside it, so that it can be saved, changed and submitted.

    Args:
        options: of sbatch, by their long names without dashes; they replace the script's own.
        config, overrides: of the run; the script's arguments.
        variables: what the job finds in its environment.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if odd := [name for name, value in given.items() if len(str(value).split()) != 1]:
        raise ConfigError(
            f"--{odd[0]} {given[odd[0]]!r}: a line of #SBATCH holds no spaces or line breaks; give one word"
        )
    lines = SCRIPT.read_text().splitlines()
    kept = [line for line in lines if not any(line.startswith(f"#SBATCH --{name}=") for name in given)]
    asked = [f"#SBATCH --{name}={value}" for name, value in given.items()]
    told = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    told.append(f"export PATH={shlex.quote(str(PROGRAMS))}:$PATH")
    told.append(f"set -- {shlex.join([str(located(config).resolve()), *overrides])}")
    begin = kept.index("set -uo pipefail")
    return "\n".join([kept[0], *asked, *kept[1:begin], *told, *kept[begin:]]) + "\n"


def _checked(config: Path, overrides: Sequence[str]) -> Config:
    """The configuration, with what would only be refused after the queue refused now."""
    loaded = load_config(config, overrides)
    if loaded.cluster.address is not None:
        raise ConfigError(
            f"cluster.address={loaded.cluster.address}: the job starts a cluster of its own; leave it out"
        )
    split_of(loaded)
    requests(loaded, "cpu")
    return loaded


def submit(
    options: Mapping[str, object], config: Path, overrides: Sequence[str], gpus: int | None, dry_run: bool
) -> str:
    """Submit, or only show; returns what to print.

    Each GPU gets a CPU, or as many as its worker asks for, unless the options say how many.

    Raises:
        ConfigError: the configuration is wrong, cannot be cut so, or names a cluster of its own; told now and
            not in the queue.
        PlacementError: there is no sbatch, or it refused.
    """
    loaded = _checked(config, overrides)
    if gpus and options.get("cpus-per-task") is None:
        options = {**options, "cpus-per-task": max(2, gpus, math.ceil(gpus * loaded.cluster.cpus_per_worker))}
    variables = {"DBTRAIN_STORAGE": loaded.out} | ({} if gpus is None else {"DBTRAIN_GPUS": str(gpus)})
    if dry_run:
        return job_script(options, config, overrides, variables)
    if shutil.which("sbatch") is None:
        raise PlacementError("sbatch is not on the PATH: run this where jobs are submitted, or see it with --dry-run")
    path = f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    command = sbatch_command(options, config, overrides)
    done = subprocess.run(command, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise PlacementError(f"sbatch refused: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
