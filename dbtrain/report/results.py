"""What was measured on the merged model of a run; what was measured on another one is left out, and told."""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from dbtrain.errors import DbtrainError, ShardError
from dbtrain.evaluation.images.drawn import Drawn, read_drawn
from dbtrain.evaluation.images.pictures import PICTURE
from dbtrain.evaluation.kept import SCORES, kept
from dbtrain.evaluation.losses import Point
from dbtrain.evaluation.metrics import METRICS, Metric
from dbtrain.evaluation.sweep.sweep import SWEEP, Sweep
from dbtrain.evaluation.text.kept_texts import TEXTS, KeptText, kept_texts
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import CONFIG, MergedDirectory

MOST_PICTURE_BYTES = 8 << 20
"""A larger samples.png would make the page heavy: it is named, not shown."""
LOSSES = "losses.json"
Found = TypeVar("Found")


@dataclass
class Reader:
    """Reads one thing after the other; what fails is told."""

    told: list[str] = field(default_factory=list)
    """What could not be read, one line each."""
    outdated: list[tuple[str, str]] = field(default_factory=list)
    """What is of another model than the one that is merged now, and the command that makes it anew."""

    def attempt(self, read: Callable[[], Found], otherwise: Found) -> Found:
        """What a call gives, or `otherwise` if it ends in an error of the run's files."""
        try:
            return read()
        except DbtrainError as error:
            self.told.append(str(error))
            return otherwise


@dataclass(frozen=True)
class Evaluation:
    """What ``dbtrain eval`` keeps in evaluation.json."""

    metric: str
    """Key of `METRICS`."""
    scores: dict[str, dict[str, float]]
    """Scores by split, then by readout."""
    unfinished: str = ""
    """How far the blocks were, if they were not done."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Samples of each split; empty in a file of before."""
    weights: str = ""
    """Hash of the model that was measured, `MergedDirectory.weights_hash`; '' in a file of before."""

    @property
    def row(self) -> Metric:
        """How the metric is written; KeyError if this version has none of that name."""
        return METRICS[self.metric]

    @property
    def test(self) -> dict[str, float]:
        """Scores of the test split by readout; empty if it was not measured."""
        return self.scores.get("test", {})


@dataclass(frozen=True)
class Picture:
    """The samples of a run."""

    content: str
    """samples.png in base64."""
    drawn: Drawn | None
    """How they were drawn; None in a file of before."""


class Results:
    """The results of a run, each of which names the model that it is of.

    Args:
        run: the run.
        reader: is told what is damaged, and what is of another model.
    """

    def __init__(self, run: Run, reader: Reader) -> None:
        self.run, self.reader = run, reader

    @cached_property
    def _weights(self) -> str:
        """Hash of the model that is merged now; '' if there is none, or it cannot be read."""
        if not self.run.merged.exists(CONFIG):
            return ""
        return self.reader.attempt(lambda: MergedDirectory(self.run.merged).weights_hash, "")

    def _other_model(self, weights: str) -> bool:
        """Whether a result is of another model than the merged one; not known of files that name none."""
        return bool(weights and self._weights and weights != self._weights)

    def _left_out(self, name: str, command: str, what: str = "") -> None:
        place = f"{self.run.manifest.name}/{name}"
        self.reader.outdated.append((f"{what} in {place}" if what else place, f"dbtrain {command}"))

    def evaluation(self) -> Evaluation | None:
        """The scores."""
        found = self.reader.attempt(lambda: kept(self.run, SCORES, Evaluation, "dbtrain eval"), None)
        if found is not None and found.metric not in METRICS:
            self.reader.told.append(f"{self.run.store.where(SCORES)} has the metric {found.metric!r}, unknown here")
            return None
        if found is not None and self._other_model(found.weights):
            self._left_out(SCORES, "eval RUN")
            return None
        return found

    def losses(self) -> tuple[Point, ...]:
        """Losses by noise level."""
        found = self.reader.attempt(lambda: kept(self.run, LOSSES, list[Point], "dbtrain losses"), None) or []
        if any(self._other_model(point.weights) for point in found):
            self._left_out(LOSSES, "losses RUN")
            return ()
        return tuple(found)

    def sweep(self) -> Sweep | None:
        """The layer sweep."""
        found = self.reader.attempt(lambda: kept(self.run, SWEEP, Sweep, "dbtrain sweep"), None)
        if found is not None and self._other_model(found.weights):
            self._left_out(SWEEP, "sweep RUN")
            return None
        return found

    def texts(self) -> tuple[KeptText, ...]:
        """Texts that the run wrote, newest first."""
        found: list[KeptText] = self.reader.attempt(lambda: kept_texts(self.run), [])
        own = [text for text in reversed(found) if not self._other_model(text.weights)]
        if len(own) < len(found):
            self._left_out(TEXTS, "generate RUN --keep", f"{len(found) - len(own)} of {len(found)} texts")
        return tuple(own)

    def picture(self) -> Picture | None:
        """The samples."""
        found = self.reader.attempt(self._picture, None)
        if found is not None and found.drawn is not None and self._other_model(found.drawn.weights):
            self._left_out(PICTURE, "sample RUN")
            return None
        return found

    def _picture(self) -> Picture | None:
        store = self.run.store
        if not store.exists(PICTURE):
            return None
        if store.size(PICTURE) > MOST_PICTURE_BYTES:
            raise ShardError(f"{store.where(PICTURE)} is larger than {MOST_PICTURE_BYTES >> 20} MiB, and is not shown")
        content = store.read(PICTURE)
        drawn = read_drawn(content, store.where(PICTURE))
        return Picture(base64.b64encode(content).decode("ascii"), drawn)
