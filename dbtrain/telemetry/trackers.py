"""Trackers follow the step events of all blocks; what a
tracker shows can be made again from the events alone."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from dbtrain.errors import ConfigError, DbtrainError
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.identity import tracked_as
from dbtrain.telemetry.series import SERIES, Series, Tracked


class Trackers:
    """Log the step events of all blocks.

    Args:
        names: names of trackers: keys of `SERIES`.
        tell: called with one line for a tracker that fails later, which is then given up.
    """

    def __init__(self, names: Sequence[str], tell: Callable[[str], None]) -> None:
        self._names = names
        self._tell = tell
        self._open: dict[str, Series] = {}
        self._logged: dict[str, dict[str, int]] = {"step": {}, "validation": {}}
        """Newest step of each part, by kind of event."""

    def start(self, run: Store, name: str, project: str, config: dict[str, Any], committed: Mapping[str, int]) -> None:
        """Start or continue the series of a run.

        Args:
            run: its directory.
            name, project: name and project of the run, and of what it belongs to.
            config: configuration of the run, kept as hyperparameters.
            committed: steps that each part which is to be trained, such as ``block2``, has committed.

        Raises:
            ConfigError: a tracker's package is not installed, or it refuses to start.
            ShardError: the run's directory cannot be written.
        """
        if not self._names or not committed:
            return
        directory = f"{run.url}/trackers" if run.is_local else f"{name}-trackers"
        tracked = Tracked(name, project, tracked_as(run), directory, _scalars(config), committed)
        self._logged = {"step": dict(committed), "validation": dict(committed)}
        for tracker in self._names:
            try:
                self._open[tracker] = SERIES[tracker](tracked)
            except Exception as error:
                self.close()
                raise ConfigError(
                    f"telemetry.trackers: {tracker} does not start ({_words(error)}): install or configure it"
                ) from None

    def log(self, part: str, event: dict[str, Any]) -> None:
        """Log an event if it is one of a step or a validation; what an attempt repeats has the same values,
        and is left out."""
        kind = event["event"]
        if kind not in ("step", "validation") or event["step"] <= self._logged[kind].get(part, 0):
            return
        self._logged[kind][part] = event["step"]
        if kind == "validation":
            self._each(lambda series: series.log(part, event["step"], {"validation_loss": event["loss"]}))
            return
        values: dict[str, float] = {key: event[key] for key in ("loss", "lr", "grad_norm") if key in event}
        values["memory_bytes"] = event["memory"]
        if event["seconds"]:
            values["steps_per_second"] = event["steps"] / event["seconds"]
        self._each(lambda series: series.log(part, event["step"], values))

    def close(self) -> None:
        """Flush and end."""
        self._each(lambda series: series.close())
        self._open.clear()

    def _each(self, call: Callable[[Series], object]) -> None:
        for name, series in list(self._open.items()):
            try:
                call(series)
            except Exception as error:  # a full disk or a lost network of theirs is no reason to end a training
                del self._open[name]
                self._tell(
                    f"telemetry.trackers: {name} fails and gets no more ({_words(error)}); the events stay in the run"
                )


def _words(error: Exception) -> str:
    kind = "" if isinstance(error, DbtrainError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


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
    absent = [name for name in names if find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"telemetry.trackers names {', '.join(absent)}, which is not installed: pip install {' '.join(absent)}, or "
            "take it out of the list"
        )
