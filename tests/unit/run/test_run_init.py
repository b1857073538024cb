"""Where a block's weights come from: what of a source is taken by which block, and every reason to refuse one."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbtrain.config import load_config
from dbtrain.errors import ConfigError, ShardError
from dbtrain.method.content import tensor_hash
from dbtrain.run.continued import longer
from dbtrain.run.extend import extend
from dbtrain.run.initial_weights import InitialWeights, check_there, read_block
from dbtrain.run.merge import merge
from dbtrain.run.run import Run
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards import tensor_file
from dbtrain.shards.storage.errors import DamagedError, MissingError
from tests.unit.small_runs import BASE, commit, settled

DEEPER = {**BASE["model"], "depth": 6}
STEP = "step_00000002"


@pytest.fixture
def source(tmp_path):
    """A merged run of two blocks, of layers 0-1 and of layer 2."""
    run = settled(tmp_path / "source")
    commit(run)
    merge(Run(run))
    return Run(run)


def started(tmp_path, init, name="new", **changes):
    return Run(settled(tmp_path / name, init=init, **changes))


def first(run, block):
    """What a block of a run starts from, by name in its model."""
    model = run.plan.model(block)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = run.plan.shards.layers(block)
    found = dict(read_block(run, run.manifest.init, block, layers.start, names))
    assert found.keys() == set(names)
    return found


def committed(run, block, role="model"):
    return load_file(run.store.path / f"blocks/{block:02d}/{STEP}/{role}.safetensors")


def plain_file(run, path, kind=torch.float32):
    """All layers of a merged run with one stem and one head, by the model's own names."""
    merged = {**committed(run, 0), **committed(run, 1)}
    own = {n: t for n, t in merged.items() if n.startswith("layers.")}
    for group, block in (("stem", 0), ("head", 1)):
        own |= {n.removeprefix(f"blocks.{block}."): t for n, t in merged.items() if f"{block}.{group}." in n}
    save_file({n: t.to(kind) for n, t in own.items()}, path)
    return own


def refusal(tmp_path, init, **changes):
    with pytest.raises(ConfigError) as told:
        started(tmp_path, init, **changes)
    assert not (tmp_path / "new" / "toy" / "run.json").exists()
    assert not list((tmp_path / "new" / "toy").glob("*.safetensors")), "refused before anything is written"
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_slice_of_a_run_with_the_same_blocks_is_each_blocks_own(source, tmp_path):
    run = started(tmp_path, {"from": source.store.url})
    for block in (0, 1):
        found = {n if n.startswith("layers.") else f"blocks.{block}.{n}": t for n, t in first(run, block).items()}
        own = committed(source, block)
        assert found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own)
    assert run.manifest.init.lines() == [
        f"block 0: layers 0-1 of {source.merged.url}, with the stem of its block 0 and the head of its block 0",
        f"block 1: layer 2 of {source.merged.url}, with the stem of its block 1 and the head of its block 1",
    ]
    assert run.manifest.frozen_hash == "" and not run.store.exists("frozen.safetensors")


def test_a_run_that_is_done_is_read_without_a_merge_and_one_that_is_not_is_refused(tmp_path):
    run = settled(tmp_path / "source")
    commit(run, blocks=(0,))
    said = refusal(tmp_path, {"from": run.url})
    assert "neither merged nor done (block 1 at step 0 of 2)" in said and "dbtrain merge" in said
    commit(run, blocks=(1,))
    found = first(started(tmp_path, {"from": run.url}), 1)
    assert torch.equal(found["stem.patches.weight"], committed(Run(run), 1)["blocks.1.stem.patches.weight"])


def test_blocks_of_other_bounds_take_the_stem_of_the_first_layers_block_and_the_head_of_the_lasts(source, tmp_path):
    run = started(tmp_path, {"from": source.store.url}, layers_per_block=[1, 2])
    one, two = committed(source, 0), committed(source, 1)
    found = first(run, 1)
    assert torch.equal(found["stem.code.weight"], one["blocks.0.stem.code.weight"])
    assert torch.equal(found["head.linear.weight"], two["blocks.1.head.linear.weight"])
    assert torch.equal(found["layers.2.attention.qkv.weight"], two["layers.2.attention.qkv.weight"])
    assert run.manifest.init.lines()[1].endswith("the stem of its block 0 and the head of its block 1")
    whole = started(tmp_path, {"from": source.store.url}, name="whole", blocks=1, method="end_to_end")
    assert torch.equal(first(whole, 0)["layers.1.mlp.0.weight"], one["layers.1.mlp.0.weight"])


