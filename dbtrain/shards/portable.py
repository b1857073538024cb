"""What of a run's configuration goes along with its merged model, which is given to others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dbtrain.shards.manifest import Manifest

PLACES: Mapping[str, Any] = {"out": "runs", "cluster": {"address": None}}
"""What only says where a run was made, and what stands there instead: the defaults."""


def portable(manifest: Manifest) -> Manifest:
    """The content of run.json without places on the machine that trained the run.

    Of an absolute path its last part stays: a run knows its own data from run.json, and somebody who has the
    merged model alone says where the data lies (``dbtrain eval DIRECTORY data.path=...``); ``data_hash``
    tells whether it is the same.
    """
    config = _without_folders(dict(manifest.config))
    for key, value in PLACES.items():
        if key in config:
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
    init = manifest.init and replace(manifest.init, place=str(_without_folders(manifest.init.place)))
    return replace(manifest, config=config, data_paths={}, init=init)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return value.rstrip("/").rpartition("/")[2] or value
    return value
