"""TensorBoard, W&B and MLflow: how each keeps the series of blocks that are at different steps at any moment.

W&B drops what comes with a smaller step than the last of a run. So each block has a run of its own there, in
the group of the dbtrain run, and so it has in TensorBoard, which overlays them. MLflow keeps the steps of
every metric apart: there all blocks share one run. The only file that imports these packages.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

STEP = "step"
IDENTITY_TAG = "dbtrain.run"
MLFLOW_BATCH = 100
"""Parameters at most that MLflow takes at once."""
MLFLOW_LONGEST = 500
"""Characters at most of a parameter's value, for servers of all ages."""


@dataclass(frozen=True)
class Tracked:
    """What trackers are told of a run before its first step."""

    name: str
    project: str
    identity: str
    """The same for all commands of a run, another for every run."""
    directory: str
    """Where a tracker that writes files puts them."""
    config: Mapping[str, Any]
    """Scalars by dotted key."""
    committed: Mapping[str, int]
    """Steps that each part which is to be trained has committed: what was logged after them comes again.
    A part is a block, such as ``block2``, or ``branch``."""


class Series(Protocol):
    """What one tracker has of one run."""

    def log(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """Values of a block, or of the branch, at a step."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoardSeries:
    """Event files in a folder for each block; what is repeated
    after a kill takes the place of what was there."""

    def __init__(self, tracked: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writers: dict[str, Any] = {}
        for part, committed in tracked.committed.items():
            folder = f"{tracked.directory}/{tracked.project}/{part}"
            writer: Any = SummaryWriter(folder, purge_step=committed + 1)
            self._writers[part] = writer
            # add_hparams would begin another file, and TensorBoard
            # reads only the newest of a folder on and on
            for summary in hparams(dict(tracked.config), {}):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary, committed)

    def log(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        writer = self._writers[part]
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


class WandbSeries:
    """A run for each block in the group of the dbtrain run, with the block's step on the horizontal axis."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb

        self._runs: dict[str, Any] = {}
        for part in tracked.committed:
            run = self._runs[part] = wandb.init(
                project=tracked.project,
                group=tracked.name,
                name=f"{tracked.name}-{part}",
                id=f"{tracked.identity}-{part}",
                resume="allow",
                reinit="create_new",
                config={**tracked.config, "part": part},
                allow_val_change=True,
                settings={"console": "off", "quiet": True},  # each would keep a copy of what the command prints
            )
            run.define_metric(STEP, hidden=True)
            run.define_metric("*", step_metric=STEP)

    def log(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """One row; without a step of W&B's own, since it would drop those that a continued run repeats."""
        self._runs[part].log({**values, STEP: step})

    def close(self) -> None:
        """Wait until all is written or sent."""
        for run in self._runs.values():
            run.finish()


class MLflowSeries:
    """One run with metrics ``block0/loss`` and so on; the next command of the run goes on in it."""

    def __init__(self, tracked: Tracked) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(tracked.project)
        where = experiment.experiment_id if experiment else self._client.create_experiment(tracked.project)
        found = self._client.search_runs([where], f"tags.`{IDENTITY_TAG}` = '{tracked.identity}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return  # MLflow lets nobody change the parameters of a run
        tags = {IDENTITY_TAG: tracked.identity}
        self._run = self._client.create_run(where, tags=tags, run_name=tracked.name).info.run_id
        self._keep(tracked.config)

    def _keep(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MLFLOW_LONGEST]) for key, value in config.items()]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._run, params=params[start : start + MLFLOW_BATCH])

    def log(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """All values at once: each call is a request to a server."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(f"{part}/{key}", value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished; the next command takes that back."""
        self._client.set_terminated(self._run)


SERIES: Mapping[str, Callable[[Tracked], Series]] = {
    "tensorboard": TensorBoardSeries,
    "wandb": WandbSeries,
    "mlflow": MLflowSeries,
}
