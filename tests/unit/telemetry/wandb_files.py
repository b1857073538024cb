"""What W&B wrote offline, read from its files: a log of records as LevelDB has it, after a header of 7 bytes."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768


def records(path: Path) -> Iterator[Record]:
    data, at, parts = path.read_bytes(), HEADER, []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no room for a header: the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts.clear()
            yield record


def offline_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """By id: group, name, the metric on the horizontal axis, and all rows in the order of the commands."""
    runs: dict[str, dict[str, Any]] = defaultdict(lambda: {"rows": [], "axis": {}, "starts": 0})
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found = runs[path.stem.removeprefix("run-")]
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found |= {"group": record.run.run_group, "name": record.run.display_name}
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                found["config"] = config or found.get("config")
            if kind == "metric":
                found["axis"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
            if kind == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found["rows"].append({key: json.loads(value) for key, value in items.items()})
    return dict(runs)
