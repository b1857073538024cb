"""Every time-out that decides when something counts as dead, in one table, echoed at the start of a run."""

import os
from dataclasses import dataclass

from rich.table import Table

from dbtrain.coordinator.controller import STOP_GRACE_S
from dbtrain.coordinator.exit_reasons import SILENT_S
from dbtrain.coordinator.ray.settings import SETTINGS
from dbtrain.shards.storage.lock import TTL_S
from dbtrain.shards.storage.remote import PUT_LIMIT_S, RETRY_DELAYS_S
from dbtrain.training.resumption import patience
from dbtrain.training.watchdog import LOCAL_POLL_S, REMOTE_POLL_S


@dataclass(frozen=True)
class TimeOut:
    """One time-out, in seconds."""

    what: str
    seconds: float
    then: str
    setting: str
    """Where it is set; `fixed` if nowhere."""


def timeouts(hang_timeout_s: float, local: bool) -> list[TimeOut]:
    """All of them, for a run on a local directory or on an object store."""
    poll = LOCAL_POLL_S if local else REMOTE_POLL_S
    health = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    frozen = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    alive, answer = "RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms"
    head = "RAY_gcs_rpc_server_reconnect_timeout_s"
    return [
        TimeOut("a worker process ended", _ray(health), "crash: the block comes back", health),
        TimeOut("a worker process does not answer (frozen)", _ray(frozen), "it is killed: crash", frozen),
        TimeOut("a worker makes no step", hang_timeout_s, "it ends itself: crash", "cluster.hang_timeout_s"),
        TimeOut("a worker's block has a newer attempt", poll, "it ends itself, and commits no more", "fixed"),
        TimeOut("the command asks to stop", poll, "workers commit and leave", "fixed"),
        TimeOut(
            "a block has no worker when the command asks to stop",
            STOP_GRACE_S,
            "it is given up: stopped",
            "fixed",
        ),
        TimeOut("a node's connection is silent", _ray(alive) / 1000, "it is asked whether it lives", alive),
        TimeOut("it gives no answer", _ray(answer) / 1000, "the connection is lost", answer),
        TimeOut(
            "a block on several nodes crashed, or a worker does not answer",
            SILENT_S,
            "its nodes answer, or one was lost",
            "fixed",
        ),
        TimeOut("the head is lost", _ray(head), "a node and its workers end", head),
        TimeOut("the storage refuses or is silent", sum(RETRY_DELAYS_S), "three tries, then an error", "fixed"),
        TimeOut(
            "a worker does not see what its block resumes from",
            patience(hang_timeout_s),
            "crash: the block comes back",
            "fixed",
        ),
        TimeOut("an upload hangs", PUT_LIMIT_S, "tried again", "fixed; more for large ones"),
        TimeOut("a coordinator's lock has no heartbeat", TTL_S, "another command may take the run", "fixed"),
        TimeOut(
            "a block's events cannot be read", hang_timeout_s, "the command ends; same again", "cluster.hang_timeout_s"
        ),
    ]


def timeouts_table(hang_timeout_s: float, local: bool) -> Table:
    """The table for people."""
    table = Table("when", "after s", "then", "setting", title="time-outs", title_justify="left")
    for row in timeouts(hang_timeout_s, local):
        table.add_row(row.what, f"{row.seconds:g}", row.then, row.setting)
    return table


def _ray(name: str) -> float:
    return float(os.environ.get(name, SETTINGS[name]))
