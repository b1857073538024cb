"""Read a configuration: YAML, then dotted overrides, then validation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dbtrain.config.explain import explain
from dbtrain.config.overrides import check_overrides, literal, read_override
from dbtrain.config.run import Config
from dbtrain.config.shipped import located
from dbtrain.errors import ConfigError, first_line, refuse_argument

BY_NAME = "a shipped configuration is called by its name alone, such as vit_digits: dbtrain configs lists them"


def load_config(path: str | Path | None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None) -> Config:
    """Read a YAML file and apply overrides such as ``model.depth=12``.

    Args:
        path: path of the file; or the name of a shipped configuration, such as ``vit_digits``.
        overrides: keys with dots and their values, in their order.
        base: keys and values to begin with where there is no file.

    Raises:
        ConfigError: the file is missing or no YAML, an override is malformed, a key unknown or a value wrong.
        ArgumentError: `path` is no path, or `overrides` no list of texts.
    """
    if not isinstance(path, str | os.PathLike | None):
        refuse_argument("path", path, "the path of a file, or the name of a shipped configuration")
    check_overrides(overrides)
    where = str(path or "the configuration")
    try:
        loaded = OmegaConf.create(literal(base or {})) if path is None else _file(located(path))
        # one after the other, so that null takes back a section before another override fills it again
        for override in overrides:
            nested = _with_text_keys(read_override(override))
            _refuse_key_of_file(OmegaConf.to_container(loaded), nested, override)
            loaded = OmegaConf.merge(loaded, nested)
        content = OmegaConf.to_container(loaded, resolve=True)
    except IsADirectoryError:
        raise ConfigError(_not_a_file(Path(str(path)))) from None
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; {BY_NAME}") from None
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is no file of keys and values in YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from None
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        raise
    return parse_config(content, where)


def _refuse_key_of_file(there: Any, nested: Any, override: str) -> None:
    """Refuse an override of one key below `model.config` where that is the path of a file with the keys: it
    would come in the place of all of them.

    Args:
        there: what has been read so far.
        nested: the override.
        override: as it was written.
    """
    given, new = (part.get("model") if isinstance(part, dict) else None for part in (there, nested))
    path, keys = (part.get("config") if isinstance(part, dict) else None for part in (given, new))
    if isinstance(path, str) and isinstance(keys, dict) and "${" not in path:
        raise ConfigError(
            f"{override}: model.config is {path}, a path, of which no single key can be changed: change a copy of its "
            "config.json, or give all keys in the place of the path"
        )


def _file(path: str | Path) -> DictConfig | ListConfig:
    return OmegaConf.create(_with_text_keys(OmegaConf.to_container(OmegaConf.load(path))))


def _not_a_file(path: Path) -> str:
    if (path / "run.json").exists():
        return (
            f"{path} is a run, and this command wants a configuration file: to continue the run, dbtrain resume {path}"
        )
    return f"{path} is a directory, and a configuration file is wanted; {BY_NAME}"


def _with_text_keys(value: Any) -> Any:
    """YAML makes whole numbers of the blocks' numbers, and an override has text;
    OmegaConf refuses to mix them."""
    if isinstance(value, list):
        return [_with_text_keys(part) for part in value]
    return {str(key): _with_text_keys(part) for key, part in value.items()} if isinstance(value, dict) else value


def parse_config(content: Any, where: str) -> Config:
    """Validate a plain mapping.

    Raises:
        ConfigError: one line for all that is wrong.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {type(content).__name__}")
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        problems = [explain(e) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None
