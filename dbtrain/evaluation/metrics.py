"""Which metrics there are: how each is measured on a split, and how it is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dbtrain.config import Config, EvaluationConfig
from dbtrain.data.splits import DataSet, Split
from dbtrain.errors import ConfigError
from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.images.frechet import Begun, frechet_classifier, frechet_inception
from dbtrain.evaluation.images.inception import check_inception
from dbtrain.evaluation.images.schedulers import check_config
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.text.bits import bits
from dbtrain.evaluation.text.elbo import elbo_bits
from dbtrain.evaluation.text.generated import describe_judge, generated
from dbtrain.method.interface import BlockModel
from dbtrain.models.registry import architecture

Begin = Callable[[MergedModel, DataSet, EvaluationConfig], Begun]

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    label: str
    """Name of the metric for people, with its unit."""
    better: Better | Mapping[str, Better]
    """Which direction is better: for every readout alike; or, if they differ, for each readout where it is
    known."""
    begin: Begin
    """(model, data, section) -> (split -> score by readout, what a score depends on besides model and data);
    what the splits have in common is made once."""
    fits: Callable[[type[BlockModel]], bool]
    """Whether it is for an architecture, from what its class says that it can do."""
    check: Callable[[Config], None] = lambda config: None
    """Raises ConfigError if something that it needs is missing,
    so that this shows before anything is trained."""
    draws: bool = False
    """Whether it draws `evaluation.samples` samples from noise."""
    percent: bool = False
    """Whether scores are shares, which people read in percent."""

    def write(self, score: float) -> str:
        """A score as people read it."""
        return f"{100 * score:.2f}" if self.percent else f"{score:.4f}"

    def direction(self, readout: str) -> str:
        """Which direction is better, as a note to a readout; '' if it is the same for all, or not known."""
        known = self.better.get(readout) if isinstance(self.better, Mapping) else None
        return f" ({known} is better)" if known else ""


def _plain(
    measure: Callable[[MergedModel, Split, EvaluationConfig], dict[str, float]],
    describe: Callable[[EvaluationConfig], dict[str, Any]] = lambda section: {},
) -> Begin:
    """The `begin` of a metric that prepares nothing for all splits together."""

    def begin(model: MergedModel, data: DataSet, section: EvaluationConfig) -> Begun:
        return lambda split: measure(model, split, section), describe(section)

    return begin


GENERATED_BETTER: Mapping[str, Better] = {
    "perplexity": "lower",
    "distinct_2": "higher",
    "mauve": "higher",
    "ngram_mauve": "higher",
}
"""Directions for generated texts. Entropy has none: it should be that of real texts. Readouts of real texts
(``text_...``) have none, as they are no scores."""


def _draws_images(kind: type[BlockModel]) -> bool:
    return kind.samples == "image"


def _check_inception(config: Config) -> None:
    check_config(config)
    check_inception(config)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy %", "higher", _plain(accuracy), lambda kind: kind.classifies, percent=True),
    # `bits` needs next-token likelihoods, which a masked model lacks; `elbo` is a bound that only masking has
    "bits": Metric("bits a character", "lower", _plain(bits), lambda kind: kind.likelihood == "next_token"),
    "elbo_bits": Metric("bits a character (ELBO)", "lower", _plain(elbo_bits), lambda kind: kind.likelihood == "elbo"),
    "generated": Metric(
        "generated texts", GENERATED_BETTER, _plain(generated, describe_judge), lambda kind: kind.continues is not None
    ),
    "frechet_classifier": Metric(
        "Frechet classifier distance", "lower", frechet_classifier, _draws_images, check_config, draws=True
    ),
    "frechet_inception": Metric("FID", "lower", frechet_inception, _draws_images, _check_inception, draws=True),
}


def metric_of(config: Config) -> tuple[str, Metric]:
    """Name and row of the metric of a run: the one asked for, or the first that fits its architecture.

    Raises:
        ConfigError: there is none of that name, it is not for this architecture,
            or something that it needs is missing.
    """
    arch = config.model.arch
    fitting = [name for name, metric in METRICS.items() if metric.fits(architecture(arch))]
    if not fitting:
        raise ConfigError(f"model.arch={arch} neither classifies, nor draws images, nor writes text: no metric fits it")
    name = config.evaluation.metric or fitting[0]
    if name not in METRICS:
        raise ConfigError(
            f"evaluation.metric={name!r} is none of {', '.join(METRICS)}: set it to one of those that fit "
            f"model.arch={arch}: {', '.join(fitting)}, or leave it out"
        )
    if name not in fitting:
        raise ConfigError(f"evaluation.metric={name} does not fit model.arch={arch}: set it to {', '.join(fitting)}")
    METRICS[name].check(config)
    return name, METRICS[name]
