import json
import os

import pytest
import torch

from dbtrain.errors import ShardError
from dbtrain.shards import merge as merge_module
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.checksummed_json import seal
from dbtrain.shards.format import encode_codebook, sha256
from dbtrain.shards.manifest import plan_identity, read_manifest, write_manifest
from dbtrain.shards.merge import load_block, load_codebook, merge, read_config
from dbtrain.shards.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "run") if request.param == "local" else Store(f"memory://{tmp_path.name}/run")


def refused(store, match):
    with pytest.raises(ShardError, match=match) as caught:
        merge(store)
    assert "\n" not in str(caught.value)
    assert not store.exists("merged") and not [n for n in store.list() if n.startswith("merged")]
    return str(caught.value)


def test_merge_and_load(store, make):
    codes = torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    written = make.run(store, codes)
    result, merged = merge(store), store.child("merged")
    assert result.path == merged.url and result.tensors == 12 and result.parameters == 144
    assert [(b, s, loss) for b, s, loss, _ in result.blocks] == [(0, 5, 0.5), (1, 5, 0.5), (2, 5, 0.5)]
    assert merged.list() == [
        "codebook.safetensors",
        "config.json",
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    for block in range(3):
        assert make.same(load_block(merged, block), written[block]["ema"])
    assert torch.equal(load_codebook(merged), codes)
    config = read_config(merged)
    assert config["config"] == make.manifest()["config"] and config["noise"] == {"p_mean": -1.2}
    assert [(row["step"], row["sha256"]) for row in config["blocks"]] == [(5, row[3]) for row in result.blocks]
    index = merged.read_json("model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 144 * 4 and len(index["weight_map"]) == 12
    for block in (-1, 3):
        with pytest.raises(ShardError, match=f"block={block}"):
            load_block(merged, block)


def test_any_safetensors_reader_reads_it(tmp_path, make):
    from safetensors import safe_open

    store = Store(tmp_path)
    written = make.run(store)
    merge(store)
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "merged" / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert torch.equal(opened.get_tensor(name), next(w["ema"][name] for w in written if name in w["ema"]))


def test_local_shards_are_links(tmp_path, make):
    make.run(Store(tmp_path))
    merge(Store(tmp_path))
    source, target = "blocks/00/step_00000005/ema.safetensors", "merged/model-00001-of-00003.safetensors"
    assert os.stat(tmp_path / source).st_ino == os.stat(tmp_path / target).st_ino


def test_without_ema_the_model_is_taken(store, make):
    written = make.run(store, ema=False)
    merge(store)
    assert make.same(load_block(store.child("merged"), 1), written[1]["model"])
    assert read_config(store.child("merged"))["blocks"][1]["role"] == "model"
    assert load_codebook(store.child("merged")) is None


def test_merging_again_replaces_everything(store, make):
    make.run(store)
    merge(store)
    store.write("merged/old-file", b"x")
    store.write("merged.building-dead/config.json", b"x")
    written = make.run(store, seed=50, steps=(6, 6, 6))
    assert [row[1] for row in merge(store).blocks] == [6, 6, 6]
    assert make.same(load_block(store.child("merged"), 2), written[2]["ema"])
    assert not store.exists("merged/old-file")
    if store.is_local:
        assert store.list() == ["blocks", "merged", "run.json"]


def test_all_missing_blocks_are_named_at_once(store, make):
    make.run(store, steps=(None, 5, None))
    assert "2 of 3 blocks have no good checkpoint: 0, 2" in refused(store, "train")


def test_blocks_that_are_not_at_the_last_step_are_named_at_once(store, make):
    make.run(store, steps=(4, 5, 3))
    assert "2 of 3 blocks" in refused(store, r"last step, 5: 0 \(step 4\), 2 \(step 3\)")


def test_a_damaged_newest_is_passed_over(store, make, capsys):
    make.run(store)
    written = make.run(store, seed=9, steps=(6, 6, 6))
    store.write("blocks/01/step_00000006/ema.safetensors", b"torn")
    assert [row[1] for row in merge(store).blocks] == [6, 5, 6]
    assert capsys.readouterr().err.count("skipped checkpoint 6 of block 1") == 1
    assert not make.same(load_block(store.child("merged"), 1), written[1]["ema"])


@pytest.mark.parametrize(("field", "value"), [("config_hash", "f" * 64), ("run", "other"), ("codebook_hash", "e" * 64)])
def test_a_foreign_shard_is_named(store, make, field, value):
    make.run(store, steps=(5, None, 5))
    who = plan_identity(read_manifest(store), 1)
    fields = {name: getattr(who, name) for name in who.__dataclass_fields__}
    make.commit(Checkpoints(store.child("blocks/01"), type(who)(**{**fields, field: value})), 5, make.parts(1))
    assert "blocks/01" in refused(store, field)


def test_two_blocks_exchanged(store, make):
    make.run(store, steps=(5, 5, None))
    for name in store.child("blocks/00/step_00000005").list():
        store.copy(f"blocks/00/step_00000005/{name}", f"blocks/02/step_00000005/{name}")
    assert "block is 0, expected 2" in refused(store, "blocks/02")


def test_codebook_must_be_the_runs(store, make):
    codes = torch.randn(4, 2)
    make.run(store, codes)
    store.write("codebook.safetensors", encode_codebook(codes + 1))
    refused(store, "codebook.safetensors has hash")
    store.remove("codebook.safetensors")
    refused(store, "does not exist")
    store.write("codebook.safetensors", b"x")
    refused(store, "damaged")


def test_a_codebook_nobody_knows(store, make):
    make.run(store)
    store.write("codebook.safetensors", encode_codebook(torch.ones(2, 2)))
    refused(store, "names no codebook")


def test_a_failed_merge_leaves_the_old_one(tmp_path, make, monkeypatch):
    store = Store(tmp_path)
    written = make.run(store)
    merge(store)
    make.run(store, seed=50, steps=(6, 6, 6))

    def refuse(*args, **kwargs):
        raise ShardError("disk full")

    for failing in ("copy", "write", "move"):
        with monkeypatch.context() as patch:
            patch.setattr(Store, failing, refuse)
            with pytest.raises(ShardError, match="disk full"):
                merge(store)
        assert make.same(load_block(store.child("merged"), 0), written[0]["ema"])
        assert store.list() == ["blocks", "merged", "run.json"]


def test_a_shard_pruned_while_merging(store, make, monkeypatch):
    make.run(store)
    real = merge_module._config

    def prune(*args):
        store.remove("blocks/02/step_00000005")
        return real(*args)

    monkeypatch.setattr(merge_module, "_config", prune)
    with pytest.raises(ShardError, match="vanished while merging.*run the merge again"):
        merge(store)
    with pytest.raises(ShardError, match="no merged model"):
        read_config(store.child("merged"))


def test_every_damage_of_a_merged_model_is_noticed(store, make):
    written = make.run(store, torch.ones(2, 2))
    merge(store)
    merged = store.child("merged")
    for name in merged.list():
        good = merged.read(name)
        for place in range(3, len(good), max(1, len(good) // 15)):
            bad = bytearray(good)
            bad[place] ^= 4
            # written beside and moved in, so that the linked checkpoint keeps its bytes
            merged.write(name, bytes(bad))
            noticed = 0
            for block in range(3):
                try:
                    assert make.same(load_block(merged, block), written[block]["ema"])
                except ShardError as err:
                    noticed += 1
                    assert "\n" not in str(err)
            if name.startswith("model-"):
                assert noticed == 1
            elif name == "codebook.safetensors":
                with pytest.raises(ShardError):
                    load_codebook(merged)
            elif chr(good[place]) not in " \n" or name != "config.json":
                assert noticed == 3
        merged.write(name, good)
    merged.remove("model-00002-of-00003.safetensors")
    with pytest.raises(ShardError, match="00002.*does not exist"):
        load_block(merged, 1)


def test_an_index_that_hides_a_tensor_is_noticed_even_when_resealed(store, make):
    make.run(store)
    merge(store)
    merged, name = store.child("merged"), "model.safetensors.index.json"
    index, config = merged.read_json(name), read_config(merged)
    del index["weight_map"]["layers.2.qkv.weight"]
    merged.write_json(name, index)
    data = merged.read(name)
    config["files"][name] = {"size": len(data), "sha256": sha256(data)}
    merged.write("config.json", seal(config, 1, "w"))
    assert load_block(merged, 0)
    with pytest.raises(ShardError, match="differ in 1 tensors.*layers.2.qkv"):
        load_block(merged, 1)


def test_manifest_round_trip_and_identity(store, make):
    manifest = {**make.manifest(), "shape": {"channels": 1}}
    write_manifest(store, manifest)
    assert read_manifest(store) == manifest
    who = plan_identity(read_manifest(store), 1)
    assert (who.run, who.block, who.blocks, who.layers) == ("toy", 1, 3, (2, 4)) and who.sigmas == (0.3, 2.0)
    other = {**manifest, "config": {**manifest["config"], "lr": 0.002}}
    assert plan_identity(other, 1).config_hash != who.config_hash
    assert plan_identity({**manifest, "config_hash": "a", "run": "b"}, 1).config_hash == "a"
    assert plan_identity({**manifest, "config": {}}, 0).run.startswith("run-")
    with pytest.raises(ShardError, match="block=3"):
        plan_identity(manifest, 3)


def test_manifest_missing_or_edited(store, make):
    with pytest.raises(ShardError, match="not a run directory"):
        read_manifest(store)
    write_manifest(store, make.manifest())
    store.write("run.json", store.read("run.json").replace(b"0.001", b"0.002"))
    with pytest.raises(ShardError, match="edited"):
        read_manifest(store)


def edit(path, value):
    def change(manifest):
        target = manifest
        for key in path[:-1]:
            target = target[key]
        if value is KeyError:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("config",), KeyError, "config is missing"),
        (("config",), [], "config"),
        (("versions",), 1, "versions"),
        (("noise",), None, "noise"),
        (("plan",), [], "plan"),
        (("plan",), {}, "plan"),
        (("codebook_hash",), "abc", "hash"),
        (("plan", 0, "block"), 1, "block"),
        (("plan", 0, "layers"), [1, 2], "begins at layer 1"),
        (("plan", 1, "layers"), [3, 4], "do not meet"),
        (("plan", 1, "layers"), [2, 2], "layers"),
        (("plan", 1, "layers"), ["2", "4"], "layers"),
        (("plan", 1, "layers"), [True, 4], "layers"),
        (("plan", 1, "sigma_range"), [(0.4).hex(), (2.0).hex()], "do not meet"),
        (("plan", 1, "sigma_range"), [0.3, 2.0], "sigma_range"),
        (("plan", 1, "sigma_range"), ["x", "y"], "sigma_range"),
        (("plan", 2, "sigma_range"), [(0.3).hex(), (0.1).hex()], "sigma_range"),
        (("plan", 1), None, "object"),
        (("noise", "x"), float("nan"), "JSON"),
        (("noise", "x"), {1}, "JSON"),
        (("version",), 1, "reserved"),
    ],
)
def test_wrong_manifests_are_refused(store, make, path, value, match):
    manifest = make.manifest()
    edit(path, value)(manifest)
    with pytest.raises(ShardError, match=match) as caught:
        write_manifest(store, manifest)
    assert "\n" not in str(caught.value) and not store.exists("run.json")