def test_repeat_starts_every_block_from_all_layers_of_one_shard(source, tmp_path):
    shard = f"{source.store.url}/blocks/00/{STEP}/model.safetensors"
    run = started(tmp_path, {"from": shard, "layers": "repeat"}, model=DEEPER, blocks=3)
    own = committed(source, 0)
    for block in range(3):
        found = first(run, block)
        assert len(found) == len(own)
        for layer in (0, 1):
            name = f"layers.{2 * block + layer}.mlp.0.weight"
            assert torch.equal(found[name], own[f"layers.{layer}.mlp.0.weight"])
        assert torch.equal(found["head.linear.bias"], own["blocks.0.head.linear.bias"])
    assert run.manifest.init.lines() == [
        f"blocks 0-2: layers 0-1 of {shard}, with the stem of its block 0 and the head of its block 0"
    ]


def test_a_shard_that_does_not_begin_with_layer_0_is_repeated_all_the_same(source, tmp_path):
    shard = f"{source.store.url}/blocks/01/{STEP}/model.safetensors"
    run = started(tmp_path, {"from": shard, "layers": "repeat"}, blocks=3)
    own = committed(source, 1)
    assert all(torch.equal(first(run, b)[f"layers.{b}.mlp.3.bias"], own["layers.2.mlp.3.bias"]) for b in range(3))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_a_plain_file_gives_all_blocks_its_stem_and_head_as_float32(source, tmp_path, kind):
    own = plain_file(source, tmp_path / "plain.safetensors", kind)
    run = started(tmp_path, {"from": str(tmp_path / "plain.safetensors")})
    for block in (0, 1):
        found = first(run, block)
        assert all(t.dtype is torch.float32 for t in found.values())
        assert all(torch.equal(t, own[n].to(kind).float()) for n, t in found.items())
    assert run.manifest.init.lines()[0].endswith("plain.safetensors, with its stem and its head")
    assert "does not tell its codebook" in run.manifest.init.lines()[-1]


