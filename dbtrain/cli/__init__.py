"""The command line: one module for each kind of command."""

import os

# in the order of --help
from dbtrain.cli import training, carrying, results, sweeping, comparison, places, encoding, keys  # isort: skip
from dbtrain.cli.command import app, hear_sigterm
from dbtrain.coordinator.ray.settings import PASSIVE

__all__ = [
    "app", "carrying", "comparison", "encoding", "keys", "main", "places", "results", "sweeping", "training",
]  # fmt: skip


def main() -> None:
    """Entry point."""
    # before PyTorch is imported; workers get the same with the other settings
    os.environ.setdefault(*PASSIVE)
    hear_sigterm()
    app()
