"""The train command: prepare the run, lock it, train its blocks, and answer signals."""

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from dbtrain.coordinator.status import block_status, branch_rows
from dbtrain.coordinator.timeouts import timeouts_table
from dbtrain.errors import ConfigError, IncompleteRunError
from dbtrain.models.registry import own_architecture
from dbtrain.run.branch import awaits_branch, branch_plan, start_from_branch
from dbtrain.run.calibrate import described
from dbtrain.run.disk import shortage
from dbtrain.run.initial_weights import check_there
from dbtrain.run.make_plan import Calibrate
from dbtrain.run.places import keep_place, other_versions, place_of
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import check_alone, prepare_branch, prepare_checked
from dbtrain.run.requests import Request, requests
from dbtrain.run.run import Run
from dbtrain.shards.storage.directory import run_directory
from dbtrain.shards.storage.lock import RunLock
from dbtrain.telemetry.console import Row, View
from dbtrain.telemetry.trackers import Trackers, check_installed
from dbtrain.training.optimizer import long_warmup

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(
    config: Config,
    view: View,
    calibrate: Calibrate,
    verbose: bool = False,
    only: Collection[int] | None = None,
) -> list[BlockState]:
    """Train all blocks of a run, or those that are not done; returns their last states.

    Args:
        config: configuration of the run.
        view: is shown and told what happens.
        calibrate: measures the range of a new run.
        verbose: also show every time-out that is in force.
        only: blocks to train; all for None, and none but the branch if it is empty.

    Raises:
        ConfigError: there is no such block, or the branch that they start from is not trained.
        IncompleteRunError: blocks failed or were stopped; the message names each.
            The same command continues them.
        DbtrainError: the run cannot start.
    """
    refuse_lost_output(config.out)
    check_address(config.cluster.address)  # before a pilot that takes minutes
    run = Run.at(config.run_url)
    with run_directory(run.store), RunLock(run.store, f"dbtrain train {config.name}") as lock:
        view.tell(f"run {run.store.url}")
        if advice := long_warmup(config.training):
            view.tell(advice)
        check_alone(config)
        check_installed(config.telemetry.trackers)
        _asked(requests(config, "cpu"), only)
        _check_branch(config, run, only)
        own = config.cluster.address is None
        if own:
            # Ray need not run for it; it starts after the pilot, which takes the whole machine
            _check_room(config, run, [this_machine()], only)
            run_plan = prepare_checked(config, run, calibrate)
            check_there(run, only)
        network = own_architecture(config.model.arch)
        cluster = connect(config.cluster.address, [network.shipped] if network else [])
        try:
            if not own:
                # before the data are read and a pilot is trained: a cluster that would not do is told at once
                check_packages(cluster, config.data.source, config.model.arch)
                _check_room(config, run, cluster.nodes(), only)
                run_plan = prepare_checked(config, run, calibrate)
                check_there(run, only)
            for line in _described(run, run_plan):
                view.tell(line)
            if verbose:
                view.table(timeouts_table(config.cluster.hang_timeout_s, run.store.is_local))
            start = Start(cluster, view, lock, place_of(run.store), only)
            start.describe(config)
            states = _train_in_order(run, run_plan, start)
        finally:
            cluster.close()
    _raise_if_incomplete(run, states)
    return states


def _described(run: Run, run_plan: RunPlan) -> list[str]:
    """What was decided of a run before it trains, and what people should know of it."""
    notes = [f"data: {note}" for note in run_plan.data_notes]
    init = [f"init: {line}" for line in (run_plan.init.lines() if run_plan.init else ())]
    advice = other_versions(run.manifest)
    return [*notes, *init, *described(run_plan.distribution), *([advice] if advice else [])]


def _asked(wanted: Sequence[Request], only: Collection[int] | None) -> list[Request]:
    """What those blocks want that are to be trained; ConfigError if one of them does not exist."""
    unknown = sorted(set(only or ()) - {request.block for request in wanted})
    if unknown:
        raise ConfigError(f"blocks to train: there is no block {unknown[0]}: the run has blocks 0 to {len(wanted) - 1}")
    return [request for request in wanted if only is None or request.block in only]


def _check_branch(config: Config, run: Run, only: Collection[int] | None) -> None:
    """Refuse to train single blocks before the branch: each place would train one of its own, and on other
    hardware another."""
    if only is None:
        return
    if not only and not config.init.branch:
        raise ConfigError("--blocks branch: the run has no branch: give numbers of blocks, or set init.branch.steps")
    if only and config.init.branch and not (run.exists and not awaits_branch(run)):
        raise ConfigError(
            f"--blocks {','.join(map(str, only))}: the branch that every block starts from is not trained: train it "
            "in one place (--blocks branch), and copy the folder to the others then"
        )


def _check_room(config: Config, run: Run, nodes: Sequence[Node], only: Collection[int] | None) -> None:
    """Refuse a new run whose blocks fit on no node; of one
    that exists only blocks that are not done must fit."""
    if not run.exists:
        place(_asked(requests(config, choose_device(config.cluster.device, nodes)), only), nodes)


@dataclass(frozen=True)
class Start:
    """What one start of a run works with."""

    cluster: Any
    view: View
    lock: RunLock
    place: str = ""
    """Name of this copy of the run."""
    only: Collection[int] | None = None
    """Blocks to train; all for None, and none but the branch if it is empty."""

    def check_held_and_alive(self) -> None:
        """Raise if another command took the run, or the cluster is gone."""
        self.lock.check()
        self.cluster.check_alive()

    def describe(self, config: Config) -> None:
        """Say what there is to train on, and what ends a block."""
        nodes = self.cluster.nodes()
        self.view.tell(
            f"{len(nodes)} node(s), {choose_device(config.cluster.device, nodes)}, place {self.place}; a block is "
            f"given up after {config.cluster.max_crashes} crashes without progress or {config.cluster.max_preemptions} "
            "preemptions"
        )


