"""Kill what a run consists of at random, run after run, and demand the bits of an undisturbed one every time."""

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
from dbtrain.experiments.tally import WEIGHTS, Tally, difference
from dbtrain.experiments.victims import Worker, await_commit, controllers, send, workers
from dbtrain.shards.storage.store import Store

PATIENT = ("cluster.max_crashes=100000", "cluster.max_preemptions=100000", "cluster.backoff_s=0.01")
"""Faults come faster here than progress, which budgets are there to notice."""
PAUSE_S = (0.2, 3.0)
"""Shortest and longest time for which a worker is stopped by SIGSTOP."""
LONGEST_RUN_S = 900.0
"""After the faults have ended."""
POLL_S = 0.1


class Punisher:
    """Runs of one configuration under faults at exponential intervals.

    Args:
        arguments: of the train command: configuration file and overrides.
        config: what they say; its ``out`` must be a local directory.
        mtbf_s: mean time between faults, in seconds.
        seed: of the times and kinds of the faults; what they hit depends on the machine, so no run repeats exactly.
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
        self._kind: str | None = None
        folder = self._folder("")
        if folder.exists():
            raise ConfigError(f"{folder} exists: remove it, or give another name or out")
        folder.mkdir(parents=True)

    def punish(self, runs: int) -> Tally:
        """One undisturbed run, then `runs` disturbed ones, or fewer if the time is over.

        Raises:
            IncompleteRunError: the undisturbed run does not succeed, or no fault could be made, which proves nothing.
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
        run = Store(str(self._folder(label) / self.config.name))
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

    def _lost(self, run: Store, starts: int) -> str | None:
        """A block that began anew more often than it, or the command, was hit has suffered from another's fault."""
        for block in range(self.config.blocks):
            attempts = len(run.child("blocks", f"{block:02d}", "attempts").list())
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

    def _fault(self, run: Store, command: "subprocess.Popen[bytes]") -> bool:
        """Make one fault; False when there was nothing to hit: the same kind then waits for its victim.

        Were another one drawn, a command that has no workers yet would nearly always be the one that is hit.
        """
        kind = self._kind = self._kind or self.dice.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        target, what = kind.split(" ", 1)
        done: str | None = None
        found = workers(run, command.pid) if target == "worker" else []
        if found:
            worker = self.dice.choice(found)
            done = self._hit_worker(run, worker, what)
            self._aimed[worker.block] += done is not None
        elif target == "controller":
            there = controllers(command.pid)
            done = kind if there and send(self.dice.choice(there), signal.SIGKILL) else None
            self._aimed[None] += done is not None  # which block's it was is not known
        # before its lock is there, there is nothing to continue
        elif target == "command" and run.exists("LOCK.json") and command.poll() is None:
            command.send_signal(signal.Signals[what])
            self._command_hit, done = True, kind
        if done:
            self.tally.faults[done] += 1
            self._kind = None
        return done is not None

    def _hit_worker(self, run: Store, worker: Worker, what: str) -> str | None:
        """The kind of the fault that was made, which may be simpler than what was wanted."""
        if what == "SIGKILL in a commit":
            committing = await_commit(run, worker.block)
            hit = send(worker.process, signal.SIGKILL)
            return ("worker SIGKILL in a commit" if committing else "worker SIGKILL") if hit else None
        if what.startswith("SIGSTOP"):
            hit = send(worker.process, signal.SIGSTOP)
            time.sleep(self.dice.uniform(*PAUSE_S))
            return f"worker {what}" if send(worker.process, signal.SIGCONT) and hit else None
        return f"worker {what}" if send(worker.process, signal.Signals[what]) else None

    def _shards(self, label: str) -> dict[str, bytes]:
        run, last = self._folder(label) / self.config.name, f"step_{self.config.training.steps:08d}"
        return {str(path.relative_to(run)): path.read_bytes() for path in run.glob(f"blocks/*/{last}/*.safetensors")}
