"""Which metrics there are: how each is measured on a split, and how it is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dbtrain.config import EvaluationConfig
from dbtrain.data.splits import Split
from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.elbo import elbo_bits
from dbtrain.evaluation.merged import MergedModel


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    label: str
    """As people call it, with its unit."""
    better: Literal["higher", "lower"]
    measure: Callable[[MergedModel, Split, EvaluationConfig], dict[str, float]]
    """(model, split, section) -> score by readout."""
    percent: bool = False
    """Whether scores are shares, which people read in percent."""

    def write(self, score: float) -> str:
        """A score as people read it."""
        return f"{100 * score:.2f}" if self.percent else f"{score:.4f}"


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy %", "higher", accuracy, percent=True),
    "elbo_bits": Metric("bits a token (ELBO)", "lower", elbo_bits),
}
