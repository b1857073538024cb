"""Results of commands, kept in the run after they were shown, so that a full disk loses no result."""

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dbtrain.errors import ShardError
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory

Kept = TypeVar("Kept")
SCORES = "evaluation.json"
MEASURED = "weights"
"""Field of what is kept: `MergedDirectory.weights_hash` of the model that was measured."""


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


def kept(run: Run, name: str, kind: type[Kept], command: str) -> Kept | None:
    """What :func:`keep` wrote, or None if the run has no such file.

    Args:
        kind: type that it is read as, such as ``list[Point]``.
        command: the command that writes it anew, for messages.

    Raises:
        ShardError: the file cannot be read, or holds something else.
    """
    if not run.store.exists(name):
        return None
    content = run.store.read_json(name)
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "its top"
        raise ShardError(
            f"{run.store.where(name)} is damaged ({at}: {first['msg']}): make it anew with {command}"
        ) from None


def scores_of(run: Run, merged: MergedDirectory) -> dict[str, Any] | None:
    """Content of evaluation.json, or None if there is none or it says that another model was measured.

    A run that was trained on, or merged while it trained, may have scores of the model of before.

    Raises:
        ShardError: the file is damaged.
    """
    if not run.store.exists(SCORES):
        return None
    content: dict[str, Any] = run.store.read_json(SCORES)
    return content if content.get(MEASURED) in (None, merged.weights_hash) else None