def _train_in_order(run: Run, run_plan: RunPlan, start: Start) -> list[BlockState]:
    """Train the branch, if the run has one that is not done, and then the blocks."""
    if awaits_branch(run):
        _train_branch(run, run_plan, start)
    return _train_blocks(run, run_plan, start)


def _train_branch(run: Run, run_plan: RunPlan, start: Start) -> None:
    """Train the network that every block starts from, and note in run.json which one it became."""
    plan = branch_plan(run_plan)
    prepare_branch(run, plan)
    waiting = [block_status(block).row for block in run.blocks]
    _train_jobs(run.branch, plan, start, run, after=waiting)
    origin = start_from_branch(run, start.view.tell)
    keep_place(run.store, start.place)  # run.json is another file now, and this copy the same place
    for line in origin.lines():
        start.view.tell(f"init: {line}")


def _train_blocks(run: Run, run_plan: RunPlan, start: Start) -> list[BlockState]:
    branch = [status.row for status in branch_rows(run)]
    return _train_jobs(run, run_plan, start, run, before=branch)


def _train_jobs(
    run: Run, run_plan: RunPlan, start: Start, whole: Run, before: Sequence[Row] = (), after: Sequence[Row] = ()
) -> list[BlockState]:
    """Train the blocks of a run, or its branch, which is a run below the `whole` one,
    under whose name it is tracked.

    The table has the rows `before` and `after` beside theirs.
    """
    config = run_plan.config
    device = choose_device(config.cluster.device, start.cluster.nodes())
    trackers = Trackers(config.telemetry.trackers, start.view.tell)
    observer = CommandObserver(run, run_plan, start.view, trackers, before, after)
    wanted, only = requests(config, device), start.only if run is whole else None
    guard = start.check_held_and_alive
    controller = Controller(run, run_plan.located(), start.cluster, wanted, observer, guard, only, start.place)
    at_once = count_at_once(_asked(wanted, only), start.cluster.nodes())
    for line in shortage(run_plan, run.store, at_once, only):
        start.view.tell(line)
    if nothing_left := _nothing_left(controller.states):
        start.view.tell(nothing_left)
    left = {run.block(s.block).key: s.committed for s in controller.states if s.phase not in FINAL}
    try:
        name = whole.config.name
        trackers.start(whole.store, name, config.telemetry.project, config.model_dump(mode="json"), left)
        with _stopping(controller, start.view.tell):
            states = controller.run()
    finally:
        observer.flush()
        trackers.close()
    if run is not whole:
        _raise_if_incomplete(run, states, controller.stopping)
    return states


def _nothing_left(states: Sequence[BlockState]) -> str | None:
    """What to say where all blocks that are asked for were done before the command began; None elsewhere."""
    asked = [s for s in states if s.phase is not Phase.ELSEWHERE]
    if not asked or any(s.phase is not Phase.DONE for s in asked):
        return None
    return f"nothing is left to train: {len(asked)} of {len(asked)} block(s) were done already"


@dataclass(frozen=True)
class CommandObserver:
    """What a command does with what the controller tells: it shows the blocks, and feeds the trackers."""

    run: Run
    run_plan: RunPlan
    view: View
    trackers: Trackers
    before: Sequence[Row] = ()
    """Rows of the table above those of the blocks: the branch, which is done."""
    after: Sequence[Row] = ()
    """Rows below: blocks that wait for the branch."""
    _told: list[str] = field(default_factory=list)
    """Lines since the table was drawn."""

    def show(self, states: list[BlockState], progress: list[Progress]) -> None:
        """Print what was told since the last call, and draw the table of all blocks."""
        self.flush()
        rows = [row(self.run, self.run_plan, s, p) for s, p in zip(states, progress, strict=True)]
        self.view.show([*self.before, *rows, *self.after])

    def tell(self, line: str) -> None:
        """Print a line above the table, at the end of this poll: a terminal draws the table again with each
        print, which for the deaths of a hundred blocks would take seconds."""
        self._told.append(line)

    def flush(self) -> None:
        """Print what was told and is not printed yet."""
        if self._told:
            self.view.tell("\n".join(self._told))
            self._told.clear()

    def event(self, block: int, event: dict[str, Any]) -> None:
        """Hand an event of a block to the trackers."""
        self.trackers.log(self.run.block(block).key, event)


def row(run: Run, run_plan: RunPlan, state: BlockState, progress: Progress) -> Row:
    """A block's row in the table."""
    layers = run_plan.shards.layers(state.block)
    return Row(
        name=run.block(state.block).name,
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
        level_name=run_plan.level_name,
        validation=progress.validation,
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

    # Python lets the main thread alone handle signals; in another one they go where they went before
    answered = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in answered}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_if_incomplete(run: Run, states: list[BlockState], stopping: bool = False) -> None:
    asked = [s for s in states if s.phase is not Phase.ELSEWHERE]
    missing = [s for s in asked if s.phase is not Phase.DONE]
    if run.manifest.branch and stopping and not missing:
        # asked in its last steps: what follows must not begin
        raise IncompleteRunError("the branch is done, and no block has begun. The same command continues with them.")
    if not missing:
        return
    ends = [f"{run.block(s.block).name} {s.phase.value} at step {s.committed} ({s.error})" for s in missing]
    if run.manifest.branch:
        raise IncompleteRunError(f"no block has begun. {ends[0]}. The same command continues it, and then the blocks.")
    done = len(asked) - len(missing)
    raise IncompleteRunError(
        f"{done} of {len(asked)} blocks are done. {'; '.join(ends)}. The same command continues these."
    )
