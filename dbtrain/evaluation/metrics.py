"""Which metrics there are: how each is measured on a split, and how it is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dbtrain.config import Config, EvaluationConfig
from dbtrain.data.splits import Split
from dbtrain.errors import ConfigError
from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.bits import bits
from dbtrain.evaluation.elbo import elbo_bits
from dbtrain.evaluation.frechet import describe_classifier, frechet_classifier, frechet_inception
from dbtrain.evaluation.generated import describe_judge, generated
from dbtrain.evaluation.merged import MergedModel
from dbtrain.models.registry import architecture


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
    describe: Callable[[MergedModel, EvaluationConfig], dict[str, Any]] | None = None
    """What a score depends on besides model and data; kept beside the scores."""

    def write(self, score: float) -> str:
        """A score as people read it."""
        return f"{100 * score:.2f}" if self.percent else f"{score:.4f}"


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy %", "higher", accuracy, percent=True),
    "bits": Metric("bits a character", "lower", bits),
    "elbo_bits": Metric("bits a character (ELBO)", "lower", elbo_bits),
    "generated": Metric("generated texts", "lower", generated, describe=describe_judge),
    "frechet_classifier": Metric(
        "Frechet classifier distance", "lower", frechet_classifier, describe=describe_classifier
    ),
    "frechet_inception": Metric("FID", "lower", frechet_inception),
}


def metric_of(config: Config) -> tuple[str, Metric]:
    """Name and row of the metric of a run: the one asked for, or its architecture's.

    Raises:
        ConfigError: there is none of that name.
    """
    name = config.evaluation.metric or architecture(config.model.arch).metric
    if name not in METRICS:
        raise ConfigError(f"evaluation.metric={name!r} is none of {', '.join(METRICS)}")
    return name, METRICS[name]
