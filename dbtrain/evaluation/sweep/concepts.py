"""Concept sets: labels with an order, and the prompts in which they stand. Written as YAML."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dbtrain.errors import ConfigError, first_line

Order = Literal["cyclic", "linear", "none"]
SHIPPED = ("weekdays", "months", "letters", "numbers")
BLANK = "{}"
LEAST = 4
"""Least number of labels: fewer have too few orders for a permutation test to find anything."""


class ConceptSet(BaseModel):
    """What one sweep asks about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    labels: Annotated[list[str], Field(min_length=LEAST)]
    """Labels of the concepts, in their order if they have one."""
    order: Order = "none"
    """`cyclic`: the last one is beside the first."""
    templates: Annotated[list[str], Field(min_length=1)]
    """Texts with one ``{}`` for a label; they end where the model is to go on."""
    spellings: dict[str, list[str]] = Field(default_factory=dict)
    """Other ways to write a label; they are put into the templates too."""

    @model_validator(mode="after")
    def _fits(self) -> "ConceptSet":
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label is there twice")
        if wrong := [template for template in self.templates if template.count(BLANK) != 1]:
            raise ValueError(f"the template {wrong[0]!r} needs {BLANK} exactly once, where the label stands")
        if unknown := sorted(set(self.spellings) - set(self.labels)):
            raise ValueError(f"spellings names {unknown[0]!r}, which is no label")
        return self

    def prompts(self) -> list[tuple[int, int, str]]:
        """(number of the label, number of the template, text)."""
        return [
            (number, place, template.replace(BLANK, spelling))
            for number, label in enumerate(self.labels)
            for place, template in enumerate(self.templates)
            for spelling in (label, *self.spellings.get(label, ()))
        ]


def order_distances(count: int, order: Order) -> NDArray[np.float64] | None:
    """How far labels are apart in their order (count, count); None if they have none."""
    if order == "none":
        return None
    steps = np.abs(np.subtract.outer(np.arange(count), np.arange(count))).astype(np.float64)
    return np.minimum(steps, count - steps) if order == "cyclic" else steps


def concept_sets(given: Sequence[str]) -> list[ConceptSet]:
    """Concept sets by their names, if they are shipped, or from YAML files.

    Raises:
        ConfigError: there is no such set, or its file is wrong.
    """
    return [_read(name) for name in given]


def _read(given: str) -> ConceptSet:
    where = given
    try:
        if given in SHIPPED:
            text = files("dbtrain.evaluation.sweep").joinpath("concepts").joinpath(f"{given}.yaml").read_text("utf-8")
        else:
            text = Path(given).read_text("utf-8")
        return ConceptSet.model_validate(yaml.safe_load(text))
    except OSError as error:
        raise ConfigError(
            f"--concepts {where} cannot be read ({error.strerror}): give a YAML file, or one of {', '.join(SHIPPED)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--concepts {where} is no YAML: {first_line(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--concepts {where}: {f'{at}: ' if at else ''}{said}") from None
