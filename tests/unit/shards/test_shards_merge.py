import json
import os

import pytest
import torch

from dbtrain.errors import ShardError
from dbtrain.run import merge as merge_module
from dbtrain.run.merge import merge
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.checksummed_json import seal, unseal
from dbtrain.shards.format import encode_codebook, sha256
from dbtrain.shards.manifest import Manifest, read_manifest
from dbtrain.shards.merged_directory import VERSION, MergedDirectory
from dbtrain.shards.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "run") if request.param == "local" else Store(f"memory://{tmp_path.name}/run")


def refused(store, match):
    with pytest.raises(ShardError, match=match) as caught:
        merge(Run(store))
    assert "\n" not in str(caught.value)
    assert not store.exists("merged") and not [n for n in store.list() if n.startswith("merged")]
    return str(caught.value)


def test_merge_and_load(store, make):
    codes = torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    written = make.run(store, codes)
    result, merged = merge(Run(store)), store.child("merged")
    assert result.path == merged.url and result.tensors == 12 and result.parameters == 144
    assert [(b, s, loss) for b, s, loss, _ in result.blocks] == [(0, 5, 0.5), (1, 5, 0.5), (2, 5, 0.5)]
    assert merged.list() == [
        "codebook.safetensors",
        "config.json",
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    for block in range(3):
        assert make.same(MergedDirectory(merged).block(block), written[block]["ema"])
    assert torch.equal(MergedDirectory(merged).codebook(), codes)
    whole = MergedDirectory(merged)
    assert whole.manifest.config == make.manifest()["config"] and whole.manifest.noise == {"p_mean": -1.2}
    assert [(row.step, row.sha256) for row in whole.blocks] == [(5, row[3]) for row in result.blocks]
    index = merged.read_json("model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 144 * 4 and len(index["weight_map"]) == 12
    for block in (-1, 3):
        with pytest.raises(ShardError, match=f"block={block}"):
            MergedDirectory(merged).block(block)


def test_any_safetensors_reader_reads_it(tmp_path, make):
    from safetensors import safe_open

    store = Store(tmp_path)
    written = make.run(store)
    merge(Run(store))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "merged" / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert torch.equal(opened.get_tensor(name), next(w["ema"][name] for w in written if name in w["ema"]))


def test_local_shards_are_links(tmp_path, make):
    make.run(Store(tmp_path))
    merge(Run(Store(tmp_path)))
    source, target = "blocks/00/step_00000005/ema.safetensors", "merged/model-00001-of-00003.safetensors"
    assert os.stat(tmp_path / source).st_ino == os.stat(tmp_path / target).st_ino


def test_without_ema_the_model_is_taken(store, make):
    written = make.run(store, ema=False)
    merge(Run(store))
    assert make.same(MergedDirectory(store.child("merged")).block(1), written[1]["model"])
    assert MergedDirectory(store.child("merged")).blocks[1].role == "model"
    assert MergedDirectory(store.child("merged")).codebook() is None


def test_merging_again_replaces_everything(store, make):
    make.run(store)
    merge(Run(store))
    store.write("merged/old-file", b"x")
    store.write("merged.building-dead/config.json", b"x")
    written = make.run(store, seed=50, steps=(6, 6, 6))
    assert [row[1] for row in merge(Run(store)).blocks] == [6, 6, 6]
    assert make.same(MergedDirectory(store.child("merged")).block(2), written[2]["ema"])
    assert not store.exists("merged/old-file")
    if store.is_local:
        assert store.list() == ["blocks", "merged", "run.json"]


def test_all_missing_blocks_are_named_at_once(store, make):
    make.run(store, steps=(None, 5, None))
    assert "2 of 3 blocks have no good checkpoint: 0, 2" in refused(store, "train")


def test_blocks_that_are_not_at_the_last_step_are_named_at_once(store, make):
    make.run(store, steps=(4, 5, 3))
    assert "2 of 3 blocks" in refused(store, r"last step: 0 \(step 4 of 5\), 2 \(step 3 of 5\)")


def test_a_damaged_newest_is_passed_over(store, make, capsys):
    make.run(store)
    written = make.run(store, seed=9, steps=(6, 6, 6))
    store.write("blocks/01/step_00000006/ema.safetensors", b"torn")
    assert [row[1] for row in merge(Run(store)).blocks] == [6, 5, 6]
    assert capsys.readouterr().err.count("skipped checkpoint 6 of block 1") == 1
    assert not make.same(MergedDirectory(store.child("merged")).block(1), written[1]["ema"])


@pytest.mark.parametrize(
    ("field", "value"), [("architecture_hash", "f" * 64), ("run", "other"), ("codebook_hash", "e" * 64)]
)
def test_a_foreign_shard_is_named(store, make, field, value):
    make.run(store, steps=(5, None, 5))
    who = read_manifest(store).identity(1)
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
    merge(Run(store))
    make.run(store, seed=50, steps=(6, 6, 6))

    def refuse(*args, **kwargs):
        raise ShardError("disk full")

    for failing in ("copy", "write", "move"):
        with monkeypatch.context() as patch:
            patch.setattr(Store, failing, refuse)
            with pytest.raises(ShardError, match="disk full"):
                merge(Run(store))
        assert make.same(MergedDirectory(store.child("merged")).block(0), written[0]["ema"])
        assert store.list() == ["blocks", "merged", "run.json"]


def test_a_shard_pruned_while_merging(store, make, monkeypatch):
    make.run(store)
    real = merge_module._config

    def prune(*args):
        store.remove("blocks/02/step_00000005")
        return real(*args)

    monkeypatch.setattr(merge_module, "_config", prune)
    with pytest.raises(ShardError, match="vanished while merging.*run the merge again"):
        merge(Run(store))
    with pytest.raises(ShardError, match="no merged model"):
        MergedDirectory(store.child("merged")).manifest  # noqa: B018


def test_every_damage_of_a_merged_model_is_noticed(store, make):
    written = make.run(store, torch.ones(2, 2))
    merge(Run(store))
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
                    assert make.same(MergedDirectory(merged).block(block), written[block]["ema"])
                except ShardError as err:
                    noticed += 1
                    assert "\n" not in str(err)
            if name.startswith("model-"):
                assert noticed == 1
            elif name == "codebook.safetensors":
                with pytest.raises(ShardError):
                    MergedDirectory(merged).codebook()
            elif chr(good[place]) not in " \n" or name != "config.json":
                assert noticed == 3
        merged.write(name, good)
    merged.remove("model-00002-of-00003.safetensors")
    with pytest.raises(ShardError, match="00002.*does not exist"):
        MergedDirectory(merged).block(1)


def test_an_index_that_hides_a_tensor_is_noticed_even_when_resealed(store, make):
    make.run(store)
    merge(Run(store))
    merged, name = store.child("merged"), "model.safetensors.index.json"
    index, config = merged.read_json(name), unseal(merged.read("config.json"), VERSION, "w")
    del index["weight_map"]["layers.2.qkv.weight"]
    merged.write_json(name, index)
    data = merged.read(name)
    config["files"][name] = {"size": len(data), "sha256": sha256(data)}
    merged.write("config.json", seal(config, VERSION, "w"))
    assert MergedDirectory(merged).block(0)
    with pytest.raises(ShardError, match="differ in 1 tensors.*layers.2.qkv"):
        MergedDirectory(merged).block(1)


def test_manifest_round_trip_and_identity(store, make):
    manifest = {**make.manifest(), "shape": {"channels": 1}}
    written = make.put(store, manifest)
    assert read_manifest(store) == written
    who = read_manifest(store).identity(1)
    assert (who.run, who.block, who.blocks, who.layers) == ("toy", 1, 3, (2, 4)) and who.edges == (0.3, 2.0)
    other = {**manifest, "config": {**manifest["config"], "lr": 0.002}}

    def identity(fields, block):
        return Manifest.parse(fields, "run.json").identity(block)

    assert identity(other, 1).architecture_hash != who.architecture_hash
    assert identity({**manifest, "config_hash": "a", "run": "b"}, 1).architecture_hash == "a"
    assert identity({**manifest, "config_hash": "a", "architecture_hash": "b"}, 1).architecture_hash == "b"
    assert identity({**manifest, "config": {}}, 0).run.startswith("run-")
    with pytest.raises(ShardError, match="block=3"):
        identity(manifest, 3)


def test_the_schedule_does_not_bind_a_shard(make):
    fields = {**make.manifest(), "architecture_hash": "a" * 16}
    longer = {**fields, "config_hash": "other", "config": {**fields["config"], "training": {"steps": 500}}}
    assert Manifest.parse(longer, "w").identity(1) == Manifest.parse(fields, "w").identity(1)
    other = {**fields, "data_hash": "d" * 64}
    assert Manifest.parse(other, "w").identity(1) != Manifest.parse(fields, "w").identity(1)


def test_a_run_of_the_first_schema_is_refused_by_the_version_that_wrote_it(store, make):
    store.write("run.json", seal({**make.manifest(), "versions": {"dbtrain": "0.1.0"}}, 1, "run.json"))
    with pytest.raises(ShardError, match="was written by dbtrain 0.1.0.*finish that run with dbtrain 0.1.0"):
        read_manifest(store)


def test_manifest_missing_or_edited(store, make):
    with pytest.raises(ShardError, match="not a run directory"):
        read_manifest(store)
    make.put(store, make.manifest())
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
        (("plan", 1, "levels"), [(0.4).hex(), (2.0).hex()], "do not meet"),
        (("plan", 1, "levels"), [0.3, 2.0], "levels"),
        (("plan", 1, "levels"), ["x", "y"], "levels"),
        (("plan", 2, "levels"), [(0.3).hex(), (0.1).hex()], "levels"),
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
        make.put(store, manifest)
    assert "\n" not in str(caught.value) and not store.exists("run.json")
