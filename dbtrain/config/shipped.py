"""The configurations that are shipped: found by name, wherever dbtrain is installed."""

from pathlib import Path

from dbtrain.errors import ConfigError

SUFFIX = ".yaml"


def folder() -> Path:
    """Where they lie: within an installed package, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped() -> dict[str, Path]:
    """Files by their names, such as ``vit_digits``, in order."""
    return {path.stem: path for path in sorted(folder().glob(f"*{SUFFIX}"))}


def located(path: str | Path) -> Path:
    """The file that a user means: a path as it stands, or a shipped configuration by its name alone."""
    given = Path(path)
    by_name = given.name == str(given) and not given.suffix and not given.exists()
    return shipped().get(str(given), given) if by_name else given


def about(path: Path) -> str:
    """The comment that a configuration begins with, as one line; without its command."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#") or line.startswith("# Command:"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def copy_to(target: Path) -> list[Path]:
    """Copy all of them into a folder, which is made if it is not there; returns the copies.

    Raises:
        ConfigError: a file of that name is there already with other content, or the folder cannot be written.
    """
    copies = {source: target / source.name for source in shipped().values()}
    try:
        for source, copy in copies.items():
            if copy.exists() and copy.read_bytes() != source.read_bytes():
                raise ConfigError(
                    f"{copy} is there already, with other content: move it away, or choose another folder"
                )
        target.mkdir(parents=True, exist_ok=True)
        for source, copy in copies.items():
            copy.write_bytes(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}): choose another folder with --to") from error
    return list(copies.values())
