"""The command line: one module for each kind of command."""

# in the order of --help
from dbtrain.cli import training, carrying, results, comparison, places, encoding, keys  # isort: skip
from dbtrain.cli.command import app, hear_sigterm

__all__ = ["app", "carrying", "comparison", "encoding", "keys", "main", "places", "results", "training"]


def main() -> None:
    """Entry point."""
    hear_sigterm()
    app()
