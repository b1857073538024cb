"""Submit a run to Slurm: `slurm.sbatch` beside this file, with the options of this run."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dbtrain.config import load_config
from dbtrain.config.shipped import located
from dbtrain.errors import ConfigError, PlacementError

SCRIPT = Path(__file__).with_name("slurm.sbatch")


def sbatch_command(options: Mapping[str, object], config: Path, overrides: Sequence[str]) -> list[str]:
    """The command that submits; options of value None are left to the script.

    Args:
        options: of sbatch, by their long names without dashes.
        config: YAML file of the run, or the name of a shipped one.
        overrides: of the configuration.
    """
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["sbatch", *given, str(SCRIPT), str(located(config).resolve()), *overrides]


def _with_options(script: str, options: Mapping[str, object]) -> str:
    """The script as the given options make it: sbatch takes
    those of its command line before those in the file."""
    given = {name: value for name, value in options.items() if value is not None}
    kept = [line for line in script.splitlines() if not any(line.startswith(f"#SBATCH --{name}=") for name in given)]
    lines = [f"#SBATCH --{name}={value}" for name, value in given.items()]
    return "\n".join([kept[0], *lines, *kept[1:]]) + "\n"


def submit(
    options: Mapping[str, object], config: Path, overrides: Sequence[str], gpus: int | None, dry_run: bool
) -> str:
    """Submit, or only show; returns what to print.

    Raises:
        ConfigError: the configuration is wrong, or names a cluster of its own; told now and not in the queue.
        PlacementError: there is no sbatch, or it refused.
    """
    loaded = load_config(config, overrides)
    if loaded.cluster.address is not None:
        raise ConfigError(
            f"cluster.address={loaded.cluster.address}: the job starts a cluster of its own; leave it out"
        )
    command = sbatch_command(options, config, overrides)
    variables = {"DBTRAIN_STORAGE": loaded.out} | ({} if gpus is None else {"DBTRAIN_GPUS": str(gpus)})
    if dry_run:
        shown = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        return f"# {shown} {shlex.join(command)}\n{_with_options(SCRIPT.read_text(), options)}"
    if shutil.which("sbatch") is None:
        raise PlacementError("sbatch is not on the PATH: run this where jobs are submitted, or see it with --dry-run")
    # the job finds the programs of this very environment, activated or not
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    done = subprocess.run(command, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise PlacementError(f"sbatch refused: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
