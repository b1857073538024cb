"""Blocks that other places trained come into a run verified, whole or not at all, and never over newer ones unasked."""

import shutil
from dataclasses import replace

import pytest

from dbtrain.errors import ConfigError, RunLockedError, ShardError
from dbtrain.run.gather import gather, missing
from dbtrain.run.pack import pack
from dbtrain.run.run import Run
from dbtrain.shards.manifest import write_manifest
from dbtrain.shards.origin import BlockOrigin, Origin
from dbtrain.shards.storage.fence import newest_attempt
from dbtrain.shards.storage.lock import RunLock
from dbtrain.shards.storage.store import Store
from tests.unit.run.carried import STEPS, commit, copied, files, sealed, steps
from tests.unit.small_runs import settled


@pytest.fixture
def home(tmp_path):
    return sealed(tmp_path / "home")


@pytest.fixture
def there(home, tmp_path):
    return copied(home, tmp_path / "there")


def told_by(run, *sources, **options):
    lines = []
    gather(run, [str(source) for source in sources], tell=lines.append, **options)
    return lines


def refused(run, *sources, error=ShardError, **options):
    """The message of a gather that fails, and whatever it left is as it was."""
    before = files(run)
    with pytest.raises(error) as caught:
        told_by(run, *sources, **options)
    assert "\n" not in str(caught.value)
    assert files(run) == before
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_what_another_place_trained_is_taken_bit_for_bit(home, there, tmp_path, packed):
    commit(there, 0, 20)
    commit(there, 1, STEPS)
    source = tmp_path / "both.packed"
    if packed:
        pack(there, str(source))
    else:
        source = there.store.url
    lines = told_by(home, source)
    assert [line.split(",")[0] for line in lines] == ["block 0: step 20 (loss 0.25", "block 1: step 50 (loss 0.25"]
    assert "attempt 1 at there-000001, digest " in lines[0] and str(source) in lines[0]
    assert files(home) == files(there)
    assert steps(home) == [20, STEPS] and home.block(1).done
    assert missing(home) == ["block 0 (step 20 of 50)"]


def test_the_same_gather_again_changes_nothing(home, there):
    commit(there, 0, 20)
    told_by(home, there.store.url)
    before = files(home)
    owner = newest_attempt(home.block(0).store)
    assert "is here already" in told_by(home, there.store.url)[0]
    assert files(home) == before and newest_attempt(home.block(0).store) == owner


def test_several_places_and_what_they_lack(home, tmp_path):
    one, two = copied(home, tmp_path / "one"), copied(home, tmp_path / "two")
    commit(one, 0, 20)
    commit(two, 0, 30)
    commit(two, 1, 10)
    told_by(home, one.store.url, two.store.url)
    assert steps(home) == [30, 10]
    assert home.block(0).checkpoints.steps() == [30]


def test_only_the_blocks_that_are_asked_for(home, there):
    commit(there, 0, 20)
    commit(there, 1, 20)
    told_by(home, there.store.url, numbers=[1])
    assert steps(home) == [0, 20]
    with pytest.raises(ConfigError, match="there is no block 2: run toy has blocks 0 to 1"):
        gather(home, [there.store.url], numbers=[2])


def test_a_newer_copy_takes_the_place_of_an_older_one_which_is_kept_as_long_as_commits_are(home, there):
    for step in (10, 20, 30):
        commit(there, 0, step)
        told_by(home, there.store.url)
    assert home.block(0).checkpoints.steps() == [20, 30]


def test_an_older_copy_never_replaces_a_newer_one_unless_told_to(home, there):
    commit(there, 0, 20)
    commit(home, 0, 30, place="here-000002", attempt=3)
    said = refused(home, there.store.url)
    assert f"block 0: {there.store.url} has step 20 (loss 0.25, attempt 1 at there-000001" in said
    assert "is older than step 30 (loss 0.25, attempt 3 at here-000002" in said
    assert f"--take {there.store.url} goes back to the older one" in said
    told_by(home, take=there.store.url)
    assert steps(home) == [20, 0] and home.block(0).checkpoints.steps() == [20]
    assert told_by(home, take=there.store.url) and steps(home) == [20, 0]


def test_two_places_that_trained_one_step_are_shown_side_by_side(home, tmp_path):
    one, two = copied(home, tmp_path / "one"), copied(home, tmp_path / "two")
    commit(one, 0, 20, seed=1, place="one-00000a", loss=0.5)
    commit(two, 0, 20, seed=2, place="two-00000b", loss=0.75, attempt=4)
    commit(two, 1, 20)
    with pytest.raises(ShardError) as caught:
        gather(home, [one.store.url, two.store.url])
    said = str(caught.value)
    assert "step 20 (loss 0.5, attempt 1 at one-00000a, digest" in said
    assert "step 20 (loss 0.75, attempt 4 at two-00000b, digest" in said
    assert f"decide with --take {two.store.url}" in said and "\n" not in said
    assert steps(home) == [0, 20]  # what is clear was taken
    told_by(home, one.store.url, two.store.url, take=two.store.url)
    assert home.block(0).checkpoints.newest_commit().place == "two-00000b"
    assert f"{home.store.url} has step 20" in refused(home, one.store.url)
    told_by(home, take=one.store.url)
    assert home.block(0).checkpoints.newest_commit().place == "one-00000a"
    assert home.block(0).checkpoints.verify(20) == []
    assert told_by(home, one.store.url) and "is here already" in told_by(home, one.store.url)[0]


def test_a_checkpoint_that_was_damaged_here_is_restored_from_a_copy(home, there):
    commit(there, 0, STEPS)
    told_by(home, there.store.url)
    path = home.store.path / "blocks/00/step_00000050/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    told_by(home, there.store.url)
    assert home.block(0).checkpoints.verify(STEPS) == []
    assert Run(home.store).block(0).done


