"""What a worker does: step, average, log, commit, until the last step or until it is asked to stop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dbtrain.config import TrainingConfig
from dbtrain.errors import NonFiniteLossError
from dbtrain.training.engine import Engine
from dbtrain.training.feed import Feed
from dbtrain.training.optimizer import lr_scale

Outcome = Literal["done", "stopped"]


class Observer(Protocol):
    """What the loop tells the outside."""

    def before_step(self, step: int) -> None:
        """Called before every step with the number of steps done so far."""

    def see_loss(self, step: int, loss: Tensor) -> Tensor:
        """Called with the loss of every step, which it returns; a test may damage it."""

    def progress(self, step: int, report: "Report") -> None:
        """What the steps up to `step` were like."""

    def commit(self, step: int, parts: dict[str, dict[str, Tensor]], loss: float) -> None:
        """Take a snapshot after `step` steps to the store."""


@dataclass(frozen=True)
class Report:
    """One log interval."""

    loss: float
    """Mean over its steps."""
    seconds: float
    steps: int
    lr: float
    """Of its last step; with Muon, that of the parameters which AdamW has."""
    grad_norm: float | None
    """Of its last step, before clipping; None where nothing measures it."""


@dataclass
class Window:
    """Losses since the last report, kept on the device: reading each would stall it."""

    losses: list[Tensor]
    since: float

    def close(self, step: int) -> tuple[float, float, int]:
        """(mean loss, seconds, steps), and start anew.

        Raises:
            NonFiniteLossError: with the first step whose loss was not finite.
        """
        values = torch.stack(self.losses).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                at = step - len(values) + offset + 1
                raise NonFiniteLossError(
                    f"the loss of step {at} is {value}; this block stops and keeps its last good checkpoint: lower "
                    "training.optimizer.lr, set training.optimizer.clip, or look at the data of that step"
                )
        now = time.monotonic()
        seconds, self.since, self.losses = now - self.since, now, []
        return sum(values) / len(values), seconds, len(values)


def train(
    engine: Engine,
    feed: Feed,
    config: TrainingConfig,
    start: int,
    observer: Observer,
    should_stop: Callable[[int], bool],
) -> Outcome:
    """Train from `start` steps done to ``config.steps``, committing on the way and before returning.

    Raises:
        NonFiniteLossError: a loss was not finite; nothing after the last good commit is kept.
    """
    step, committed = start, start
    window = Window([], time.monotonic())
    loss = math.nan
    while step < config.steps:
        observer.before_step(step)
        scale = lr_scale(step, config.steps, config.optimizer.warmup, config.optimizer.final_lr)
        engine.set_lr(scale)
        engine.measures_norm = _reported(step + 1, config)
        micro = [engine.accumulate(*inputs) for inputs in feed.micro_batches(step)]
        window.losses.append(observer.see_loss(step, torch.stack(micro).mean()))
        step += 1
        engine.update_ema(step)
        stopping = should_stop(step)
        last = stopping or step == config.steps
        if _reported(step, config) or last:
            loss, seconds, count = window.close(step)
            lr = config.optimizer.lr * scale
            observer.progress(step, Report(loss, seconds, count, lr, engine.grad_norm()))
        if step % config.checkpoint_every == 0 or last:
            # a commit makes a step impossible to lose; the snapshot is a collective of the block's workers
            observer.commit(step, engine.snapshot(), loss)
            committed = step
        if stopping and step < config.steps:
            return "stopped"
    assert committed == config.steps
    return "done"


def _reported(step: int, config: TrainingConfig) -> bool:
    return step % config.checkpoint_every == 0 or step % config.log_every == 0 or step == config.steps
