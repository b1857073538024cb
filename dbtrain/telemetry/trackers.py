"""TensorBoard, W&B and MLflow, through Accelerate's trackers; fed by the events, so that a tracker can be replayed."""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dbtrain.errors import ConfigError


class Trackers:
    """Log the step events of all blocks.

    Args:
        names: of Accelerate's trackers.
        project: project or experiment.
        directory: where a tracker that writes files puts them.
        config: of the run, stored as hyperparameters.
        tell: called with one line for a tracker that fails later, which is then given up.

    Raises:
        ConfigError: a tracker's package is not installed, or it refuses to start.
    """

    def __init__(
        self, names: Sequence[str], project: str, directory: str, config: dict[str, Any], tell: Callable[[str], None]
    ) -> None:
        self._trackers = {name: self._start(name, project, directory, config) for name in names}
        self._tell = tell

    @staticmethod
    def _start(name: str, project: str, directory: str, config: dict[str, Any]) -> Any:
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind(project, logging_dir=directory) if kind.requires_logging_directory else kind(project)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(_scalars(config))
        except Exception as error:
            raise ConfigError(f"telemetry.trackers: {name} does not start ({error}): install or configure it") from None
        return tracker

    def log(self, block: int, event: dict[str, Any]) -> None:
        """Log an event if it is one of a step."""
        if event["event"] != "step":
            return
        values = {f"block{block}/loss": event["loss"], f"block{block}/memory_bytes": event["memory"]}
        if event["seconds"]:
            values[f"block{block}/steps_per_second"] = event["steps"] / event["seconds"]
        self._each(lambda tracker: tracker.log(values, step=event["step"]))

    def close(self) -> None:
        """Flush and end."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Any], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # a full disk or a lost network of theirs is no reason to end a training
                del self._trackers[name]
                words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._tell(f"telemetry.trackers: {name} fails and gets no more ({words}); the events stay in the run")


def _scalars(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


def check_installed(names: Sequence[str]) -> None:
    """Say at once, before anything is trained, that a tracker cannot start.

    Raises:
        ConfigError: its package is not installed.
    """
    there = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()} if names else set()
    absent = [name for name in names if name not in there]
    if absent:
        raise ConfigError(
            f"telemetry.trackers names {', '.join(absent)}, which is not installed: pip install {' '.join(absent)}, or "
            "take it out of the list"
        )
