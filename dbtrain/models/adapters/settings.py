"""The settings of a class of another library: read from its config.json, or written in the configuration."""

import difflib
import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dbtrain.errors import ConfigError, first_line

FILE = "config.json"
SAVED = ("transformers_version", "_diffusers_version")
"""Keys by which one knows a file that the library itself has written, whose keys are all its own."""
PLACES = ("_name_or_path",)
"""Keys that say where something lay on somebody's machine."""


def read_settings(given: Any, arch: str) -> tuple[dict[str, Any], str]:
    """The settings, and what they are from, for messages.

    Args:
        given: keys of the class, or the path of a config.json or of the folder that has one.
        arch: value of `model.arch`, for messages.

    Raises:
        ConfigError: there is no such file, or it holds no object of JSON.
    """
    if isinstance(given, Mapping):
        return {str(key): value for key, value in given.items() if key not in PLACES}, "model.config"
    if not isinstance(given, str) or not given:
        raise ConfigError(
            f"model.config={given} must be the keys of the class that model.arch={arch} names, or a path of its "
            f"{FILE}, or of the folder that has it"
        )
    path = Path(given) / FILE if Path(given).is_dir() else Path(given)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model.config={given}: there is no file {path}: check the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"model.config={given}: {path} is no JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.config={given}: {path} holds {type(content).__name__}, no object of keys")
    return {key: value for key, value in content.items() if key not in PLACES}, str(path)


def refuse_unknown(value: Mapping[str, Any], known: Iterable[str], source: str, of: str) -> None:
    """Refuse a key that the class does not know; what its library has saved is not asked.

    Raises:
        ConfigError: naming the nearest key that there is.
    """
    if any(key in value for key in SAVED):
        return
    names = sorted(known)
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise ConfigError(f"{source}: {key} is no key of {of}: {meant}")


def fitted(value: Mapping[str, Any], wanted: Mapping[str, Any], why: str) -> dict[str, Any]:
    """Settings with those that the data decides; ConfigError where they are there and differ.

    Args:
        value: settings.
        wanted: what the data decides, by key.
        why: what of the data says so, for the message.
    """
    for key, ours in wanted.items():
        theirs = value.get(key, ours)
        if _plain(theirs) != _plain(ours):
            raise ConfigError(
                f"model.config.{key}={theirs}, and the data has {why}, which asks for {ours}: choose other data, or "
                f"set model.config.{key}={ours}"
            )
    return {**value, **wanted}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def library(name: str, arch: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed; with how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "diffusers" if name == "diffusers" else "text"
        raise ConfigError(
            f"model.arch={arch} needs the package {name}, which cannot be imported ({first_line(error)}): install "
            f"dbtrain[{extra}]"
        ) from None


def parameters_of(kind: Any) -> list[str]:
    """Names of the arguments of a class's constructor, which are the keys of its settings."""
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]


def made(build: Any, value: Mapping[str, Any], of: str) -> Any:
    """What a class of another library makes of its settings.

    Raises:
        ConfigError: it refuses them, in its own words.
    """
    try:
        return build(value)
    except ConfigError:
        raise
    except Exception as error:  # whatever the library raises on settings that do not fit each other
        raise ConfigError(f"model.config is not for {of}: {type(error).__name__}: {first_line(error)}") from None


def made_of_transformers(kind: Any, value: Mapping[str, Any], of: str) -> Any:
    """A configuration of transformers from its settings, with the attention that all of its layers have here.

    Raises:
        ConfigError: the class refuses them.
    """
    config = made(lambda keys: kind(**keys), value, of)
    config._attn_implementation = "sdpa"
    return config


def made_of_diffusers(kind: Any, value: Mapping[str, Any], of: str, **own: Any) -> Any:
    """A network of diffusers from those of its settings that its constructor takes; `own` come before them.

    Raises:
        ConfigError: the class refuses them.
    """
    taken = {key: value[key] for key in parameters_of(kind) if key in value}
    return made(lambda keys: kind(**keys), {**taken, **own}, of)


def refuse_other_class(value: Mapping[str, Any], source: str, of: str) -> None:
    """Refuse the settings of another class, of diffusers or transformers, for a class of diffusers.

    Raises:
        ConfigError: they name it.
    """
    there = class_of(value) or of
    if there != of:
        raise ConfigError(f"{source} is of {there}, not of {of}: give the config.json of one")


def class_of(value: Mapping[str, Any]) -> str:
    """Name of the class whose settings these are, as its library writes it into config.json; '' if nothing
    tells."""
    if "_class_name" in value:  # diffusers
        return str(value["_class_name"])
    names = value.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(value.get("model_type", ""))
