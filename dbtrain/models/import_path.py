"""A class of the user's, named by its import path: found, told, imported, and known again by its content."""

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import traceback
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.method.lookup import nearest

ENTRY_POINTS = "dbtrain.architectures"
"""Group in which an installed package may give its class a short name."""
KEY = "model.arch"
WRITTEN = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""``package.module:Class``."""
RUN_FILE = "run.json"
"""Marks a run directory, whose files may come from anybody: no code is imported from there."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnClass:
    """A class of the user's, imported."""

    kind: type[Any]
    module: ModuleType
    content_hash: str
    """SHA-256 of the file of its module, as it was when it was imported."""

    @property
    def file(self) -> Path:
        """File of the module that has the class."""
        return Path(str(self.module.__file__))

    @property
    def shipped(self) -> Path:
        """What a worker elsewhere needs to import it: the file, or the directory of the whole package."""
        return self.file.parents[len(self.module.__package__.split(".")) - 1] if self.module.__package__ else self.file


def import_path(arch: str) -> str | None:
    """``module:Class`` of an architecture that is the user's own; None if the name can only be a row of ours.

    Args:
        arch: an import path, or a name that an installed package gives in the group `ENTRY_POINTS`.
    """
    if ":" in arch:
        return arch
    return next((point.value for point in entry_points(group=ENTRY_POINTS) if point.name == arch), None)


@lru_cache
def own_class(arch: str, path: str) -> OwnClass:
    """Import a class of the user's, once in a process; what is imported is told before, by a line of the log.

    It is looked for on Python's path and in the current directory, as Python itself does for a script.

    Args:
        arch: value of `model.arch`, for messages.
        path: ``module:Class``.

    Raises:
        ConfigError: the path is malformed, there is no such module or class, the module cannot be imported,
            or it lies in a run directory.
    """
    found = WRITTEN.fullmatch(path)
    if not found:
        raise ConfigError(
            f"{KEY}={arch} is no import path: write MODULE:CLASS, as in my_file:MyModel for the class MyModel of "
            "my_file.py, or my_package.my_module:MyModel"
        )
    name, class_name = found.groups()
    file = _find(arch, name)
    log.info("%s=%s: importing %s from %s", KEY, arch, name, file)
    module = _import(arch, name)
    content = Path(str(module.__file__)).read_bytes()
    return OwnClass(_class_of(arch, module, class_name), module, hashlib.sha256(content).hexdigest())


def _find(arch: str, name: str) -> Path:
    """File or directory of the module's top package, without importing anything."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: no file here takes the place of a package that is installed
    importlib.invalidate_caches()
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # of __main__, which is another program on a worker
        spec = None
    places = [spec.origin] if spec and spec.origin else [*(spec.submodule_search_locations or ())] if spec else []
    if not places or not Path(str(places[0])).exists():
        raise ConfigError(
            f"{KEY}={arch}: there is no module {top} in {here} or on PYTHONPATH: give the command where {top}.py (or "
            f"the package {top}) lies, or add that folder to PYTHONPATH"
        )
    file = Path(str(places[0])).resolve()
    inside = next((folder for folder in file.parents if (folder / RUN_FILE).exists()), None)
    if inside:
        raise ConfigError(
            f"{KEY}={arch}: {file} lies in the run directory {inside}, and no code is imported from one: it may come "
            "from anybody: put your own copy where you give the command, or on PYTHONPATH"
        )
    return file


def _import(arch: str, name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{KEY}={arch}: there is no module {error.name}: check how it is spelt") from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{KEY}={arch}: importing {name} fails with {type(error).__name__}: {said} ({at[0]}, line {at[1]})"
            + (_BESIDE if isinstance(error, ModuleNotFoundError) else "")
        ) from None
    if not module.__file__:
        raise ConfigError(f"{KEY}={arch}: {name} is a folder without a class: name the module in it, as {name}.FILE")
    return module


_BESIDE = "; nodes of a cluster are sent the file alone, or the whole package: what belongs together is a package"


def _class_of(arch: str, module: ModuleType, name: str) -> type[Any]:
    kind = getattr(module, name, None)
    if isinstance(kind, type):
        return kind
    classes = [key for key, value in vars(module).items() if isinstance(value, type)]
    own = [key for key in classes if getattr(module, key).__module__ == module.__name__]
    has = f"its classes are {', '.join(own)}" if own else "it has none"
    raise ConfigError(f"{KEY}={arch}: {module.__file__} has no class {name}; {has}{nearest(name, own)}")
