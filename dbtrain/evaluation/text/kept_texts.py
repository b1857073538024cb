"""Texts that ``dbtrain generate --keep`` keeps in a run, for its report."""

from dataclasses import asdict, dataclass

from dbtrain.evaluation.kept import keep, kept
from dbtrain.run.run import Run

TEXTS = "texts.json"
MOST = 8
"""The most texts that are kept; the newest is last."""


@dataclass(frozen=True)
class KeptText:
    """One text and how it was drawn."""

    prompt: str
    text: str
    """What the model added."""
    temperature: float
    seed: int
    unfinished: str = ""
    """How far the blocks were, if they were not done."""
    weights: str = ""
    """Hash of the model that wrote it, `MergedDirectory.weights_hash`; '' in a file of before."""


def kept_texts(run: Run) -> list[KeptText]:
    """The texts of a run, oldest first.

    Raises:
        ShardError: the file is damaged.
    """
    return kept(run, TEXTS, list[KeptText], "dbtrain generate --keep (remove the file first)") or []


def keep_text(run: Run, text: KeptText) -> None:
    """Add a text to those of a run; of more than `MOST` the oldest goes.

    Raises:
        ShardError: the file is damaged, or cannot be written.
    """
    texts = [*kept_texts(run), text][-MOST:]
    keep(run, TEXTS, [asdict(one) for one in texts], "the text and those before it")