def test_a_folder_with_an_index_is_read_file_by_file(source, tmp_path):
    own = plain_file(source, tmp_path / "all.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "somebody else\'s"}')
    parts = {"one.safetensors": {}, "two.safetensors": {}}
    for number, (name, tensor) in enumerate(sorted(own.items())):
        parts[list(parts)[number % 2]][name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    files = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    run = started(tmp_path, {"from": str(folder)})
    assert run.manifest.init.blocks[1].files == ("one.safetensors", "two.safetensors")
    assert all(torch.equal(t, own[n]) for n, t in first(run, 1).items())


def test_the_source_is_found_from_another_working_directory(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = started(tmp_path, {"from": "source/toy"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(first(run, 0)["layers.0.mlp.0.bias"], committed(source, 0)["layers.0.mlp.0.bias"])
    assert run.config.init.source == "source/toy"


def test_blocks_of_several_depths_cannot_repeat_one_network(source, tmp_path):
    init = {"from": source.store.url, "layers": "repeat"}
    assert "the blocks have 2, 4 layers" in refusal(tmp_path, init, model=DEEPER, layers_per_block=[2, 4])
    assert "the blocks have 2, 1 layers" in refusal(tmp_path, init)


@pytest.mark.parametrize(
    ("layers", "depth", "said"),
    [
        ("slice", 6, "model.depth=6, and init.from={} has 3 layers (0-2): take a network of 6 layers"),
        (
            "repeat",
            4,
            "is 2 here (model.depth=4), and init.from={} has 3 layers (0-2): take a network of 2 layers",
        ),
    ],
)
def test_a_network_of_another_depth_is_refused_with_the_numbers(source, tmp_path, layers, depth, said):
    url = source.store.url
    assert said.format(url) in refusal(tmp_path, {"from": url, "layers": layers}, model={**DEEPER, "depth": depth})


def test_one_shard_is_no_slice_of_several_blocks(source, tmp_path):
    shard = f"{source.store.url}/blocks/00/{STEP}/model.safetensors"
    assert "has 2 layers (0-1)" in refusal(tmp_path, {"from": shard})


def test_all_that_misfits_is_told_with_the_nearest_names(source, tmp_path):
    own = plain_file(source, tmp_path / "all.safetensors")
    own["layers.1.mlp.fc1.weight"] = own.pop("layers.1.mlp.0.weight")
    own["head.linear.weight"] = own["head.linear.weight"][:-1].contiguous()
    own["head.linear.bias"] = own["head.linear.bias"].to(torch.int64)
    own["teacher.logits"] = torch.zeros(3)
    save_file(own, tmp_path / "all.safetensors")
    said = refusal(tmp_path, {"from": str(tmp_path / "all.safetensors")})
    for part in (
        "1 missing: layers.1.mlp.0.weight (nearest: layers.1.mlp.fc1.weight)",
        "2 left over: layers.1.mlp.fc1.weight (nearest: layers.1.mlp.0.weight), teacher.logits",
        "1 of another shape: head.linear.weight is 9x12, not 10x12",
        "1 of a type that is none of F64, F32, F16, BF16: head.linear.bias is I64",
    ):
        assert part in said


def test_all_names_are_told_and_those_of_all_layers_once(source, tmp_path):
    said = refusal(tmp_path, {"from": source.store.url}, model={**BASE["model"], "dim": 16})
    assert "54 of another shape: " in said and "layers.{0-2}.attention.qkv.weight is 36x12, not 48x16" in said
    assert "blocks.{0-1}.stem.positions is 1x5x12, not 1x5x16" in said and said.count(" not ") == 1 + 22


def test_names_of_another_program_are_told_and_not_a_depth(tmp_path):
    save_file({"transformer.h.0.attn.weight": torch.zeros(3)}, tmp_path / "theirs.safetensors")
    said = refusal(tmp_path, {"from": str(tmp_path / "theirs.safetensors")})
    assert "1 left over: transformer.h.0.attn.weight" in said and "missing: head.linear.bias" in said


def test_stems_of_several_blocks_without_their_layers_are_refused(source, tmp_path):
    merged = {**committed(source, 0), **committed(source, 1)}
    save_file(merged, tmp_path / "flat.safetensors")
    said = refusal(tmp_path, {"from": str(tmp_path / "flat.safetensors")})
    assert "has stems of blocks 0, 1, and nothing says which layers are theirs" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "is no run, merged model, shard or safetensors file"),
        ("nowhere.safetensors", "does not exist"),
        ("source/toy/codebook.safetensors", "holds the codebook, not weights"),
    ],
)
def test_what_is_no_source_is_told(source, tmp_path, name, said):
    assert said in refusal(tmp_path, {"from": str(tmp_path / name)})


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt"])
def test_pytorchs_own_files_are_refused_whether_or_not_they_are_there(tmp_path, ending):
    said = refusal(tmp_path, {"from": str(tmp_path / f"weights{ending}")})
    assert "is a pickle by its name, which is never read" in said and "save_file" in said


def test_a_place_of_an_unknown_kind_is_told_with_its_key(tmp_path):
    said = refusal(tmp_path, {"from": "foo://bar"})
    assert (
        said == "init.from=foo://bar: cannot open foo://bar: foo:// is no kind of place that is known here; "
        "give a path, s3:// or gs://"
    )


def test_a_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(DamagedError, match="dbtrain never reads those"):
        started(tmp_path, {"from": str(tmp_path / "weights.safetensors")})


def test_another_file_under_the_same_name_since_is_refused(source, tmp_path):
    run = started(tmp_path, {"from": source.store.url})
    file = source.merged.path / "model-00002-of-00002.safetensors"
    other = settled(tmp_path / "other")
    commit(other, seed=1)
    file.unlink()
    shutil.copy(tmp_path / f"other/toy/blocks/01/{STEP}/model.safetensors", file)
    assert first(run, 0)
    with pytest.raises(DamagedError, match="was expected"):
        first(run, 1)
    file.unlink()
    with pytest.raises(MissingError, match="model-00002-of-00002"):
        first(run, 1)


def test_a_source_that_is_gone_is_told_before_workers_look_for_it(source, tmp_path):
    run = started(tmp_path, {"from": source.store.url})
    check_there(run)
    file = source.merged.path / "model-00002-of-00002.safetensors"
    file.unlink()
    check_there(run, only=(0,))  # it starts from the other file
    with pytest.raises(ShardError, match="model-00002-of-00002.safetensors is gone, from which block 1 starts: put it"):
        check_there(run)
    commit(run.store, blocks=(1,))
    check_there(Run(run.store))  # it goes on from its own commit


def test_values_that_are_no_numbers_are_refused_when_they_are_read(source, tmp_path):
    own = plain_file(source, tmp_path / "all.safetensors")
    own["stem.positions"][0, 0, 0] = torch.nan
    save_file(own, tmp_path / "all.safetensors")
    run = started(tmp_path, {"from": str(tmp_path / "all.safetensors")})
    with pytest.raises(DamagedError, match="stem.positions.*NaN"):
        first(run, 0)


def test_the_codebook_is_that_of_the_source_whatever_the_seed(source, tmp_path):
    run = started(tmp_path, {"from": source.store.url}, name="seeded", seed=5)
    assert run.manifest.codebook_hash == source.manifest.codebook_hash
    assert tensor_hash(run.codebook) == tensor_hash(source.codebook)
    said = refusal(tmp_path, {"from": source.store.url}, codebook={"dim": 11, "source": "random"})
    assert "set codebook.source=orthogonal" in said
    shard = f"{source.store.url}/blocks/00/{STEP}/model.safetensors"
    said = refusal(tmp_path, {"from": shard, "layers": "repeat"}, seed=5, model={**DEEPER, "depth": 4})
    assert "trained with another codebook" in said


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("noise", {"input_scaling": "signal"}, "trained with noise.input_scaling=unit (here signal)"),
        ("noise", {"sigma_data": 0.7}, "trained with noise.sigma_data=0.3015 (here 0.7)"),
        ("noise", {"sigma_max": 80.0}, "trained with sigma 20 to 3.162 to 0.5 (here 80 to 6.325 to 0.5)"),
        ("model", {"heads": 3}, "trained with model.heads=2 (here 3)"),
    ],
)
def test_what_a_weight_means_is_compared_and_told(source, tmp_path, section, changes, said):
    run = started(tmp_path, {"from": source.store.url}, **{section: {**BASE[section], **changes}})
    assert said in run.manifest.init.lines()[-1]