def test_weights_alone_are_enough_for_a_done_block_and_are_completed_later(home, there, tmp_path):
    commit(there, 0, STEPS)
    whole, weights = tmp_path / "whole", tmp_path / "weights"
    pack(there, str(whole), [0])
    pack(there, str(weights), [0], weights_only=True)
    assert weights.stat().st_size < 0.6 * whole.stat().st_size
    told_by(home, weights)
    assert home.block(0).done and set(home.block(0).checkpoints.newest_commit().files) == {
        "model.safetensors",
        "ema.safetensors",
    }
    told_by(home, whole)
    assert len(home.block(0).checkpoints.newest_commit().files) == 3
    assert "is here already" in told_by(home, weights)[0]
    assert files(home) == files(there)


def test_a_run_that_trains_here_is_left_alone(home, there):
    commit(there, 0, 20)
    with RunLock(home.store, "dbtrain train toy"):
        said = refused(home, there.store.url, error=RunLockedError)
    assert "is used by 'dbtrain train toy'" in said


def test_what_is_gathered_counts_as_an_attempt_so_that_a_cut_off_worker_commits_nothing_over_it(home, there):
    from dbtrain.errors import FencedError
    from dbtrain.shards.storage.fence import check, claim

    claim(home.block(0).store, 4, "worker")
    commit(there, 0, 20)
    told_by(home, there.store.url)
    assert newest_attempt(home.block(0).store) == 5
    with pytest.raises(FencedError):
        check(home.block(0).store, "worker")


def test_a_run_that_is_not_sealed_here(home, there, tmp_path):
    commit(there, 0, 20)
    with pytest.raises(ShardError, match="has no run.json: copy the folder there first that dbtrain prepare sealed"):
        gather(Run(Store(tmp_path / "empty")), [there.store.url])


FOREIGN = {
    "name": ({"name": "other"}, "run is 'other', expected 'toy'"),
    "levels": ({"noise": {"ranges": "uniform", "sigma_min": 0.25, "sigma_max": 20.0}}, "levels is "),
    "codebook": ({"seed": 1}, "codebook_hash is "),
    "data": ({"data": {"source": "digits", "validation": 0.2}}, "data_hash is "),
    "model": ({"model": {"arch": "vit", "depth": 3, "dim": 14, "heads": 2, "patch": 4}}, "architecture_hash is "),
}


@pytest.mark.parametrize("which", FOREIGN)
@pytest.mark.parametrize("packed", [False, True])
def test_another_run_is_refused_by_what_differs(home, tmp_path, which, packed):
    changes, words = FOREIGN[which]
    other = sealed(tmp_path / "other", **changes)
    commit(other, 0, 20)
    source = tmp_path / "packed"
    if packed:
        pack(other, str(source))
    said = refused(home, source if packed else other.store.url)
    assert words in said and "run.json belongs elsewhere" in said


def test_a_run_that_was_trained_in_another_way_is_refused_by_the_key(home, tmp_path):
    training = {"steps": STEPS, "batch_size": 4, "ema": 0.9}
    other = Run(settled(tmp_path / "other", training=training))
    commit(other, 0, 20)
    assert "training.batch_size: 8 in run.json, 4 now there" in refused(home, other.store.url)


def test_blocks_that_began_with_other_weights(home, there):
    """As where each place trained a branch of its own."""
    rows = [BlockOrigin(block.identity.layers, "stem", "head", ("model.safetensors",)) for block in there.blocks]
    origin = Origin("branch/blocks/00/step_00000009", {"model.safetensors": "a" * 64}, tuple(rows))
    write_manifest(there.store, replace(there.manifest, init=origin))
    commit(there, 0, 20)
    assert "began with other weights than" in refused(home, there.store.url)


def test_a_shard_of_another_block_in_the_folder_of_this_one(home, there):
    commit(there, 0, 20)
    shutil.copytree(there.store.path / "blocks/00", there.store.path / "blocks/01")
    commit(there, 1, 10)
    shutil.rmtree(there.store.path / "blocks/01/step_00000010")
    with pytest.raises(ShardError, match="block 1: .*block is 0, expected 1"):
        gather(home, [there.store.url])
    assert steps(home) == [20, 0]


def test_a_checkpoint_beyond_the_end_of_the_run(home, there):
    commit(there, 0, STEPS + 10)
    assert "has step 60, and here the block ends at 50" in refused(home, there.store.url)


@pytest.mark.parametrize("kind", ["absent", "empty", "config"])
def test_what_is_no_place(home, tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    if kind == "config":
        path.write_text("name: toy\n")
    words = {"absent": "there is nothing of that name", "empty": "it has no run.json", "config": "is no packed file"}
    assert words[kind] in refused(home, path)


def test_one_bad_place_does_not_keep_back_the_others(home, there, tmp_path):
    commit(there, 1, 20)
    with pytest.raises(ShardError, match="absent is not a run directory"):
        gather(home, [str(tmp_path / "absent"), there.store.url])
    assert steps(home) == [0, 20]


def test_object_stores_on_both_sides(there, tmp_path, home):
    commit(there, 0, 20)
    commit(there, 1, STEPS)
    remote = Store("memory://places-test/toy")
    for name in ("run.json", "codebook.safetensors"):
        remote.write(name, home.store.read(name))
    pack(there, "memory://places-test/carried.packed")
    try:
        told_by(Run(remote), "memory://places-test/carried.packed")
        assert steps(Run(remote)) == [20, STEPS]
        told_by(home, remote.url)
        assert files(home) == files(there)
        assert "neither a run's directory nor a packed file" in refused(home, "memory://places-test/nothing")
    finally:
        Store("memory://places-test").remove("toy")
