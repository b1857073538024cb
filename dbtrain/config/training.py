"""Section `training`, with the optimizer."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dbtrain.config.section import ByBlock, Count, Positive, Section, Share


class OptimizerConfig(Section):
    """AdamW, or Muon for the layers' matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    muon_lr: Positive = 0.02
    betas: tuple[Share, Share] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Curve of the rate after the warm-up: a cosine to `final_lr`; or `wsd` (warmup-stable-decay): the peak
    rate until the last part, in which it falls to `final_lr`. A `wsd` run that `dbtrain extend` makes longer
    goes on as if it had been planned that long from the beginning; the rate of a cosine has to climb
    again."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up."""
    decay: Share = 0.1
    """Share of all steps in which the rate falls under `wsd`; the checkpoint before it is kept."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step as a share of the peak."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Greatest gradient norm; 0 for none."""

    @model_validator(mode="after")
    def _muon_is_not_clipped(self) -> "OptimizerConfig":
        # DeepSpeed clips Muon's orthogonalised update together with AdamW's gradients under ZeRO,
        # and not without it
        if self.name == "muon" and self.clip:
            raise ValueError(f"optimizer.name=muon needs optimizer.clip=0, not {self.clip}: its updates have unit norm")
        return self


class BlockTraining(Section):
    """What one block does otherwise; unset values are those of `training` and `training.optimizer`."""

    added_later: ClassVar[tuple[str, ...]] = ("steps", "batch_size", "ema")
    """Keys that count only where they are set, so that runs from before there were any go on."""

    lr: Positive | None = None
    muon_lr: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    steps: Count | None = None
    """Steps of this block. Its warm-up is stretched by the same factor, and so takes the same share of them
    as in the other blocks."""
    batch_size: Count | None = None
    """Effective batch of this block; the learning rate stays as it is."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None


def steps_of(training: Mapping[str, Any], block: int) -> int:
    """Optimizer steps after which a block is done: its own where it has some, else those of all.

    Args:
        training: the section, as JSON.
        block: number of the block.
    """
    own = training.get("blocks", {}).get(str(block), {})
    return int(own.get("steps") or training["steps"])


class AugmentationConfig(Section):
    """Random changes to training images, drawn anew every time."""

    shift: Annotated[int, Field(ge=0)] = 0
    """Pixels by which an image is moved at most, each way; what comes in is black."""
    flip: bool = False
    """Mirror half of the images, left to right."""


class TrainingConfig(Section):
    """How each block is trained."""

    steps: Count = 600
    batch_size: Count = 128
    """Effective batch: over all workers of a block and all micro-batches."""
    micro_batch: Count | None = None
    """Samples a worker takes at once; by default its whole share of the batch."""
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    blocks: ByBlock[BlockTraining] = {}
    """Exceptions for single blocks. Nothing couples them: a slice with noisier gradients wants a lower
    `lr` or a larger batch, and one that still learns when the others no longer do wants more steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    """`optimizer`: its states to host memory (ZeRO 1 to 3); `all`: the parameters too (ZeRO 3)."""
    deterministic: bool = True
    """Whether a step gives the same bits each time, which resuming bitwise needs. `false` is faster on some
    GPUs and models (docs/benchmarks.md has the price): a block that was killed then ends as another training
    with the same seed would, equally good but not in the same bits."""
    compile: bool = False
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass,
    and compute the rest again: less memory, more time."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights; 0 for none."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two measurements of each block's loss on validation samples of its own slice, by its
    averaged weights if it has some; 0 for none. No bit of the training depends on it."""
    checkpoint_every: Count = 200
    keep: Annotated[int, Field(ge=2)] = 2
    keep_optimizer: bool = True
    """Whether a block that is done keeps its optimizer's state and `keep` checkpoints. Without it one
    verified checkpoint of its weights and averages stays: if that is damaged the block has to be trained
    again, and training it on needs `cluster.restart_optimizer`."""
    log_every: Count = 20

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "TrainingConfig":
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("training.offload needs training.zero_stage of 1 or more")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("training.offload=all needs training.zero_stage=3")
        return self

    def of_block(self, block: int) -> "TrainingConfig":
        """What holds for one block, with its exceptions."""
        own = self.blocks.get(block, BlockTraining()).model_dump(exclude_none=True, exclude={"steps"})
        stretched = self.over(steps_of(self.model_dump(mode="json", include={"steps", "blocks"}), block))
        beside: dict[str, Any] = {key: own.pop(key) for key in ("batch_size", "ema") if key in own}
        return stretched.model_copy(update=beside | {"optimizer": stretched.optimizer.model_copy(update=own)})

    def over(self, steps: int) -> "TrainingConfig":
        """The same schedule over other steps: a warm-up that stayed as long would eat a short training."""
        warmup = round(self.optimizer.warmup * steps / self.steps)
        return self.model_copy(
            update={"steps": steps, "optimizer": self.optimizer.model_copy(update={"warmup": warmup})}
        )
