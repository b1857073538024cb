"""Read a configuration: YAML, then dotted overrides, then validation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dbtrain.config.explain import explain
from dbtrain.config.run import Config
from dbtrain.errors import ConfigError, first_line

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
"""How an override begins: a dotted key and an equals sign."""


def load_config(path: str | Path | None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None) -> Config:
    """Read a YAML file and apply overrides such as ``model.depth=12``.

    Raises:
        ConfigError: the file is missing or no YAML, an override is malformed, a key unknown or a value wrong.
    """
    try:
        loaded = OmegaConf.create(base or {}) if path is None else _with_text_keys(OmegaConf.load(path))
        # one after the other, so that null takes back a section before another override fills it again
        merged = OmegaConf.merge(loaded, *(OmegaConf.from_dotlist([override]) for override in _checked(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; those that are shipped lie in configs/") from None
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is no file of keys and values in YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        raise
    return parse_config(content, str(path or "the configuration"))


def _with_text_keys(loaded: Any) -> Any:
    """YAML makes whole numbers of the blocks' numbers, and an override has text; OmegaConf refuses to mix them."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return [text(part) for part in value]
        return {str(key): text(part) for key, part in value.items()} if isinstance(value, dict) else value

    return OmegaConf.create(text(OmegaConf.to_container(loaded)))


def _checked(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if not OVERRIDE.match(override):
            raise ConfigError(f"{override!r} is no override: write key=value, for instance model.depth=12")
    return list(overrides)


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
