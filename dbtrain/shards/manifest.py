"""run.json: what a run is. Written once before training; every shard is checked against it."""

from collections.abc import Mapping
from typing import Any

from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import Fields, canonical, seal, unseal
from dbtrain.shards.format import Identity
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import MissingError, damaged, short
from dbtrain.shards.storage.store import Store

MANIFEST = "run.json"
SCHEMA = 1
HASH_DIGITS = 64


def write_manifest(store: Store, manifest: Mapping[str, Any]) -> None:
    """Write run.json of a run directory, atomically.

    Args:
        manifest: ``config`` (dict), ``plan`` (list of ``{block, layers: [a, b], sigma_range: [hex low, hex high]}``,
            block 0 first and noisiest), ``codebook_hash`` ('' for none), ``versions`` (dict), ``noise`` (dict).
            Optional ``run`` (name; default ``config["name"]``), ``config_hash`` (default: that of ``config``) and
            ``data_hash`` (of what the data holds). Other keys are kept.

    Raises:
        ShardError: a field is missing or wrong, the plan leaves a gap, or a value is not JSON.
    """
    where = store.where(MANIFEST)
    try:
        check_manifest(manifest, where)
    except ShardError as err:
        raise ShardError(f"cannot write {where}: {err}") from err
    store.write(MANIFEST, seal(manifest, SCHEMA, where))


def read_manifest(store: Store) -> dict[str, Any]:
    """What :func:`write_manifest` was given, as JSON gives it back (lists for tuples).

    Raises:
        ShardError: there is no run here, or run.json is damaged, edited, or of another version.
    """
    where = store.where(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except MissingError as err:
        raise MissingError(f"{store.url} is not a run directory, it has no {MANIFEST}: check the path") from err
    manifest = unseal(data, SCHEMA, where)
    check_manifest(manifest, where)
    return manifest


def plan_identity(manifest: Mapping[str, Any], block: int) -> Identity:
    """Identity that every shard of a block must have.

    Raises:
        ShardError: the plan has no such block.
    """
    plan = manifest["plan"]
    if not 0 <= block < len(plan):
        raise ShardError(f"block={block} is not in the plan: it has blocks 0 to {len(plan) - 1}")
    entry = plan[block]
    config_hash = manifest.get("config_hash") or sha256(canonical(manifest["config"], "config").encode())
    name = manifest.get("run") or manifest["config"].get("name")
    return Identity(
        # A run without a name is told from others by its configuration.
        run=name if name and isinstance(name, str) else f"run-{config_hash[:12]}",
        block=block,
        blocks=len(plan),
        layers=(entry["layers"][0], entry["layers"][1]),
        sigma_range=(entry["sigma_range"][0], entry["sigma_range"][1]),
        config_hash=config_hash,
        codebook_hash=manifest["codebook_hash"],
    )


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise DamagedError unless all fields are there and layers and noise ranges tile without gap or overlap."""
    found = Fields(dict(manifest), where)
    for name in ("config", "versions", "noise"):
        found.mapping(name)
    for name in ("run", "config_hash", "data_hash"):
        if name in manifest:
            found.text(name)
    codebook_hash = found.text("codebook_hash")
    if codebook_hash and len(codebook_hash) != HASH_DIGITS:
        found.reject("codebook_hash", f"'' or {HASH_DIGITS} hex digits")
    plan = found.items("plan")
    if not plan:
        found.reject("plan", "a list of at least one block")
    for block, entry in enumerate(plan):
        _check_entry(entry, block, where)
    try:
        identities = [plan_identity(manifest, block) for block in range(len(plan))]
    except ShardError as err:
        damaged(where, str(err))
    _check_tiles(identities, where)


def _check_entry(entry: Any, block: int, where: str) -> None:
    """One entry of the plan has the right types; its values are judged by Identity."""
    found = Fields(entry, f"{where}, plan of block {block},")
    if found.integer("block") != block:
        found.reject("block", f"{block}, its place in the list")
    for name, kind in (("layers", int), ("sigma_range", str)):
        # Tuples are welcome from a writer; a file has lists only.
        value = entry.get(name)
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(end) is kind for end in value):
            found.reject(name, f"two values of type {kind.__name__}")


def _check_tiles(identities: list[Identity], where: str) -> None:
    if identities[0].layers[0] != 0:
        damaged(where, f"block 0 begins at layer {identities[0].layers[0]}, not 0")
    for one, two in zip(identities, identities[1:], strict=False):
        if one.layers[1] != two.layers[0]:
            damaged(
                where,
                f"layers {short(one.layers)} and {short(two.layers)} of blocks {one.block}, {two.block} do not meet",
            )
        # Block 0 is the noisiest, so a block's low end is the next one's high end; exactly, or levels fall between.
        if one.sigmas[0] != two.sigmas[1]:
            damaged(
                where,
                f"noise ranges {short(one.sigma_range)} and {short(two.sigma_range)} of blocks {one.block}, "
                f"{two.block} do not meet (block 0 is the noisiest)",
            )
