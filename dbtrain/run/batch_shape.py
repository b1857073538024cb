"""How the effective batch of a block is cut over its workers, and which data can be augmented."""

from dataclasses import dataclass

from dbtrain.config import AugmentationConfig, TrainingConfig
from dbtrain.data.splits import LabelledImages, Split
from dbtrain.errors import ConfigError


@dataclass(frozen=True)
class BatchShape:
    """How the effective batch is cut: workers x accumulation x micro-batch."""

    workers: int
    accumulation: int
    micro_batch: int

    @property
    def batch_size(self) -> int:
        """Samples of a step."""
        return self.workers * self.accumulation * self.micro_batch


def block_batch(training: TrainingConfig, block: int, workers: int, micro_batch: int | None) -> BatchShape:
    """Cut the effective batch of a block; a block may have a batch size of its own.

    Raises:
        ConfigError: it cannot be cut evenly.
    """
    own = training.blocks.get(block)
    key = "training" if own is None or own.batch_size is None else f"training.blocks.{block}"
    return cut_batch(training.of_block(block).batch_size, workers, micro_batch, f"{key}.batch_size")


def cut_batch(batch_size: int, workers: int, micro_batch: int | None, key: str = "training.batch_size") -> BatchShape:
    """Cut an effective batch; `key` is where the configuration sets it.

    Raises:
        ConfigError: it cannot be cut evenly.
    """
    if batch_size % workers:
        raise ConfigError(f"{key}={batch_size} cannot be shared by {workers} workers: make it a multiple")
    share = batch_size // workers
    micro = micro_batch or share
    if share % micro:
        raise ConfigError(
            f"micro_batch={micro} does not divide a worker's share of {share} samples "
            f"({key}={batch_size} over {workers} workers)"
        )
    return BatchShape(workers, share // micro, micro)


def check_augmentation(augmentation: AugmentationConfig, split: Split) -> None:
    """Raise ConfigError if augmentation is asked for and the samples are not images."""
    if (augmentation.shift or augmentation.flip) and not isinstance(split, LabelledImages):
        raise ConfigError(f"training.augmentation ({augmentation}) is for images: leave it out for this data")