FLOW = {"process": "flow", "ranges": "uniform"}


def test_other_noise_is_told_with_that_of_the_weights_and_the_runs(source, tmp_path):
    def told(name, start, **changes):
        return [
            line for line in started(tmp_path, {"from": start}, name, **changes).manifest.init.lines() if "here" in line
        ]

    (line,) = told("flow", source.store.url, noise=FLOW)
    assert "trained with noise.process=gaussian (here flow): the same weights may" in line
    (line,) = told("end", source.store.url, blocks=1, method="end_to_end")
    assert "trained with sigma 20 to 3.162 to 0.5 (here no noise)" in line
    flow = settled(tmp_path / "flow-source", noise=FLOW)
    commit(flow)
    (line,) = told("shifted", flow.url, noise={**FLOW, "shift": 5})
    assert "trained with t 1 to 0.5 to 0 (here 1 to 0.8333 to 0)" in line
    # what the architecture takes by itself, and what two pilots measure of like data, is no other noise
    for name, noise in (("named", {"process": "gaussian"}), ("near", {"sigma_max": 20.5})):
        assert told(name, source.store.url, noise={**BASE["noise"], **noise}) == []


def test_nothing_is_read_before_training_but_headers_and_then_one_tensor_at_a_time(source, tmp_path, monkeypatch):
    opened, values, alive = [], [], []
    real = tensor_file.safe_open

    class Watched:
        def __init__(self, path, **options):
            opened.append(path.name)
            self.file = real(path, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            values.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(tensor_file, "safe_open", Watched)
    run = started(tmp_path, {"from": source.store.url})
    assert not values
    opened.clear()
    names = [name for name, _ in run.plan.model(1, "meta").named_parameters()]
    for _, tensor in read_block(run, run.manifest.init, 1, 2, names):
        alive.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in alive) <= 2
        del tensor
    assert opened == ["model-00002-of-00002.safetensors"] and len(values) == len(names) == len(set(values))


