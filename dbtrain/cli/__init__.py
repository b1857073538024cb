"""The command line: one module for each kind of command."""

import os

# in the order of --help
from dbtrain.cli import training, carrying, results, sweeping, comparison, places, encoding, keys  # isort: skip
from dbtrain.cli.command import app, hear_sigterm

__all__ = [
    "app", "carrying", "comparison", "encoding", "keys", "main", "places", "results", "sweeping", "training",
]  # fmt: skip


def main() -> None:
    """Entry point."""
    # before PyTorch is imported: its threads would wait for each other by spinning, and where others use the
    # machine too a pilot of a tenth of a minute then takes many
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hear_sigterm()
    app()
