"""The training loop of a worker: step, average, log, commit, until the last step or a request to stop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from dbtrain.config import TrainingConfig
from dbtrain.errors import NonFiniteLossError
from dbtrain.run.schedule import Schedule
from dbtrain.training.batches import Batches
from dbtrain.training.engine import Engine
from dbtrain.training.host_copies import Snapshot

Outcome = Literal["done", "stopped"]
KEEPS = "this block stops and keeps its last good checkpoint:"
REMEDY = "lower training.optimizer.lr, set training.optimizer.clip, or look at the data of that step"


class Observer(Protocol):
    """What the loop tells the outside."""

    def before_step(self, step: int) -> None:
        """Called before every step with the number of steps done so far."""

    def see_loss(self, step: int, loss: Tensor) -> Tensor:
        """Called with the loss of every step, which it returns; a test may damage it."""

    def progress(self, step: int, report: "Report") -> None:
        """What the steps up to `step` were like."""

    def validate(self, step: int) -> None:
        """Measure the block after `step` steps, a collective of its workers, and leave it as it is."""

    def commit(self, step: int, take: Callable[[], Snapshot], loss: float) -> None:
        """Take a snapshot, a collective of the block's workers, after `step` steps, and store it.

        One that is still waiting to be written may be dropped for it.
        """


@dataclass(frozen=True)
class Report:
    """One log interval."""

    loss: float
    """Mean over its steps."""
    seconds: float
    steps: int
    lr: float
    """Learning rate of its last step; with Muon, that of the parameters which AdamW has."""
    grad_norm: float | None
    """Norm of the gradient of its last step, before clipping; None where nothing measures it."""


@dataclass
class Window:
    """Losses and gradient norms since the last report, kept on the device: reading each would stall it."""

    since: float
    seen: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Take those of one step, scalars."""
        self.seen.append(torch.stack([loss.float(), norm.to(loss.device, non_blocking=True)]))

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What is done here is no part of the steps, and its time not of theirs."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def close(self, step: int) -> tuple[float, float, int, float]:
        """(mean loss, seconds, steps, norm of the last step's gradient), and start anew.

        Raises:
            NonFiniteLossError: with the first step whose loss or gradient was not finite.
        """
        values = torch.stack(self.seen).tolist()
        for at, (loss, norm) in enumerate(values, step - len(values) + 1):
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise NonFiniteLossError(f"the {what} of step {at} is {value}; {KEEPS} {REMEDY}")
        now = time.monotonic()
        seconds, self.since, self.seen = now - self.since, now, []
        return sum(loss for loss, _ in values) / len(values), seconds, len(values), values[-1][1]


def train(
    engine: Engine,
    batches: Batches,
    config: TrainingConfig,
    schedule: Schedule,
    start: int,
    observer: Observer,
    should_stop: Callable[[int], bool],
) -> Outcome:
    """Train from `start` steps done to ``config.steps``; commits are handed over on the way and at the end.

    They are durable once the writer is closed.

    Raises:
        NonFiniteLossError: a loss, a gradient or what would be committed was not finite;
            nothing after the last good commit is kept.
    """
    step, committed = start, start
    window = Window(time.monotonic())
    loss = math.nan
    while step < config.steps:
        observer.before_step(step)
        scale = schedule.scale(step)
        engine.set_lr(scale)
        micro = [engine.accumulate(*inputs) for inputs in batches.micro_batches(step)]
        window.add(observer.see_loss(step, torch.stack(micro).mean()), engine.gradient_norm)
        step += 1
        engine.update_ema(step)
        stopping = should_stop(step)
        commits = stopping or step in (config.steps, schedule.held) or step % config.checkpoint_every == 0
        if commits or step % config.log_every == 0:
            loss, seconds, count, norm = window.close(step)
            lr, shown = config.optimizer.lr * scale, norm if engine.norm_is_of_gradient else None
            observer.progress(step, Report(loss, seconds, count, lr, shown))
        if validates(step, config) and not stopping:
            with window.left_out():
                observer.validate(step)
        if commits:
            _refuse_non_finite(engine, step)
            # handed to the writer: durable later, or replaced by a newer one
            observer.commit(step, engine.snapshot, loss)
            committed = step
        if stopping and step < config.steps:
            return "stopped"
    assert committed == config.steps
    return "done"


def validates(step: int, config: TrainingConfig) -> bool:
    """Whether the block is measured after this step: at the end too, if it is measured at all."""
    return config.validate_every > 0 and (step % config.validate_every == 0 or step == config.steps)


def _refuse_non_finite(engine: Engine, step: int) -> None:
    # loss and gradient can be finite and what they made of a weight or a moment not:
    # it must not push a good commit out
    wrong = engine.non_finite()
    if wrong:
        raise NonFiniteLossError(f"{wrong} is not finite after step {step}, though the loss was; {KEEPS} {REMEDY}")
