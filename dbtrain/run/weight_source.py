"""What weights can be taken from: a run, a merged model, a shard, a plain file. Only headers are read."""

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dbtrain.errors import ConfigError, ShardError
from dbtrain.models.adapters.settings import class_of
from dbtrain.run.run import WEIGHTS, Run, RunBlock
from dbtrain.shards.commit import read_commit, step_name
from dbtrain.shards.format import identity_of
from dbtrain.shards.frozen import FROZEN
from dbtrain.shards.manifest import MANIFEST, Manifest
from dbtrain.shards.merged_directory import CONFIG, INDEX, MergedDirectory
from dbtrain.shards.storage.store import Store
from dbtrain.shards.tensor_file import Described, read_header

SINGLE = "model.safetensors"
"""Name of the weights file in a folder with only one, by the Hugging Face convention."""
FOLDERS = ((INDEX, SINGLE), ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"))
"""(index, the single file where there is no index), as transformers and we name them, and as
diffusers does."""
SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Endings of PyTorch's own files. They hold programs, which run when they are read."""
PICKLED_FOLDERS = tuple(
    f"{stem}{end}" for stem in ("pytorch_model", "diffusion_pytorch_model") for end in (".bin", ".bin.index.json")
)
"""Names of files, by the same convention, that show that a folder's weights are pickles."""


@dataclass(frozen=True)
class WeightSource:
    """Names, shapes and places of tensors that a run may start from."""

    store: Store
    """Directory of the files."""
    tensors: Mapping[str, Described]
    """Tensors by their names in the whole model; those of private stems and heads have their block's
    prefix."""
    hashes: Mapping[str, str]
    """SHA-256 of each file."""
    blocks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Layers (first, end) of each of its blocks, half-open; empty where nothing tells them."""
    codebook_hash: str = ""
    """Hash of the codebook that it was trained with; '' where nothing tells it."""
    codebook: Tensor | None = None
    """The codebook itself (V, D), where it lies beside the weights."""
    manifest: Manifest | None = None
    """Manifest of the run that it is from, if it tells."""
    asked: str = ""
    """What the user called it, for messages."""
    originals: Mapping[str, str] = field(default_factory=dict)
    """Names in the files of a network of another library, by ours; empty where they are the same."""
    of_class: str = ""
    """Class that a config.json beside the files names, of a network of another library."""
    progress: str = ""
    """How far its blocks were trained, if they were not done."""

    @staticmethod
    def open(url: str) -> "WeightSource":
        """Look into a path or URL.

        Raises:
            ConfigError: there is nothing to start from.
            ShardError: its files are damaged, or the storage cannot be reached.
        """
        if url.endswith(PICKLES):
            raise ConfigError(
                f"init.from={url} is a pickle by its name, which is never read since it may hold a program: save its "
                "tensors with safetensors.torch.save_file, under the names of the model, and give that file"
            )
        if url.endswith(SUFFIX):
            folder, name = posixpath.split(url)
            return _of_file(_opened(folder or ".", url), name, url)
        store = _opened(url, url)
        if store.exists(MANIFEST):
            return _of_run(Run(store), url)
        if store.exists(CONFIG) and _is_merged(store):
            return _of_merged(store, url)
        for index, single in FOLDERS:
            if store.exists(index):
                return _plain(store, _indexed(store, index), url)
            if store.exists(single):
                return _plain(store, [single], url)
        pickled = [name for name in PICKLED_FOLDERS if store.exists(name)]
        if pickled:
            raise ConfigError(
                f"init.from={url} has its weights in {pickled[0]}, a pickle, which is never read since it may hold a "
                "program: save the network again with safe_serialization=True, or take a folder with safetensors files"
            )
        if store.exists(CONFIG):
            raise ConfigError(
                f"init.from={url} has a {CONFIG} and no weights beside it, which would be one of "
                f"{', '.join(name for pair in FOLDERS for name in pair)}: copy the whole folder"
            )
        raise ConfigError(
            f"init.from={url} is no run, merged model, shard or safetensors file ({store.url} has no {MANIFEST}, "
            f"{CONFIG} of a merged model, {', '.join(name for pair in FOLDERS for name in pair)}): check the path"
        )

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that it has, ascending."""
        numbers = {name.split(".")[1] for name in self.tensors if name.startswith("layers.")}
        return sorted(int(number) for number in numbers if number.isdecimal())

    def prefixes(self, group: str) -> dict[int, str]:
        """What the names of its private stems or heads begin with, by its blocks.

        Args:
            group: `stem` or `head`.
        """
        parts = [name.split(".") for name in self.tensors if name.startswith("blocks.")]
        found = {int(p[1]) for p in parts if len(p) > 3 and p[1].isdecimal() and p[2] == group}
        return {block: f"blocks.{block}.{group}" for block in sorted(found)}

    def prefix(self, group: str, layer: int) -> str:
        """What the names of the stem or head begin with that belongs to a layer of the source.

        Raises:
            ConfigError: it has several, and nothing tells which belongs to which layer.
        """
        private = self.prefixes(group)
        if any(name.startswith(f"{group}.") for name in self.tensors) or not private:
            return group
        owner = next((b for b, (first, end) in self.blocks.items() if first <= layer < end and b in private), None)
        if owner is None and len(private) > 1:
            raise ConfigError(
                f"init.from={self.asked} has {group}s of blocks {', '.join(map(str, private))}, and nothing says which "
                f"layers are theirs: give the merged model with its {CONFIG}, or a file with one {group}.*"
            )
        return private[owner if owner is not None else next(iter(private))]


def _opened(folder: str, url: str) -> Store:
    """The store of a folder; ConfigError names the key where it is no place that is known."""
    try:
        return Store(folder)
    except ShardError as error:
        raise ConfigError(f"init.from={url}: {error}") from error


def _of_file(store: Store, name: str, url: str) -> WeightSource:
    if not store.exists(name):
        raise ConfigError(f"init.from={url} does not exist ({store.where(name)}): check the path")
    header = read_header(store, name, hashed=True)
    if not header.record:
        return WeightSource(store, header.tensors, {name: header.sha256}, asked=url)
    role = header.record.get("role")
    if header.record.get("kind") != "shard" or role not in WEIGHTS:
        raise ConfigError(
            f"init.from={url} holds the {role or header.record.get('kind')}, not weights: give the model or ema file "
            "beside it"
        )
    own = identity_of(header.record, store.where(name))
    return WeightSource(
        store, header.tensors, {name: header.sha256}, {own.block: own.layers}, own.codebook_hash, asked=url
    )


def _of_run(run: Run, url: str) -> WeightSource:
    """Its merged model; of a run that is done and not merged, the last shard of each block."""
    merged = run.merged.exists(CONFIG) and not MergedDirectory(run.merged).progress
    if merged and not run.manifest.extensions:
        return _of_merged(run.merged, url)
    # the merged model may be older than an extension of the run
    behind = [f"block {b.number} at step {b.committed} of {b.steps}" for b in run.blocks if not b.done]
    if merged and behind:
        raise ConfigError(
            f"init.from={url} is a run that was extended and is not done ({', '.join(behind)}): train it to its end, "
            f"or give {run.merged.url} to start from the model that it had before"
        )
    if behind:
        raise ConfigError(
            f"init.from={url} is a run that is neither merged nor done ({', '.join(behind)}): train it to its end and "
            f"merge it first (dbtrain merge {url})"
        )
    files = dict(_last_shard(block) for block in run.blocks)
    return _of_blocks(run.store, run.manifest, files, run.codebook, url)


def _last_shard(block: RunBlock) -> tuple[str, str]:
    """File of the weights of a block that is done, below the run's directory, and its SHA-256."""
    step = block.committed
    commit = read_commit(block.store.child(step_name(step)), step)
    name = next(name for role in WEIGHTS if (name := commit.file_of(role)))
    return f"{block.path}/{step_name(step)}/{name}", commit.files[name]["sha256"]


def _is_merged(store: Store) -> bool:
    """Whether a config.json is of a merged model: other programs call their own files so."""
    try:
        content = store.read_json(CONFIG)
    except ShardError:
        return True  # taken for one, so that it is refused as a damaged merged model
    return isinstance(content, dict) and {"plan", "digest"} <= content.keys()


def _of_merged(store: Store, url: str) -> WeightSource:
    merged = MergedDirectory(store)
    files = {row.file: row.sha256 for row in merged.blocks}
    source = _of_blocks(store, merged.manifest, files, merged.codebook(), url)
    return replace(source, progress=merged.progress)


def _of_blocks(
    store: Store, manifest: Manifest, files: dict[str, str], codebook: Tensor | None, url: str
) -> WeightSource:
    """A model of ours from the files of its blocks, in their order, and its frozen parts."""
    tensors: dict[str, Described] = {}
    for name in files:
        tensors |= read_header(store, name).tensors
    hashes = dict(files)
    if manifest.frozen_hash:
        header = read_header(store, FROZEN, hashed=True)
        tensors |= header.tensors
        hashes[FROZEN] = header.sha256
    blocks = {row.block: row.layers for row in manifest.plan}
    return WeightSource(store, tensors, hashes, blocks, manifest.codebook_hash, codebook, manifest, url)


def _indexed(store: Store, index: str) -> list[str]:
    """Files of an index, each once."""
    content = store.read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ConfigError(f"{store.where(index)} has no weight_map of names to files: {json.dumps(content)[:80]}")
    pickled = [name for name in files.values() if name.endswith(PICKLES)]
    if pickled:
        raise ConfigError(
            f"{store.where(index)} names {pickled[0]}, a pickle by its name, which is never read since it may hold a "
            "program: take a folder with safetensors files"
        )
    gone = [name for name in dict.fromkeys(files.values()) if not store.exists(name)]
    if gone:
        raise ConfigError(
            f"{store.where(index)} names {gone[0]}, which is not there ({len(gone)} of its files are "
            "missing): copy the folder again"
        )
    return list(dict.fromkeys(files.values()))


def _plain(store: Store, files: list[str], url: str) -> WeightSource:
    headers = {name: read_header(store, name, hashed=True) for name in files}
    tensors = {key: described for header in headers.values() for key, described in header.tensors.items()}
    hashes = {name: header.sha256 for name, header in headers.items()}
    return WeightSource(store, tensors, hashes, asked=url, of_class=_class_beside(store))


def _class_beside(store: Store) -> str:
    """Class that a folder's config.json names, '' if there is none that can be read."""
    try:
        content = store.read_json(CONFIG)
    except ShardError:
        return ""
    return class_of(content) if isinstance(content, dict) else ""
