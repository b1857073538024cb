"""TensorBoard, W&B and MLflow, through Accelerate's trackers; fed by the events, so that a tracker can be replayed."""

from collections.abc import Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from dbtrain.errors import ConfigError


class Trackers:
    """Log the step events of all blocks.

    Args:
        names: of Accelerate's trackers.
        project: project or experiment.
        directory: where a tracker that writes files puts them.
        config: of the run, stored as hyperparameters.

    Raises:
        ConfigError: a tracker's package is not installed, or it refuses to start.
    """

    def __init__(self, names: Sequence[str], project: str, directory: str, config: dict[str, Any]) -> None:
        self._trackers = [self._start(name, project, directory) for name in names]
        for tracker in self._trackers:
            tracker.store_init_configuration(_scalars(config))

    @staticmethod
    def _start(name: str, project: str, directory: str) -> Any:
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind(project, logging_dir=directory) if kind.requires_logging_directory else kind(project)
            if hasattr(tracker, "start"):
                tracker.start()
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
        for tracker in self._trackers:
            tracker.log(values, step=event["step"])

    def close(self) -> None:
        """Flush and end."""
        for tracker in self._trackers:
            tracker.finish()


def _scalars(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
