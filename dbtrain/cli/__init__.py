"""The command line: one module for each kind of command."""

# in the order of --help
from dbtrain.cli import training, carrying, results, sweeping, comparison, places, encoding, keys  # isort: skip
from dbtrain.cli.command import app, hear_sigterm

__all__ = [
    "app", "carrying", "comparison", "encoding", "keys", "main", "places", "results", "sweeping", "training",
]  # fmt: skip


def main() -> None:
    """Entry point."""
    hear_sigterm()
    app()
