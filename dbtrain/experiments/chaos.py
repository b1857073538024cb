"""Kill what a run consists of at random, run after run, and
demand the bits of an undisturbed one every time."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dbtrain.config import Config
from dbtrain.errors import ConfigError, IncompleteRunError
from dbtrain.experiments.tally import WEIGHTS, Fault, Tally, difference
from dbtrain.experiments.victims import Worker, await_commit, controllers, send, workers
from dbtrain.run.run import BLOCKS, Run
from dbtrain.shards.commit import step_name
from dbtrain.shards.storage.lock import LOCK

PATIENT = ("cluster.max_crashes=100000", "cluster.max_preemptions=100000", "cluster.backoff_s=0.01")
"""Faults come faster here than progress, which budgets are there to notice."""
PAUSE_S = (0.2, 3.0)
"""Shortest and longest time for which a worker is stopped by SIGSTOP."""
LONGEST_RUN_S = 900.0
"""Longest time that a run may take after the faults have ended, in seconds."""
POLL_S = 0.1


class Punisher:
    """Runs of one configuration under faults at exponential intervals.

    Args:
        arguments: arguments of the train command: configuration file and overrides.
        config: what they say; its ``out`` must be a local directory.
        mtbf_s: mean time between faults, in seconds.
        seed: seed of the times and kinds of the faults; what they hit depends on the machine,
            so no run repeats exactly.
        time_limit_s: seconds after the undisturbed run after which no fault is made and no run started.
        tell: called with one line for each thing that happens.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        config: Config,
        mtbf_s: float,
        seed: int,
        time_limit_s: float,
        tell: Callable[[str], None],
    ) -> None:
        if "://" in config.out:
            raise ConfigError(f"out={config.out}: faults are made on this machine, give a local directory")
        if not config.training.deterministic:
            raise ConfigError("punish compares bits, which training.deterministic=false does not promise: leave it out")
        if config.cluster.address is not None:
            raise ConfigError(
                f"cluster.address={config.cluster.address}: faults are made on this machine, leave it out"
            )
        self.arguments = list(arguments)
        self.config = config
        self.mtbf_s = mtbf_s
        self.dice = random.Random(seed)
        self.time_limit_s = time_limit_s
        self.until = 0.0
        self.tell = tell
        self.tally = Tally()
        self._aimed: Counter[int | None] = Counter()
        self._command_hit = False
        self._kind: Fault | None = None
        folder = self._folder("")
        if folder.exists():
            raise ConfigError(f"{folder} exists: remove it, or give another name or out")
        folder.mkdir(parents=True)

    def punish(self, runs: int) -> Tally:
        """One undisturbed run, then `runs` disturbed ones, or fewer if the time is over.

        Raises:
            IncompleteRunError: the undisturbed run does not succeed,
                or no fault could be made, which proves nothing.
        """
        wanted = self._undisturbed()
        self.until = time.monotonic() + self.time_limit_s
        for number in range(runs):
            if time.monotonic() > self.until:
                break
            self._disturbed(f"punished-{number}", wanted)
        if not self.tally.faults:
            raise IncompleteRunError("not one fault was made: give more time (--time-limit) or a lower --mtbf")
        return self.tally

    def _undisturbed(self) -> dict[str, bytes]:
        if self._start("undisturbed").wait() != 0:
            raise IncompleteRunError(f"the undisturbed run fails already: see {self._log('undisturbed')}")
        return self._shards("undisturbed")

    def _disturbed(self, label: str, wanted: dict[str, bytes]) -> None:
        run = Run.at(str(self._folder(label) / self.config.name))
        self._aimed = Counter()
        before, end = self.tally.faults.total(), max(time.monotonic(), self.until) + LONGEST_RUN_S
        next_fault = time.monotonic() + self._interval()
        command, starts, wrong = self._start(label), 1, None
        while command.poll() != 0 and time.monotonic() < end:
            time.sleep(POLL_S)
            if command.poll() not in (None, 0):
                if not self._command_hit:
                    wrong = f"the command ended with code {command.returncode} though nothing had hit it"
                    break
                command, starts = self._start(label), starts + 1
            if next_fault <= time.monotonic() < self.until and self._fault(run, command):
                next_fault = time.monotonic() + self._interval()
        if command.poll() is None:
            command.send_signal(signal.SIGKILL)
        self.tally.runs += 1
        wrong = wrong or difference(self._shards(label), wanted) or self._lost(run, starts)
        if wrong:
            self.tally.differences.append(f"{label}: {wrong}; see {self._log(label)}")
        hit = self.tally.faults.total() - before
        self.tell(f"{label}: {hit} fault(s), {starts} command(s), {wrong or 'the same bits as the undisturbed run'}")

    def _lost(self, run: Run, starts: int) -> str | None:
        """A block that began anew more often than it, or the command,
        was hit has suffered from another's fault."""
        for block in range(self.config.blocks):
            attempts = len(run.block(block).attempts)
            allowed = starts + self._aimed[block] + self._aimed[None]
            if attempts > allowed:
                return f"block {block} made {attempts} attempts, {allowed} are explained by its own faults"
        return None

    def _interval(self) -> float:
        return self.dice.expovariate(1 / self.mtbf_s)

    def _start(self, label: str) -> "subprocess.Popen[bytes]":
        self.tally.commands += 1
        self._command_hit = False
        with self._log(label).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dbtrain", "train", *self.arguments, f"out={self._folder(label)}", *PATIENT],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "DBTRAIN_FAULTS": "[]"},
            )

    def _folder(self, label: str) -> Path:
        return Path(self.config.out).absolute() / f"{self.config.name}-punish" / label

    def _log(self, label: str) -> Path:
        return self._folder(label).with_suffix(".log")

    def _fault(self, run: Run, command: "subprocess.Popen[bytes]") -> bool:
        """Make one fault; False when there was nothing to hit: the same kind then waits for its victim.

        Were another one drawn, a command that has no workers yet would nearly always be the one that is hit.
        """
        kind = self._kind = self._kind or self.dice.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        hit = {"worker": self._hit_worker, "controller": self._hit_controller, "command": self._hit_command}
        done = hit[kind.target](run, command, kind)
        if done is not None:
            self.tally.faults[done] += 1
            self._kind = None
        return done is not None

    def _hit_worker(self, run: Run, command: "subprocess.Popen[bytes]", kind: Fault) -> Fault | None:
        """The fault that was made, which may be simpler than what was wanted; None when no worker was hit."""
        there = workers(run, command.pid)
        if not there:
            return None
        worker, made = self.dice.choice(there), kind
        if kind is Fault.WORKER_KILL_IN_COMMIT and not await_commit(run, worker.block):
            made = Fault.WORKER_KILL
        hit = self._suspend(worker) if kind is Fault.WORKER_STOP else send(worker.process, kind.signal)
        self._aimed[worker.block] += hit
        return made if hit else None

    def _suspend(self, worker: Worker) -> bool:
        """Stop a worker for a while and let it go on; whether it was there for both."""
        stopped = send(worker.process, signal.SIGSTOP)
        time.sleep(self.dice.uniform(*PAUSE_S))
        return send(worker.process, signal.SIGCONT) and stopped

    def _hit_controller(self, run: Run, command: "subprocess.Popen[bytes]", kind: Fault) -> Fault | None:
        there = controllers(command.pid)
        if not there or not send(self.dice.choice(there), kind.signal):
            return None
        self._aimed[None] += 1  # every block that was training then begins another attempt
        return kind

    def _hit_command(self, run: Run, command: "subprocess.Popen[bytes]", kind: Fault) -> Fault | None:
        # before its lock is there, there is nothing to continue
        if not run.store.exists(LOCK) or command.poll() is not None:
            return None
        command.send_signal(kind.signal)
        self._command_hit = True
        return kind

    def _shards(self, label: str) -> dict[str, bytes]:
        """Content of every shard of each block's own last step, if it has come so far."""
        run, training = self._folder(label) / self.config.name, self.config.training
        last = [f"{block:02d}/{step_name(training.of_block(block).steps)}" for block in range(self.config.blocks)]
        paths = [path for step in last for path in (run / BLOCKS / step).glob("*.safetensors")]
        return {str(path.relative_to(run)): path.read_bytes() for path in paths}
