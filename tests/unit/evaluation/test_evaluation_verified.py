"""A merged model exists only when it verified, and whatever does not fit is refused by block, file and tensor."""

import dataclasses
import random

import pytest
import torch
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import DbtrainError, ShardError
from dbtrain.evaluation import residency, verify
from dbtrain.evaluation.inspect import inspect_path
from dbtrain.evaluation.loading import check_shard
from dbtrain.evaluation.losses import measure_losses
from dbtrain.evaluation.opening import read_merged_model
from dbtrain.evaluation.report import evaluate_run
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.checksummed_json import seal, unseal
from dbtrain.shards.commit import dump_commit
from dbtrain.shards.format import decode, encode, sha256
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.merged_directory import INDEX, VERSION, MergedDirectory
from dbtrain.telemetry.console import make_console
from dbtrain.training.upstream import load_upstream
from tests.unit.alive import Alive
from tests.unit.small_runs import commit, settled

TENSOR = "layers.1.mlp.0.weight"
"""Of block 0, which holds two of three layers."""


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    made = settled(tmp_path / "runs" if request.param == "local" else f"memory://{tmp_path.name}/runs")
    commit(made)
    return made


def put(store, name, data):
    """Beside and moved in, so that a linked copy elsewhere keeps its bytes."""
    store.write(name, data)
    return {"size": len(data), "sha256": sha256(data)}


def change_checkpoint(run, block, change):
    """Change tensors of a checkpoint; all hashes are made again."""
    folder = run.child("blocks", f"{block:02d}", "step_00000002")
    identity = read_manifest(run).identity(block)
    loaded = Checkpoints(run.child("blocks", f"{block:02d}"), identity).load(2)
    tensors = dict(loaded.parts["model"])
    change(tensors)
    record = put(folder, "model.safetensors", encode(tensors, identity, 2, "model")[:])
    files = {**loaded.commit.files, "model.safetensors": record}
    folder.write("COMMIT.json", dump_commit(dataclasses.replace(loaded.commit, files=files), "w"))


def change_merged(run, block, change):
    """Change tensors of a merged model; all hashes and the index are made again."""
    merged, name = run.child("merged"), f"model-0000{block + 1}-of-00002.safetensors"
    config = unseal(merged.read("config.json"), VERSION, "w")
    shard = decode(merged.read(name), where="w")
    tensors = dict(shard.tensors)
    change(tensors)
    config["files"][name] = put(merged, name, encode(tensors, shard.identity, shard.step, shard.role)[:])
    index = merged.read_json(INDEX)
    others = {n: file for n, file in index["weight_map"].items() if file != name}
    merged.write_json(INDEX, {**index, "weight_map": {**others, **dict.fromkeys(tensors, name)}})
    data = merged.read(INDEX)
    config["files"][INDEX] = {"size": len(data), "sha256": sha256(data)}
    merged.write("config.json", seal(config, VERSION, "w"))


def nan(tensors):
    tensors[TENSOR] = tensors[TENSOR].clone()
    tensors[TENSOR][3, 5] = float("nan")


def extra(tensors):
    tensors["layers.1.mlp.9.weight"] = torch.ones(7)


def missing(tensors):
    del tensors[TENSOR]


def reshaped(tensors):
    tensors[TENSOR] = tensors[TENSOR].reshape(-1)


def single(tensors):
    tensors[TENSOR] = torch.ones(1, 1)


def double(tensors):
    tensors[TENSOR] = tensors[TENSOR].double()


