"""Files that commands write where a person says: never over those of a run."""

from collections.abc import Callable
from pathlib import Path

from dbtrain.errors import ConfigError
from dbtrain.shards.manifest import MANIFEST


def check_output(option: str, file: Path, fits: Callable[[str], bool]) -> None:
    """Refuse a file that is, or may become, one of a run's own.

    A run's directory itself takes files by whose names a command's results are known; the folders in it hold
    commits and the merged model, some of which are one file under two names.

    Args:
        option: the option that names the file, for messages.
        file: the file, which need not exist.
        fits: whether a name is one for such results in a run's directory.

    Raises:
        ConfigError: it lies in a run and is no such file, or is a link that leads to itself.
    """
    try:
        real = file.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{option} {file} leads nowhere ({error}): choose another place") from error
    run = next((folder for folder in real.parents if (folder / MANIFEST).is_file()), None)
    if run is not None and not (real.parent == run and fits(real.name)):
        raise ConfigError(f"{option} {file} lies among the files of the run {run}: choose a place outside of it")
