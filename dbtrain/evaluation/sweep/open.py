"""What is swept, by its path: a run or a Hugging Face folder; and where the result is kept."""

import json
from collections.abc import Sequence
from pathlib import Path

from dbtrain.errors import ConfigError
from dbtrain.evaluation.kept import keep
from dbtrain.evaluation.sweep.classifier_folder import READ, SweptClassifier
from dbtrain.evaluation.sweep.concepts import ConceptSet, concept_sets
from dbtrain.evaluation.sweep.figure import png
from dbtrain.evaluation.sweep.foreign import SweptFolder
from dbtrain.evaluation.sweep.hidden import Swept, SweptRun
from dbtrain.evaluation.sweep.sweep import SWEEP, Sweep, record
from dbtrain.run.run import Run
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.storage.output import check_output

PICTURE = "sweep.png"
CLASSIFIERS = "ForImageClassification"
"""End of the names of classes of `transformers` that classify images."""


def is_folder(path: str) -> bool:
    """Whether a path is a folder in the layout of `transformers`, and no run."""
    here = Path(path)
    return (here / "config.json").is_file() and not (here / MANIFEST).exists() and not (here / "merged").exists()


def open_models(
    paths: Sequence[str], asked: Sequence[str] | None, usual: Sequence[str], pictures: str | None = None
) -> tuple[list[Swept], list[ConceptSet]]:
    """The models at some paths, and the concept sets to ask them about.

    Args:
        paths: paths of runs or folders, of which the first is swept and the others lie beside it.
        asked: names or files of concept sets; None for `usual`, or the classes of the first, if it is a
            classifier.
        usual: sets for a language model.
        pictures: pictures that folders of classifiers read; None where there are no such folders.

    Raises:
        ConfigError: a path is neither, a concept set is wrong, or the models cannot read the same.
        DataError: the pictures are none.
        ShardError: a run is not merged, or damaged.
    """
    given = concept_sets(asked or ())
    classifiers = [path for path in paths if is_folder(path) and _classifies(Path(path))]
    if classifiers and pictures is None:
        raise ConfigError(
            f"{classifiers[0]} is a classifier of images: say with --pictures which it is to read, as a folder that "
            "has a folder of pictures for each class"
        )
    if pictures is not None:
        _refuse_mixed(paths, classifiers)
        if not Path(pictures).exists():
            raise ConfigError(f"--pictures {pictures} does not exist: give a folder of pictures, or Parquet files")
        read = [SweptClassifier(Path(path), pictures) for path in paths]
        return [*read], given or [read[0].classes()]
    models = [SweptFolder(Path(path)) if is_folder(path) else SweptRun(Run.at(path)) for path in paths]
    if not given and isinstance(models[0], SweptRun) and not models[0].text:
        given = [models[0].classes()]
    return [*models], given or concept_sets(usual)


def _refuse_mixed(paths: Sequence[str], classifiers: Sequence[str]) -> None:
    """Refuse pictures for models that read something else."""
    other = next((path for path in paths if path not in classifiers), None)
    if other is not None and classifiers:
        raise ConfigError(
            f"{classifiers[0]} reads --pictures, and {other} does not (a run reads its own test images): only models "
            "that read the same can stand beside each other"
        )
    if other is not None:
        raise ConfigError(f"--pictures is for the Hugging Face folder of a {READ}, and {other} is none: leave it out")


def _classifies(folder: Path) -> bool:
    """Whether a folder of `transformers` holds a classifier of images.

    Raises:
        ConfigError: it holds one that is not read here.
    """
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        names = [str(name) for name in content.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # the reader of language models says what is wrong
    other = next((name for name in names if name.endswith(CLASSIFIERS) and name != READ), None)
    if other is not None:
        raise ConfigError(f"{folder} holds a {other}: of classifiers of images dbtrain sweep reads {READ} alone")
    return READ in names


def check_to(to: Path | None) -> None:
    """Whether the file can be the sweep's, before minutes are spent on measuring.

    Raises:
        ConfigError: it is no .json, whose picture lies beside it as .png, its folder is missing, or it is a
            file of a run.
    """
    if to is not None and to.suffix != ".json":
        raise ConfigError(f"--to {to} is no .json file: the numbers go there, and the picture beside them as .png")
    if to is not None and not to.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no directory {to.parent}: make it, or choose another")
    if to is not None:
        check_output("--to", to, lambda name: name.startswith("sweep"))


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
