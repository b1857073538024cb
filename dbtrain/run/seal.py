"""Seal a run without training it: a small folder that is copied to places, which train blocks of it."""

from dbtrain.config import Config
from dbtrain.run.make_plan import Calibrate
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.directory import run_directory
from dbtrain.shards.storage.lock import RunLock


def seal(config: Config, calibrate: Calibrate) -> RunPlan:
    """Write all that blocks have in common, or check what is there: run.json and the codebook.

    A level range is measured here and nowhere else: another kind of GPU, or another number of threads, may
    measure a range that differs in its last bit, and blocks of two such ranges would not fit together.
    Therefore places get copies of the sealed folder.

    Raises:
        ConfigError: the folder belongs to a run of another configuration, or no worker could train this one.
        DataError: the data cannot be read, or is not what the run was sealed with.
        ShardError: the storage fails.
        RunLockedError: another command works on this run.
    """
    run = Run.at(config.run_url)
    with run_directory(run.store), RunLock(run.store, f"dbtrain prepare {config.name}"):
        return prepare(config, run, calibrate)
