"""run.json: what was settled before training. Written once; everything else in the run is checked against it."""

from typing import Any

from dbtrain.errors import ShardError
from dbtrain.shards.faults import damaged
from dbtrain.shards.format import Identity
from dbtrain.shards.sealed import Fields, seal, unseal
from dbtrain.shards.store import Store

MANIFEST = "run.json"
MANIFEST_VERSION = 1


def write_manifest(store: Store, manifest: dict[str, Any]) -> None:
    """Write run.json.

    Args:
        manifest: ``config`` (mapping), ``config_hash``, ``plan`` (a list of ``block``, ``layers`` [first, after the
            last], ``sigma_range`` [low, high] as hexadecimal floats), ``noise`` and ``shape`` (mappings),
            ``codebook_hash``, ``versions`` (mapping).

    Raises:
        ShardError: it is not of that form, or the storage fails.
    """
    where = store.where(MANIFEST)
    data = seal(manifest, MANIFEST_VERSION, where)
    _validate(data, where)
    store.write(MANIFEST, data)


def read_manifest(store: Store) -> dict[str, Any]:
    """Read and validate run.json.

    Raises:
        ShardError: it is missing, damaged or of another version.
    """
    if not store.exists(MANIFEST):
        raise ShardError(f"{store.url} is no run: it has no {MANIFEST}; give the directory of a run (out/name)")
    return _validate(store.read(MANIFEST), store.where(MANIFEST))


def _validate(data: bytes, where: str) -> dict[str, Any]:
    body = unseal(data, MANIFEST_VERSION, where)
    fields = Fields(body, where)
    for name in ("config", "noise", "shape", "versions"):
        fields.mapping(name)
    for name in ("config_hash", "codebook_hash"):
        fields.text(name)
    if not isinstance(fields.mapping("config").get("name"), str):
        damaged(where, "config.name must be a string")
    plan = fields.items("plan")
    previous = 0
    for number, entry in enumerate(plan):
        row = Fields(entry, where)
        layers, edges = row.items("layers"), row.items("sigma_range")
        if row.integer("block") != number or len(layers) != 2 or len(edges) != 2 or layers[0] != previous:
            damaged(where, f"row {number} of the plan does not follow the one before")
        previous = layers[1]
    if not plan:
        damaged(where, "its plan has no block")
    return body


def plan_identity(manifest: dict[str, Any], block: int) -> Identity:
    """What the shards of a block must say of themselves.

    Raises:
        ShardError: the run has no such block.
    """
    plan = manifest["plan"]
    if not 0 <= block < len(plan):
        raise ShardError(f"the run has no block {block}: its blocks are 0 to {len(plan) - 1}")
    row = plan[block]
    return Identity(
        run=manifest["config"]["name"],
        block=block,
        blocks=len(plan),
        layers=(row["layers"][0], row["layers"][1]),
        sigma_range=(row["sigma_range"][0], row["sigma_range"][1]),
        config_hash=manifest["config_hash"],
        codebook_hash=manifest["codebook_hash"],
    )
