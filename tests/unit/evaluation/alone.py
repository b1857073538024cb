"""Programs that run where this package cannot be imported."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dbtrain":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
try:
    import dbtrain
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("dbtrain can be imported")
"""


def run_alone(program: str, folders: Iterable[Path], seconds: float = 300) -> str:
    """What a program prints that is given these folders."""
    command = [sys.executable, "-I", "-B", "-c", BLOCKED + program, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout
