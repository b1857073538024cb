"""The export command: a merged model as a folder that loads without this package."""

import json
import os
import re
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from dbtrain.config.data import BUILT_IN_TOKENIZERS
from dbtrain.data.tokenizers import TOKENIZER_FILE
from dbtrain.errors import ConfigError, ShardError
from dbtrain.evaluation.export.card import card, plain_card
from dbtrain.evaluation.export.modeling import abilities, class_name, modeling
from dbtrain.evaluation.export.plain import FORMAT as PLAIN_FORMAT
from dbtrain.evaluation.export.plain import check_plain, described_plainly, plain_loading, write_plain
from dbtrain.evaluation.export.routing import COMMON, FORMAT, HASHES
from dbtrain.evaluation.kept import scores_of
from dbtrain.evaluation.loading import load_model, merged_plan
from dbtrain.method.interface import BlockModel
from dbtrain.models.registry import architecture, own_architecture
from dbtrain.run.plan import RunPlan, noise_target
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.safetensors_file import as_file
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, counted, silent

CONFIG, MODELING, CARD = "config.json", "modeling.py", "README.md"
NETWORKS = "dbtrain.models."
"""Beginning of the names of modules whose networks need nothing else of this package."""
WEIGHTS = re.compile(r"blocks?(-\d+)?\.safetensors")
"""Files of `_files`."""


def export_run(
    run: Run, merged: MergedDirectory, to: str, progress: str = "", count: Count = silent, plain: bool = False
) -> list[str]:
    """Write a merged model into a folder of its own; returns the functions that its file offers.

    Args:
        run: the run, of which the scores and the tokenizer are taken if it is there.
        merged: the model.
        to: the folder to make; an older export there is replaced when the new one is complete.
        progress: how far the blocks are trained that are not done, for the card; '' if all are.
        count: is told how many blocks are written.
        plain: write each block as a folder of the other library's class.

    Raises:
        ConfigError: the folder holds something else, or the model cannot be used without this package.
        ShardError: the model's files are damaged, or the folder cannot be written.
    """
    if "://" in to:
        raise ConfigError(f"--to {to} is a URL: export into a folder here, and copy that")
    folder = Path(to).resolve()  # `.` has no name, and a link is not replaced by a folder
    _refuse_taken(folder, to)
    run_plan = merged_plan(merged)
    (check_plain if plain else _refuse_foreign)(run_plan)
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    try:
        if plain:
            building.mkdir()
            kind = write_plain(building, run_plan, merged, count)
            _write_plain_rest(building, run, run_plan, merged, progress, kind)
        else:
            _write_weights(Store(building), run_plan, merged, count)
            _write_rest(building, run, run_plan, merged, progress)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except OSError as error:
        raise ShardError(f"--to {to} cannot be written ({error.strerror}): choose another place") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return [] if plain else abilities(run_plan)


def _refuse_taken(folder: Path, to: str) -> None:
    """Refuse a folder that is neither empty nor an export to which nobody added anything."""
    if folder == Path.cwd():  # whoever works in it would be left in a folder that is gone
        raise ConfigError(
            f"--to {to or repr(to)} is the folder that this command runs in: give one that does not exist"
        )
    if folder.is_file():
        raise ConfigError(f"--to {to} is a file: give a folder that does not exist")
    if not folder.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no directory {folder.parent}: make it, or choose another")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    export = _read_export(folder)
    if export is None:
        raise ConfigError(f"--to {to} exists and is no export: remove it, or give a folder that does not exist")
    made = {str(row["file"]) for row in export.get("blocks", []) if isinstance(row, dict) and "file" in row}
    if added := sorted(file.name for file in folder.iterdir() if not (file.name in made or _made_here(file.name))):
        raise ConfigError(
            f"--to {to} is an older export, to which something was added that would be lost ({', '.join(added)}): "
            "move that away, or give a folder that does not exist"
        )


def _made_here(name: str) -> bool:
    """Whether an export, or Python when it imports one, writes a file of this name."""
    return name in (CONFIG, MODELING, CARD, TOKENIZER_FILE, COMMON, "__pycache__") or bool(WEIGHTS.fullmatch(name))


def _read_export(folder: Path) -> dict[str, Any] | None:
    """The config.json of an export, of which that of `--plain` names the folders of its blocks; None if the
    folder is no export."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") in (FORMAT, PLAIN_FORMAT) else None


def _refuse_foreign(run_plan: RunPlan) -> None:
    """Refuse networks that are not in this package, and methods whose blocks do not stand alone."""
    arch, method = run_plan.config.model.arch, run_plan.config.method
    stack = architecture(arch).stack
    if own_architecture(arch) or not architecture(arch).__module__.startswith(NETWORKS):
        plainly = ", or try --plain" if stack else ""
        raise ConfigError(
            f"model.arch={arch} is a class of your own, which needs dbtrain to run, and an export loads without it: "
            f"give others the run's folder merged/, your file and dbtrain{plainly} (docs/export.md)"
        )
    if run_plan.scheme.wrap is not None:
        raise ConfigError(f"a run of method={method} cannot be exported: its blocks are no networks by themselves")


def _write_weights(target: Store, run_plan: RunPlan, merged: MergedDirectory, count: Count) -> None:
    """One file for each block that has weights of its own, and one for what all have in common."""
    target.makedirs()
    for name, blocks in counted(count, "blocks written", list(_files(run_plan).items())):
        model = load_model(run_plan, blocks[-1], merged.block, merged.where)
        own = {key: tensor for key, tensor in model.state_dict().items() if key not in run_plan.frozen}
        target.write(name, as_file(own, {"kind": "export", "blocks": list(blocks)}, name))
    if common := _common(run_plan):
        target.write(COMMON, as_file(common, {"kind": "export", "blocks": []}, COMMON))


def _files(run_plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Blocks by the file that holds their weights: a single one where one job trained them all."""
    blocks = range(run_plan.split.blocks)
    if run_plan.scheme.shared:
        return {"blocks.safetensors": tuple(blocks)}
    return {f"block-{block:0{len(str(blocks[-1]))}d}.safetensors": (block,) for block in blocks}


