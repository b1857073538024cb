"""The train command: prepare the run, lock it, train its blocks, and answer signals."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dbtrain.config import Config
from dbtrain.coordinator.controller import Controller
from dbtrain.coordinator.lifecycle import FINAL, BlockState, Phase
from dbtrain.coordinator.placement import Node, choose_device, count_at_once, place
from dbtrain.coordinator.preflight import check_packages
from dbtrain.coordinator.progress import Progress
from dbtrain.coordinator.ray.address import check_address, connect, this_machine
from dbtrain.coordinator.ray.shipping import refuse_lost_output
from dbtrain.coordinator.timeouts import timeouts_table
from dbtrain.errors import IncompleteRunError
from dbtrain.run.calibrate import described
from dbtrain.run.disk import shortage
from dbtrain.run.make_plan import Calibrate
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import check_alone, prepare_checked
from dbtrain.run.requests import requests
from dbtrain.run.run import Run
from dbtrain.shards.storage.directory import run_directory
from dbtrain.shards.storage.lock import RunLock
from dbtrain.telemetry.console import LiveView, Row
from dbtrain.telemetry.trackers import Trackers, check_installed
from dbtrain.training.optimizer import endless_warmup

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(config: Config, view: LiveView, calibrate: Calibrate, verbose: bool = False) -> list[BlockState]:
    """Train all blocks of a run, or those that are not done; returns their last states.

    `verbose` also shows every time-out that is in force.

    Raises:
        IncompleteRunError: blocks failed or were stopped; the message names each. The same command continues them.
        DbtrainError: the run cannot start.
    """
    refuse_lost_output(config.out)
    check_address(config.cluster.address)  # before a pilot that takes minutes
    run = Run.at(config.run_url)
    with run_directory(run.store), RunLock(run.store, f"dbtrain train {config.name}") as lock:
        view.tell(f"run {run.store.url}")
        if advice := endless_warmup(config.training):
            view.tell(advice)
        check_alone(config)
        check_installed(config.telemetry.trackers)
        own = config.cluster.address is None
        if own:
            # Ray need not run for it; it starts after the pilot, which takes the whole machine
            _check_room(config, run, [this_machine()])
            run_plan = prepare_checked(config, run, calibrate)
        cluster = connect(config.cluster.address)
        try:
            if not own:
                # before the data are read and a pilot is trained: a cluster that would not do is told at once
                check_packages(cluster, config.data.source)
                _check_room(config, run, cluster.nodes())
                run_plan = prepare_checked(config, run, calibrate)
            for note in run_plan.data_notes:
                view.tell(f"data: {note}")
            for line in run_plan.init.lines() if run_plan.init else ():
                view.tell(f"init: {line}")
            for line in described(run_plan.distribution):
                view.tell(line)
            if verbose:
                view.table(timeouts_table(config.cluster.hang_timeout_s, run.store.is_local))
            states = _train_blocks(run, config, run_plan, cluster, view, lock)
        finally:
            cluster.close()
    _raise_if_incomplete(states)
    return states


def _check_room(config: Config, run: Run, nodes: Sequence[Node]) -> None:
    """Refuse a new run whose blocks fit on no node; of one that exists only blocks that are not done must fit."""
    if not run.exists:
        place(requests(config, choose_device(config.cluster.device, nodes)), nodes)


def _train_blocks(
    run: Run, config: Config, run_plan: RunPlan, cluster: Any, view: LiveView, lock: RunLock
) -> list[BlockState]:
    nodes = cluster.nodes()
    device = choose_device(config.cluster.device, nodes)
    trackers = Trackers(config.telemetry.trackers, view.tell)
    observer = CommandObserver(run_plan, view, trackers)

    def check_held_and_alive() -> None:
        lock.check()
        cluster.check_alive()

    wanted = requests(config, device)
    controller = Controller(run, run_plan.located(), cluster, wanted, observer, check_held_and_alive)
    view.tell(
        f"{len(nodes)} node(s), {device}; {config.cluster.max_crashes} crashes without progress and "
        f"{config.cluster.max_preemptions} preemptions end a block"
    )
    for line in shortage(run_plan, run.store, count_at_once(controller.wanted, nodes)):
        view.tell(line)
    open_blocks = {state.block: state.committed for state in controller.states if state.phase not in FINAL}
    try:
        trackers.start(run.store, config.name, config.telemetry.project, config.model_dump(mode="json"), open_blocks)
        with _stopping(controller, view.tell):
            return controller.run()
    finally:
        trackers.close()


@dataclass(frozen=True)
class CommandObserver:
    """What a command does with what the controller tells: it shows the blocks, and feeds the trackers."""

    run_plan: RunPlan
    view: LiveView
    trackers: Trackers

    def show(self, states: list[BlockState], progress: list[Progress]) -> None:
        """Draw the table of all blocks."""
        self.view.show([row(self.run_plan, s, p) for s, p in zip(states, progress, strict=True)])

    def tell(self, line: str) -> None:
        """Print a line above the table."""
        self.view.tell(line)

    def event(self, block: int, event: dict[str, Any]) -> None:
        """Hand an event of a block to the trackers."""
        self.trackers.log(block, event)


def row(run_plan: RunPlan, state: BlockState, progress: Progress) -> Row:
    """A block's row in the table."""
    layers = run_plan.shards.layers(state.block)
    return Row(
        block=state.block,
        layers=(layers.start, layers.stop),
        levels=run_plan.levels(state.block),
        phase=state.phase.value,
        step=max(progress.step, state.committed) if state.phase is Phase.DONE else progress.step,
        steps=run_plan.config.training.of_block(state.block).steps,
        loss=progress.loss,
        rate=progress.rate,
        seconds=progress.seconds,
        memory=progress.memory,
        restarts=max(0, state.attempt - 1),
        level_name=run_plan.noise().level_name,
    )


@contextmanager
def _stopping(controller: Controller, tell: Callable[[str], None]) -> Iterator[None]:
    """The first signal asks the workers to commit and leave; the second ends everything now."""

    def handle(number: int, frame: FrameType | None) -> None:
        if controller.stopping:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        tell(f"{name}: the workers commit and leave; once more to end now")
        controller.stop(name)

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
