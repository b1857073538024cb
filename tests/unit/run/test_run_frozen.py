"""A stem or head that no block trains: stored once, bound to every shard, and part of the merged model."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dbtrain.errors import ConfigError, ShardError
from dbtrain.evaluation.inspect import inspect_path
from dbtrain.evaluation.loading import load_model
from dbtrain.evaluation.opening import read_merged_model
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run.cost import estimate
from dbtrain.run.merge import merge
from dbtrain.run.run import Run
from dbtrain.shards.format import decode
from dbtrain.shards.frozen import frozen_hash_of
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.errors import DamagedError
from tests.unit.small_runs import BASE, commit, settled

DEEPER = {**BASE["model"], "depth": 4}
STEP = "step_00000002"
CPU = torch.device("cpu")


def shard_of(run, block):
    return f"{run.store.url}/blocks/{block:02d}/{STEP}/model.safetensors"


@pytest.fixture
def source(tmp_path):
    run = settled(tmp_path / "source")
    commit(run)
    return Run(run)


@pytest.fixture
def frozen(source, tmp_path):
    """A run of two blocks of two layers each with one stem, from block 0 of the source; heads are private."""
    init = {"from": shard_of(source, 0), "layers": "repeat", "stem": "frozen"}
    run = settled(tmp_path / "frozen", init=init, model=DEEPER)
    commit(run)
    return Run(run)


def said_of(path):
    console = Console(file=StringIO(), width=200)
    inspect_path(str(path), console)
    return console.file.getvalue()


def test_it_lies_once_beside_the_codebook_and_in_no_shard(source, frozen):
    stored = load_file(frozen.store.path / "frozen.safetensors")
    own = load_file(shard_of(source, 0))
    assert stored.keys() == {n.removeprefix("blocks.0.") for n in own if n.startswith("blocks.0.stem.")}
    assert all(torch.equal(t, own[f"blocks.0.{n}"]) for n, t in stored.items())
    for block in (0, 1):
        names = load_file(shard_of(frozen, block))
        assert not [n for n in names if ".stem." in n] and [n for n in names if ".head." in n]
    assert frozen.manifest.frozen_hash == frozen_hash_of(stored)
    assert frozen.manifest.init.lines() == [
        f"blocks 0-1: layers 0-1 of {shard_of(source, 0)}, with the run's frozen stem and the head of its block 0"
    ]


def test_no_gradient_reaches_it_and_every_block_has_its_values(frozen):
    stored = load_file(frozen.store.path / "frozen.safetensors")
    for block in (0, 1):
        model = frozen.plan.model(block)
        held = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        assert held.keys() == stored.keys() and all(torch.equal(p, stored[n]) for n, p in held.items())
        objective = frozen.plan.objective(block)
        data = frozen.plan.data().train.batch(torch.arange(5), CPU)
        objective(data, torch.tensor(1), torch.arange(5)).backward()
        assert all((p.grad is None) == (n in stored) for n, p in objective.get_submodule("model").named_parameters())


def test_memory_counts_it_once_without_gradient_optimizer_and_average(source, frozen):
    config = frozen.config.model_copy(update={"training": frozen.config.training.model_copy(update={"ema": 0.9})})
    private = config.model_copy(update={"init": config.init.model_copy(update={"stem": "private"})})
    less, more = (estimate(replace(frozen.plan, config=c), 0, 5, 1) for c in (config, private))
    stem = sum(t.numel() for t in load_file(frozen.store.path / "frozen.safetensors").values())
    assert more.count - less.count == stem and less.parameters == more.parameters
    assert more.gradients - less.gradients == more.average - less.average == 4 * stem
    assert more.optimizer - less.optimizer == 8 * stem and less.flops < more.flops


def test_its_hash_is_in_every_shard_and_another_runs_shard_is_refused(source, frozen, tmp_path):
    shard = decode((frozen.store.path / f"blocks/00/{STEP}/model.safetensors").read_bytes(), where="it")
    assert shard.identity.frozen_hash == frozen.manifest.frozen_hash
    init = {"from": shard_of(source, 0), "layers": "repeat"}
    private = settled(tmp_path / "private", init=init, model=DEEPER)
    step = private.path / "blocks" / "00" / STEP
    step.parent.mkdir(parents=True)
    (frozen.store.path / "blocks" / "00" / STEP).rename(step)
    with pytest.raises(ShardError, match="belongs elsewhere: frozen_hash is"):
        Run(private).block(0).checkpoints.newest(lambda line: None)


def test_a_shard_without_frozen_parts_says_nothing_of_them(source):
    assert b"frozen_hash" not in (source.store.path / f"blocks/00/{STEP}/model.safetensors").read_bytes()
    assert "frozen_hash" not in json.loads((source.store.path / "run.json").read_text())


def test_the_merged_model_has_it_under_its_own_names_and_equals_the_blocks(frozen):
    result, samples = merge_and_verify(frozen)
    assert samples and result.tensors == sum(len(load_file(shard_of(frozen, b))) for b in (0, 1)) + len(frozen.frozen)
    merged = MergedDirectory(frozen.merged)
    index = json.loads((frozen.merged.path / "model.safetensors.index.json").read_text())
    listed = {name for name, file in index["weight_map"].items() if file == "frozen.safetensors"}
    assert listed == frozen.frozen.keys() == merged.frozen().keys()
    model = read_merged_model(merged, CPU)
    for block in model.blocks:
        assert torch.equal(block.state_dict()["stem.code.weight"], frozen.frozen["stem.code.weight"])
    shells = read_merged_model(merged, CPU, "ahead")
    for number, block in enumerate(shells.blocks):
        found, wanted = block.state_dict(), model.blocks[number].state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    # blocks that come and go keep one copy of it for all
    assert len({shell.state_dict()["stem.code.weight"].data_ptr() for shell in shells.blocks.shells}) == 1


def test_a_merged_model_with_it_can_be_started_from(frozen, tmp_path):
    merge(frozen)
    for stem in ("private", "frozen"):
        new = Run(settled(tmp_path / f"new-{stem}", init={"from": frozen.store.url, "stem": stem}, model=DEEPER))
        assert new.manifest.frozen_hash == (frozen.manifest.frozen_hash if stem == "frozen" else "")
        ends = {row.stem for row in new.manifest.init.blocks}
        assert ends == ({""} if stem == "frozen" else {"stem"})
        files = {file for row in new.manifest.init.blocks for file in row.files}
        assert ("frozen.safetensors" in files) == (stem == "private")


def test_private_stems_that_differ_cannot_become_one_and_equal_ones_can(source, tmp_path):
    init = {"from": source.store.url, "head": "frozen"}
    with pytest.raises(ConfigError, match=r"blocks 0, 1 of init.from=.* have heads that differ: set init.head=private"):
        settled(tmp_path / "new", init=init)
    # right after a repeat that nothing has trained, all blocks have the same
    alike = settled(tmp_path / "alike", init={"from": shard_of(source, 0), "layers": "repeat"}, model=DEEPER)
    for block in (0, 1):
        row, own = Run(alike).manifest.init.blocks[block], load_file(shard_of(source, 0))
        names = {n: row.source_name(n, 2 * block) for n, _ in Run(alike).plan.model(block).named_parameters()}
        named = {n if n.startswith("layers.") else f"blocks.{block}.{n}": own[s] for n, s in names.items()}
        Run(alike).block(block).checkpoints.commit(2, {"model": named}, loss=1.0, attempt=1, fence=lambda: None)
    new = Run(settled(tmp_path / "new", init={**init, "from": alike.url}, model=DEEPER))
    assert torch.equal(new.frozen["head.linear.weight"], own["blocks.0.head.linear.weight"])


@pytest.mark.parametrize("how", ["flipped", "gone", "of another run"])
def test_damage_of_it_is_told_and_nothing_is_merged(frozen, source, tmp_path, how):
    file = frozen.store.path / "frozen.safetensors"
    if how == "gone":
        file.unlink()
    elif how == "flipped":
        content = bytearray(file.read_bytes())
        content[-3] ^= 8
        file.write_bytes(content)
    else:
        init = {"from": shard_of(source, 1), "layers": "repeat", "stem": "frozen"}
        other = settled(tmp_path / "other", init=init, model={**DEEPER, "depth": 2})
        file.write_bytes((other.path / "frozen.safetensors").read_bytes())
    told = {"flipped": "is damaged", "gone": "does not exist", "of another run": "restore the run's own"}[how]
    with pytest.raises(ShardError, match=told):
        merge(Run(frozen.store))
    with pytest.raises(ShardError, match=told):
        said_of(frozen.store.path)
    assert not frozen.merged.exists("config.json")


def test_a_damaged_one_of_a_merged_model_is_told(frozen):
    merge(frozen)
    file = frozen.merged.path / "frozen.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 8
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="frozen.safetensors"):
        read_merged_model(MergedDirectory(frozen.merged), CPU)


def test_a_shard_that_holds_a_stem_of_its_own_is_none_of_the_model(frozen):
    def load(block):
        tensors = load_file(shard_of(frozen, block))
        return {**tensors, f"blocks.{block}.stem.code.weight": frozen.frozen["stem.code.weight"]}

    with pytest.raises(ShardError, match=r"stem.code.weight.*is no tensor of the model"):
        load_model(frozen.plan, 0, load)


def test_inspect_shows_it_alone_in_the_run_and_in_a_shard(frozen):
    merge(frozen)
    for place in (frozen.store.path, frozen.merged.path):
        said = said_of(place / "frozen.safetensors")
        assert "stem.patches.weight" in said and frozen.manifest.frozen_hash in said
    assert "frozen parts" in said_of(frozen.store.path) and "init: blocks 0-1" in said_of(frozen.store.path)
    assert frozen.manifest.frozen_hash in said_of(shard_of(frozen, 1))
    assert "model-00001" in said_of(frozen.merged.path)