def _common(run_plan: RunPlan) -> dict[str, Tensor]:
    own = architecture(run_plan.config.model.arch).codes and run_plan.codebook is not None
    codes = {"codebook": run_plan.codebook} if own and run_plan.codebook is not None else {}
    return {**run_plan.frozen, **codes}


def _write_rest(folder: Path, run: Run, run_plan: RunPlan, merged: MergedDirectory, progress: str) -> None:
    target, tokenizer = Store(folder), _tokenizer(run, run_plan)
    if tokenizer:
        target.write(TOKENIZER_FILE, tokenizer)
    config = {**described(run_plan, merged), HASHES: _hashes(folder), **_progress(progress)}
    kinds = {part: config[part]["class"] for part in ("network", "noise", "parametrisation")}
    text = card(config, merged.manifest, abilities(run_plan), scores_of(run, merged), bool(tokenizer), kinds)
    target.write(MODELING, modeling(run_plan).encode())
    target.write(CARD, text.encode())
    target.write(CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _write_plain_rest(
    folder: Path, run: Run, run_plan: RunPlan, merged: MergedDirectory, progress: str, kind: type[Any]
) -> None:
    target = Store(folder)
    known = {**described(run_plan, merged), HASHES: _hashes(folder), **_progress(progress)}
    config = described_plainly(run_plan, known, kind)
    kinds = {part: config[part]["class"] for part in ("noise", "parametrisation")}
    text = plain_card(config, merged.manifest, plain_loading(run_plan, config, kind), scores_of(run, merged), kinds)
    target.write(CARD, text.encode())
    target.write(CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in and below a folder, by its path from there."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): Store(file.parent).sha256(file.name) for file in files}


def _progress(progress: str) -> dict[str, str]:
    return {"unfinished": progress} if progress else {}


def _tokenizer(run: Run, run_plan: RunPlan) -> bytes | None:
    """The file of a tokenizer of Hugging Face, where the run knows its place and it is still there."""
    name = run_plan.config.data.model_dump().get("tokenizer")
    if name is None or name in BUILT_IN_TOKENIZERS or not run.exists:
        return None
    path = Path(str(run.plan.located().data.model_dump()["tokenizer"]))
    file = path / TOKENIZER_FILE if path.is_dir() else path
    return file.read_bytes() if file.is_file() else None


def described(run_plan: RunPlan, merged: MergedDirectory) -> dict[str, Any]:
    """The content of config.json: everything that is no tensor."""
    config, kind = run_plan.config, architecture(run_plan.config.model.arch)
    arguments = config.model.arguments() | dict(run_plan.settled)
    arguments |= kind.from_shape(run_plan.shape)
    evaluation = config.evaluation.model_dump(include={"start", "readout", "steps_per_block"})
    return {
        "format": FORMAT,
        "architectures": ["RoutedBlocks"],
        "_class_name": "RoutedBlocks",
        "model_type": "dbtrain_routed",
        "run": merged.manifest.name,
        "method": config.method,
        "network": {"class": class_name(kind), "needs": _needs(kind)},
        "baseline": config.method == "end_to_end",
        "arguments": arguments,
        "common": bool(_common(run_plan)),
        "blocks": _rows(run_plan, merged),
        "edges": [edge.hex() for edge in run_plan.ranges.edges],
        "level": run_plan.level_name,
        "noise": {"class": type(run_plan.noise()).__name__, **_noise(run_plan)},
        "parametrisation": {
            "class": type(run_plan.parametrisation()).__name__,
            "arguments": vars(run_plan.parametrisation()),
        },
        "evaluation": evaluation,
        "seed": config.seed,
        "shape": dict(run_plan.shape),
        "class_names": list(run_plan.class_names),
        "tokenizer": _last(merged.manifest.config["data"].get("tokenizer")),
    }


def _needs(kind: type[BlockModel]) -> dict[str, str]:
    """The package that a network is of, with the version that it was exported with."""
    package = kind.stack.package if kind.stack else ""
    return {package: version(package)} if package else {}


def _last(path: str | None) -> str | None:
    """The last part of a path; the rest is of a machine."""
    return path and Path(path).name


def _rows(run_plan: RunPlan, merged: MergedDirectory) -> list[dict[str, Any]]:
    rows = []
    for file, blocks in _files(run_plan).items():
        for block in blocks:
            shard = run_plan.scheme.sources(block)[-1]
            holds, source = run_plan.scheme.runs(run_plan.shards, shard), merged.blocks[shard]
            rows.append({
                "file": file, "holds": [holds.start, holds.stop], "applies": list(run_plan.runs(block)),
                "steps": source.step, "averaged": source.role == "ema",
            })  # fmt: skip
    return rows


def _noise(run_plan: RunPlan) -> dict[str, Any]:
    """What `described_noise` makes the noise process from."""
    if run_plan.distribution["kind"] == "none":
        return {"arguments": vars(run_plan.noise())}
    target = noise_target(run_plan.config, run_plan.shape, run_plan.codebook)
    settings = run_plan.config.noise.model_dump(mode="json")
    return {"distribution": dict(run_plan.distribution), "settings": settings, "target": asdict(target)}