def test_a_run_without_init_keeps_its_hash():
    plain = load_config(None, base=BASE)
    assert "init" not in plain.content()
    assert plain.content_hash() == load_config(None, ["init=random"], base=BASE).content_hash()
    assert plain.content_hash() == load_config(None, ["init.layers=slice"], base=BASE).content_hash()
    assert plain.content_hash() != load_config(None, ["init.from=runs/a"], base=BASE).content_hash()


def test_another_source_is_another_run_and_the_key_is_told(source, tmp_path):
    run = started(tmp_path, {"from": source.store.url})
    with pytest.raises(ConfigError, match=r"init.from: /.*source/toy in run.json, /elsewhere now"):
        started(tmp_path, {"from": "/elsewhere"})
    shutil.rmtree(tmp_path / "source")
    started(tmp_path, {"from": run.config.init.source})  # a run that is there needs its source no more to go on


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=greedy", "init.from=a"], "method=greedy starts from random weights only: leave init out"),
        (["method=forward_forward", "init.from=a"], "starts from random weights only"),
        (["method=joint", "init.from=a", "init.layers=repeat"], "set init.layers=slice"),
        (["init.from=a", "init.branch.steps=3"], "init.from=a and init.branch exclude each other"),
        (["init.branch.steps=3", "init.stem=frozen"], "with init.branch leave it out"),
        (
            ["init.layers=repeat"],
            "starts every block from all layers of init.from, which is not set",
        ),
        (["init.head=frozen"], "init.head=frozen would keep random weights: set init.from"),
        (["init.form=a"], "unknown key init.form; did you mean init.from?"),
        (["init=runs/a"], "init=runs/a is no section of keys: write init.KEY=VALUE with one of from, layers"),
    ],
)
def test_sections_that_make_no_sense_are_refused_in_words(overrides, said):
    with pytest.raises(ConfigError) as told:
        load_config(None, overrides, base=BASE)
    assert said in str(told.value)


def test_the_word_random_and_overrides_take_each_other_back():
    assert load_config(None, ["init.from=b"], base={**BASE, "init": "random"}).init.source == "b"
    assert load_config(None, ["init=random"], base={**BASE, "init": {"from": "b"}}).init.source is None
    config = load_config(None, ["init.from=b"], base=BASE)
    assert config.model_dump(mode="json")["init"]["from"] == "b"


def test_branching_uses_a_run_as_source_by_hand(source, tmp_path):
    run = Run(settled(tmp_path / "new", model=DEEPER))
    initial = InitialWeights.of(run.plan, WeightSource.open(source.store.url), "repeat")
    names = [name for name, _ in run.plan.model(1, "meta").named_parameters()]
    found = dict(read_block(run, initial.origin, 1, 3, names))
    assert torch.equal(found["layers.5.mlp.0.weight"], committed(source, 1)["layers.2.mlp.0.weight"])


def test_all_of_it_works_in_an_object_store(tmp_path):
    url = f"memory://{tmp_path.name}"
    run = settled(f"{url}/source")
    commit(run)
    merge(Run(run))
    new = Run(settled(f"{url}/new", init={"from": run.url}))
    found = first(new, 1)
    loaded = Run(run).block(1).checkpoints.load(2).parts["model"]
    assert torch.equal(found["layers.2.mlp.0.weight"], loaded["layers.2.mlp.0.weight"])


def test_a_run_that_was_extended_since_its_merge_is_refused_until_it_is_done(source, tmp_path):
    lengths = ["training.steps=9", "cluster.restart_optimizer=true"]
    extend(source, longer(source.store.url, lengths), lambda line: None)
    said = refusal(tmp_path, {"from": source.store.url})
    assert "was extended and is not done (block 0 at step 2 of 9, block 1 at step 2 of 9)" in said
    assert f"give {source.merged.url} to start" in said
    assert started(tmp_path, {"from": source.merged.url}).manifest.init.place == source.merged.url
