"""What a command has found, kept in the run after it was shown: a disk that is full takes no result away."""

from typing import Any

from dbtrain.errors import ShardError
from dbtrain.run.run import Run


def keep(run: Run, name: str, value: Any, what: str) -> None:
    """Write a JSON file into a run, after its content was shown.

    Args:
        what: the content in words, plural.

    Raises:
        ShardError: it cannot be written; the message says that nothing else is missing.
    """
    try:
        run.store.write_json(name, value)
    except ShardError as error:
        raise ShardError(f"{what} are complete and shown above, but {name} is not written: {error}") from error
