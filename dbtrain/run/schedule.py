"""The learning rate of a block: a function of the step, and of how the run was extended. It needs no state.

Every method trains by it, isolated blocks and baselines alike: `RunPlan.schedule` makes it,
and the training loop asks it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dbtrain.config import TrainingConfig
from dbtrain.config.training import BlockTraining
from dbtrain.shards.extension import Extension, Lengths, Stretch


def cosine(step: int, steps: int, warmup: int, final: float, decay: float = 0.0) -> float:
    """Linear warm-up from 1/warmup to 1, then a cosine to `final` at the last step; `decay` is not used."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_stable_decay(step: int, steps: int, warmup: int, final: float, decay: float) -> float:
    """Linear warm-up to 1, which stays until the last `decay` of the steps, in which it falls to `final`.

    The three phases are those of MiniCPM  # arXiv 2404.06395, section 4.2
    The fall is 1 minus the root of the progress  # arXiv 2405.18392, equation (1)
    """
    if step < warmup:
        return (step + 1) / warmup
    begins = decay_begins(steps, warmup, decay)
    if step < begins:
        return 1.0
    progress = (step - begins) / max(1, steps - begins)
    return final + (1 - final) * (1 - math.sqrt(min(1.0, progress)))


def decay_begins(steps: int, warmup: int, decay: float) -> int:
    """Steps done when the decay of `warmup_stable_decay` begins."""
    return max(warmup, steps - round(decay * steps))


CURVES: Mapping[str, Callable[[int, int, int, float, float], float]] = {"cosine": cosine, "wsd": warmup_stable_decay}
"""Curves by `training.optimizer.schedule`: (step, steps, warmup, final, decay) -> share of the peak rate."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of one block over all its steps.

    An extension that begins at the step `start` follows the curve that a run of the new length would have had
    from its first step on. If the earlier schedule had already fallen, the rate first climbs to that curve,
    in a straight line over `rewarm` steps from the rate that was reached  # re-warming: arXiv 2308.04014
    """

    curve: str
    """Key of `CURVES`."""
    steps: int
    """Steps of the block when the run was prepared."""
    warmup: int
    final: float
    decay: float
    stretches: tuple[Stretch, ...] = ()
    """Parts that extensions added, in their order."""

    def scale(self, step: int) -> float:
        """Share of the peak rate at the step after `step` steps."""
        newest = next((n for n, s in reversed(list(enumerate(self.stretches))) if s.start <= step), None)
        if newest is None:
            return self._of_length(self.steps, step)
        stretch = self.stretches[newest]
        there, since = self._of_length(stretch.end, step), step - stretch.start + 1
        if since >= stretch.rewarm:
            return there
        before = replace(self, stretches=self.stretches[:newest]).scale(stretch.start)
        return before + (there - before) * since / stretch.rewarm

    @property
    def end(self) -> int:
        """Steps after which the block is done."""
        return self.stretches[-1].end if self.stretches else self.steps

    @property
    def held(self) -> int | None:
        """Steps after which a checkpoint is made and kept, so that an extension can go on from it: where the
        stable phase ends. None where there is no such phase."""
        if self.curve != "wsd":
            return None
        begins = decay_begins(self.end, self.warmup, self.decay)
        stable = self.stretches[-1].start + self.stretches[-1].rewarm if self.stretches else self.warmup
        return begins if stable <= begins and 0 < begins < self.end else None

    def agrees(self, other: "Schedule", steps: int) -> bool:
        """Whether both train the first `steps` steps alike."""
        return self._pieces(steps) == other._pieces(steps)

    def extended(self, block: int, steps: int, held: bool) -> Stretch | None:
        """How the schedule goes on to `steps` steps; None if it is as long already.

        Args:
            block: number of the block whose schedule it is.
            steps: steps after which the block shall be done, not fewer than now.
            held: whether there is a checkpoint from before its decay, from which it can go on.
        """
        if steps == self.end:
            return None
        if held and self.held is not None:
            return Stretch(block, self.held, steps, 0)
        longer = steps - self.end
        if self.end <= self.warmup:  # the rate has not fallen yet
            return Stretch(block, self.end, steps, 0)
        return Stretch(block, self.end, steps, min(longer, round(self.warmup * longer / self.steps)))

    def _of_length(self, steps: int, step: int) -> float:
        return CURVES[self.curve](step, steps, self.warmup, self.final, self.decay)

    def _pieces(self, steps: int) -> tuple[object, ...]:
        return (replace(self, stretches=tuple(s for s in self.stretches if s.start < steps)),)


def lengths_of(training: TrainingConfig) -> Lengths:
    """How long the blocks are trained."""
    return Lengths(training.steps, {block: own.steps for block, own in training.blocks.items() if own.steps})


def in_words(lengths: Lengths) -> str:
    """Lengths as overrides say them."""
    own = [f"training.blocks.{block}.steps={steps}" for block, steps in sorted(lengths.blocks.items())]
    return " ".join([f"training.steps={lengths.steps}", *own])


def with_lengths(training: TrainingConfig, lengths: Lengths) -> TrainingConfig:
    """The section with other lengths; a block's own section is left out if it has no other exception."""
    blocks = {}
    for block in sorted({*training.blocks, *lengths.blocks}):
        own = training.blocks.get(block, BlockTraining()).model_copy(update={"steps": lengths.blocks.get(block)})
        if own.model_dump(exclude_none=True):
            blocks[block] = own
    return training.model_copy(update={"steps": lengths.steps, "blocks": blocks})


def first_training(training: TrainingConfig, extensions: Sequence[Extension]) -> TrainingConfig:
    """The section `training` as it was when the run was prepared."""
    return with_lengths(training, extensions[0].before) if extensions else training


def schedule_of(training: TrainingConfig, extensions: Sequence[Extension], block: int) -> Schedule:
    """The schedule of a block.

    Args:
        training: the section `training` of the run as it is now.
        extensions: extensions of the run, in their order.
        block: its number; 0 where one job trains all blocks.
    """
    own = first_training(training, extensions).of_block(block)
    stretches = tuple(s for extension in extensions for s in extension.stretches if s.block == block)
    optimizer = own.optimizer
    return Schedule(optimizer.schedule, own.steps, optimizer.warmup, optimizer.final_lr, optimizer.decay, stretches)