CHANGES = pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, f"{TENSOR}' holds 1 of 576 values that are NaN or infinite"),
        (extra, "layers.1.mlp.9.weight' (7 of float32) is no tensor of the model"),
        (missing, f"{TENSOR} is missing, expected 48x12 of float32"),
        (reshaped, f"{TENSOR} is 576 of float32, expected 48x12 of float32"),
        (single, f"{TENSOR} is 1x1 of float32, expected 48x12 of float32"),
        (double, f"{TENSOR} is 48x12 of float64, expected 48x12 of float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)


@CHANGES
def test_a_merge_that_fails_names_the_tensor_and_leaves_no_model(run, change, words, capsys):
    change_checkpoint(run, 0, change)
    with pytest.raises(ShardError) as caught:
        merge_and_verify(Run(run))
    told = str(caught.value)
    assert words in told and "blocks/00/step_00000002/model.safetensors" in told and "train command" in told
    assert "block 1" not in told and "1 (step" not in told and "\n" not in told
    assert not [name for name in run.list() if name.startswith("merged")]
    with pytest.raises(ShardError, match="run the merge first"):
        evaluate_run(Run(run))
    with pytest.raises(ShardError):
        inspect_path(run.url, make_console())


@CHANGES
def test_an_older_merged_model_stays_until_a_new_one_verified(run, change, words):
    merge_and_verify(Run(run))
    before = {name: run.child("merged").read(name) for name in run.child("merged").list()}
    change_checkpoint(run, 0, change)
    with pytest.raises(ShardError):
        merge_and_verify(Run(run))
    assert {name: run.child("merged").read(name) for name in run.child("merged").list()} == before
    assert [name for name in run.list() if name.startswith("merged")] == ["merged"]
    assert evaluate_run(Run(run))[1]["test"]


def test_weights_that_compute_infinity_are_told_of_their_own_block_only(run):
    def overflow(tensors):
        tensors.update({n: torch.full_like(t, 3e38) for n, t in tensors.items() if n.startswith("blocks.0.head.")})

    change_checkpoint(run, 0, overflow)
    with pytest.raises(ShardError, match="block 0 at sigma 20 computes values that are NaN or infinite") as caught:
        merge_and_verify(Run(run))
    assert "block 1" not in str(caught.value) and not run.exists("merged")


def test_a_merged_model_of_other_weights_is_told_of_its_block_only(run, monkeypatch):
    real = verify.read_merged_model

    def read(merged, device, residency):
        model = real(merged, device, residency)
        with torch.no_grad():
            next(model.blocks[0].parameters()).add_(1)
        return model

    monkeypatch.setattr(verify, "read_merged_model", read)
    with pytest.raises(ShardError, match="block 0 at sigma 20 differs from its checkpoint") as caught:
        merge_and_verify(Run(run))
    assert "block 1" not in str(caught.value) and not run.exists("merged")


def test_a_model_that_computes_slowly_is_compared_on_fewer_samples(run, monkeypatch):
    monkeypatch.setattr(verify, "CHECK_S", 0.0)
    assert merge_and_verify(Run(run))[1] == 1
    change_checkpoint(run, 0, nan)
    with pytest.raises(ShardError, match="block 0"):
        merge_and_verify(Run(run))


def test_a_merge_holds_one_block_of_each_side_however_many_there_are(run, monkeypatch):
    weights = Alive(residency.check_shard)
    monkeypatch.setattr(residency, "check_shard", weights)
    result, _ = merge_and_verify(Run(run))
    assert len(result.blocks) == 2 and weights.blocks_at_each_read == [1, 1, 2, 2]


@CHANGES
def test_no_command_uses_a_merged_model_that_does_not_fit(tmp_path, change, words):
    run = settled(tmp_path / "runs")
    commit(run)
    merge_and_verify(Run(run))
    change_merged(run, 0, change)
    for command in (["eval", run.url], ["losses", run.url], ["inspect", f"{run.url}/merged"]):
        result = CliRunner().invoke(cli.app, command)
        told = " ".join(result.output.split())
        assert result.exit_code == 1 and words in told, told
        assert "merged/model-00001-of-00002.safetensors" in told


def test_random_changes_under_right_hashes_are_refused_or_change_nothing(tmp_path):
    run = settled(tmp_path / "runs")
    commit(run)
    merge_and_verify(Run(run))
    merged = run.child("merged")
    good = {name: merged.read(name) for name in merged.list()}
    dice = random.Random(0)
    for _ in range(120):
        change_merged(run, dice.randrange(2), lambda tensors: mutate(tensors, dice))
        with pytest.raises(ShardError, match=r"model-0000.*(expected|NaN or infinite|is no tensor)") as caught:
            read_merged_model(MergedDirectory(merged), torch.device("cpu"))
        assert "\n" not in str(caught.value)
        for name, data in good.items():
            merged.write(name, data)


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.uint8]
DTYPES += [torch.float8_e4m3fn, torch.complex64]


def mutate(tensors, dice):
    """One change that leaves a valid file, and another model."""
    name = dice.choice(sorted(tensors))
    tensor, kind = tensors[name], dice.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name.replace(name.split(".")[-1], "other")] = tensor.clone()
    elif kind == 2:
        tensors[name] = tensor.unsqueeze(dice.randrange(tensor.dim() + 1))
    elif kind == 3:
        tensors[name] = torch.cat([tensor, tensor[:1]])
    elif kind == 4:
        tensors[name] = tensor.to(dice.choice(DTYPES))
    else:
        tensors[name] = tensor.clone()
        wrong = dice.choice([float("nan"), float("inf"), -float("inf")])
        tensors[name].view(-1)[dice.randrange(tensor.numel())] = wrong


def test_a_frozen_layer_of_one_element_does_not_fill_another_shape(tmp_path):
    run = settled(tmp_path / "runs", method="greedy")
    run_plan = Run(run).plan
    commit(run, blocks=(0,))
    model = run_plan.objective(1).get_submodule("model")
    load_upstream(model, Run(run), range(1))
    change_checkpoint(run, 0, single)
    with pytest.raises(ShardError, match="layers.1.mlp.0.weight is 1x1 of float32, expected 48x12"):
        load_upstream(model, Run(run), range(1))


def test_a_shard_of_the_right_tensors_fits(run):
    manifest = read_manifest(run)
    run_plan = Run(run).plan
    checkpoints = Checkpoints(run.child("blocks", "00"), manifest.identity(0))
    wanted = run_plan.model(0, "meta").state_dict()
    assert check_shard(run_plan, 0, checkpoints.load(2).parts["model"], wanted, "w").keys() == wanted.keys()


def test_a_folder_that_is_no_run_is_said_so_by_every_reader(tmp_path):
    for read in (evaluate_run, lambda run: measure_losses(run, 3, 8), merge_and_verify):
        with pytest.raises(DbtrainError, match="not a run directory"):
            read(Run.at(str(tmp_path / "nowhere")))
