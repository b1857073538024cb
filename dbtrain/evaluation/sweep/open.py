"""What is swept, by its path: a run or a Hugging Face folder; and where the result is kept."""

import json
from collections.abc import Sequence
from pathlib import Path

from dbtrain.errors import ConfigError
from dbtrain.evaluation.kept import keep
from dbtrain.evaluation.sweep.concepts import ConceptSet, concept_sets
from dbtrain.evaluation.sweep.figure import png
from dbtrain.evaluation.sweep.foreign import SweptFolder
from dbtrain.evaluation.sweep.hidden import Swept, SweptRun
from dbtrain.evaluation.sweep.sweep import SWEEP, Sweep, record
from dbtrain.run.run import Run
from dbtrain.shards.manifest import MANIFEST

PICTURE = "sweep.png"


def is_folder(path: str) -> bool:
    """Whether a path is a folder in the layout of `transformers`, and no run."""
    here = Path(path)
    return (here / "config.json").is_file() and not (here / MANIFEST).exists() and not (here / "merged").exists()


def open_model(path: str, asked: Sequence[str] | None, usual: Sequence[str]) -> tuple[Swept, list[ConceptSet]]:
    """The model at a path, and the concept sets to ask it about.

    Args:
        path: path of a run or a folder.
        asked: names or files of concept sets; None for `usual`, or the classes of a classifier.
        usual: sets for a language model.

    Raises:
        ConfigError: the path is neither, or a concept set is wrong.
        ShardError: the run is not merged, or damaged.
    """
    given = concept_sets(asked or ())
    if is_folder(path):
        return SweptFolder(Path(path)), given or concept_sets(usual)
    model = SweptRun(Run.at(path))
    if given:
        return model, given
    return model, concept_sets(usual) if model.text else [model.classes()]


def check_to(to: Path | None) -> None:
    """Whether the file can be the sweep's, before minutes are spent on measuring.

    Raises:
        ConfigError: it is no .json, whose picture lies beside it as .png, or its folder is missing.
    """
    if to is not None and to.suffix != ".json":
        raise ConfigError(f"--to {to} is no .json file: the numbers go there, and the picture beside them as .png")
    if to is not None and not to.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no directory {to.parent}: make it, or choose another")


def keep_sweep(path: str, found: Sweep, to: Path | None) -> str:
    """Write sweep.json and a picture of it, which `dbtrain report` shows for a run; returns where they are.

    Raises:
        ConfigError: the file cannot be written.
        ShardError: the run cannot be written.
    """
    if to is None and not is_folder(path):
        run = Run.at(path)
        keep(run, SWEEP, record(found), "the correlations")
        run.store.write(PICTURE, png(found))
        return run.store.where(SWEEP)
    file = to or Path(f"{found.model}-{SWEEP}")
    try:
        file.write_text(json.dumps(record(found), indent=1) + "\n")
        file.with_suffix(".png").write_bytes(png(found))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): choose another place with --to") from error
    return str(file)
