"""The train command: settle, lock, place, conduct, and answer signals."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dbtrain.config import Config
from dbtrain.coordinator.address import check_address
from dbtrain.coordinator.conduct import Conductor
from dbtrain.coordinator.connect import connect
from dbtrain.coordinator.design import Calibrate
from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.coordinator.placement import choose_device, requests
from dbtrain.coordinator.preflight import check_packages
from dbtrain.coordinator.progress import Progress
from dbtrain.coordinator.settle import settle
from dbtrain.coordinator.shipping import refuse_lost_output
from dbtrain.coordinator.timeouts import timeouts_table
from dbtrain.errors import IncompleteRunError
from dbtrain.shards.directory import run_directory
from dbtrain.shards.lock import RunLock
from dbtrain.shards.store import Store
from dbtrain.telemetry.console import LiveView, Row
from dbtrain.telemetry.trackers import Trackers
from dbtrain.training.blueprint import Blueprint

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(config: Config, view: LiveView, calibrate: Calibrate) -> list[BlockState]:
    """Train all blocks of a run, or those that are not done; returns their last states.

    Raises:
        IncompleteRunError: blocks failed or were stopped; the message names each. The same command continues them.
        DbtrainError: the run cannot start.
    """
    refuse_lost_output(config.out)
    check_address(config.cluster.address)  # before a pilot that takes minutes
    run = Store(config.run_url)
    with run_directory(run), RunLock(run, f"dbtrain train {config.name}") as lock:
        view.tell(f"run {run.url}")
        blueprint = settle(config, run, calibrate)
        cluster = connect(config.cluster.address)
        try:
            if config.cluster.address is not None:
                check_packages(cluster, config.data.source)
            states = _conduct(run, config, blueprint, cluster, view, lock)
        finally:
            cluster.close()
    _raise_if_incomplete(states)
    return states


def _conduct(
    run: Store, config: Config, blueprint: Blueprint, cluster: Any, view: LiveView, lock: RunLock
) -> list[BlockState]:
    nodes = cluster.nodes()
    device = choose_device(config.cluster.device, nodes)
    trackers = _trackers(config, run, view.tell)

    def show(states: list[BlockState], progress: list[Progress]) -> None:
        view.show([row(blueprint, s, p) for s, p in zip(states, progress, strict=True)])

    wanted = requests(config, device)
    conductor = Conductor(run, blueprint.located(), cluster, wanted, show, view.tell, trackers.log, lock.check)
    view.tell(
        f"{len(nodes)} node(s), {device}; {config.cluster.max_crashes} crashes without progress and "
        f"{config.cluster.max_preemptions} preemptions end a block"
    )
    view.table(timeouts_table(config.cluster.hang_timeout_s, run.is_local))
    try:
        with _stopping(conductor, view.tell):
            return conductor.conduct()
    finally:
        trackers.close()


def _trackers(config: Config, run: Store, tell: Callable[[str], None]) -> Trackers:
    directory = f"{run.url}/trackers" if run.is_local else f"{config.name}-trackers"
    content = config.model_dump(mode="json")
    return Trackers(config.telemetry.trackers, config.telemetry.project, directory, content, tell)


def row(blueprint: Blueprint, state: BlockState, progress: Progress) -> Row:
    """A block's row in the table."""
    layers = blueprint.shards.layers(state.block)
    return Row(
        block=state.block,
        layers=(layers.start, layers.stop),
        levels=blueprint.levels(state.block),
        phase=state.phase.value,
        step=max(progress.step, state.committed) if state.phase is Phase.DONE else progress.step,
        steps=blueprint.config.training.steps,
        loss=progress.loss,
        rate=progress.rate,
        seconds=progress.seconds,
        memory=progress.memory,
        restarts=max(0, state.attempt - 1),
        level_name=blueprint.noise().level_name,
    )


@contextmanager
def _stopping(conductor: Conductor, tell: Callable[[str], None]) -> Iterator[None]:
    """The first signal asks the workers to commit and leave; the second ends everything now."""

    def handle(number: int, frame: FrameType | None) -> None:
        if conductor.stopping:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        tell(f"{name}: the workers commit and leave; once more to end now")
        conductor.stop(name)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_if_incomplete(states: list[BlockState]) -> None:
    missing = [s for s in states if s.phase is not Phase.DONE]
    if missing:
        told = "; ".join(f"block {s.block} {s.phase.value} at step {s.committed} ({s.error})" for s in missing)
        done = len(states) - len(missing)
        raise IncompleteRunError(f"{done} of {len(states)} blocks are done. {told}. The same command continues these.")
