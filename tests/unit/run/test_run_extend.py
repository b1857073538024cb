"""A run becomes longer in one step, keeps its commits, and says what its schedule was and is."""

import shutil
from dataclasses import replace

import pytest

from dbtrain import cli
from dbtrain.coordinator.status import status
from dbtrain.errors import ConfigError, RunLockedError, ShardError
from dbtrain.experiments.baseline import end_to_end, training_flops
from dbtrain.run.continued import longer
from dbtrain.run.extend import aside, extend
from dbtrain.run.gather import gather
from dbtrain.run.pack import pack
from dbtrain.run.places import place_of
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import write_manifest
from dbtrain.shards.storage.lock import RunLock
from tests.unit.run.carried import STEPS, commit, copied, files, parts
from tests.unit.small_runs import settled

TRAINING = {"steps": STEPS, "batch_size": 8, "ema": 0.9, "optimizer": {"warmup": 5}}
WSD = {**TRAINING, "optimizer": {"schedule": "wsd", "decay": 0.2, "warmup": 5}}


def run_of(folder, training=None, **changes):
    return Run(settled(folder, training=training or TRAINING, **changes))


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / "home")


def told_by(run, *lengths):
    lines = []
    extend(run, longer(run.store.url, lengths), lines.append)
    return lines


def refused(run, *lengths, error=ConfigError):
    before = {**files(run), "run.json": run.store.read("run.json")}
    with pytest.raises(error) as caught:
        told_by(run, *lengths)
    assert "\n" not in str(caught.value)
    assert {**files(run), "run.json": run.store.read("run.json")} == before
    return str(caught.value)


def test_an_extension_at_next_to_no_rate_says_so(run):
    for block in (0, 1):
        commit(run, block, STEPS)
    assert "learns little: ask for more steps" in told_by(run, "training.steps=52")[0]
    assert "learns little" not in told_by(Run(run.store), "training.steps=150")[0]


def test_all_blocks_become_longer_and_keep_their_commits(run):
    commit(run, 0, STEPS)
    commit(run, 1, 20)
    place, before, identity = place_of(run.store), files(run), run.block(0).identity
    lines = told_by(run, "training.steps=80")
    assert lines[0].startswith("block 0: 50 steps become 80; from step 50 on the rate climbs in 3 steps from 0%")
    assert lines[1].startswith("block 1: 50 steps become 80; to step 50 as before; from step 50 on")
    again = Run(run.store)
    assert files(run) == before and again.block(0).identity == identity and place_of(again.store) == place
    assert [block.steps for block in again.blocks] == [80, 80] and not again.block(0).done
    assert [s.row.phase for s in status(again)] == ["pending", "pending"]
    (extension,) = again.manifest.extensions
    assert (extension.before.steps, extension.after.steps) == (50, 80) and extension.version and extension.when > 1e9


def test_a_single_block_becomes_longer_and_keeps_its_other_exceptions(tmp_path):
    run = run_of(tmp_path, {**TRAINING, "blocks": {1: {"lr": 0.5}}})
    lines = told_by(run, "training.blocks={1: {steps: 70}}")
    assert "block 0: keeps its 50 steps (training.blocks.0.steps makes it longer)" in lines
    told_by(run, "training.blocks.1.steps=75", "training.steps=60")
    again = Run(run.store)
    assert [block.steps for block in again.blocks] == [60, 75] and again.config.training.blocks[1].lr == 0.5
    assert [len(block.schedule.stretches) for block in again.blocks] == [1, 2]


def test_a_wsd_run_goes_on_from_before_its_decay_and_what_came_after_is_set_aside(tmp_path):
    run = run_of(tmp_path, WSD)
    for block, steps in ((0, (40, 45, STEPS)), (1, (30,))):
        for step in steps:
            commit(run, block, step)
    before = files(run)
    lines = told_by(run, "training.steps=100")
    assert "it goes on at the peak rate from step 40, where its decay began, and decays from step 80 on" in lines[0]
    assert "checkpoints of step 45, 50 go to blocks/00/schedule_of_50_steps/" in lines[1]
    again = Run(run.store)
    assert [block.committed for block in again.blocks] == [40, 30]
    assert again.block(0).checkpoints.verify(40) == []
    kept = {str(path.relative_to(run.store.path)) for path in run.store.path.glob("blocks/00/schedule*/*/*")}
    gone = {path for path in before if "00000045" in path or "00000050" in path}
    assert {path.replace("schedule_of_50_steps/", "") for path in kept} == gone and len(kept) == 8
    assert all(run.store.read(path) == before[path.replace("schedule_of_50_steps/", "")] for path in kept)


def test_a_wsd_block_without_its_checkpoint_before_the_decay_climbs_again(tmp_path):
    run = run_of(tmp_path, WSD)
    commit(run, 0, STEPS)
    lines = told_by(run, "training.blocks.0.steps=100")
    assert "from step 50 on the rate climbs in 5 steps from 0% to 100% of its peak, where the wsd schedule" in lines[0]
    assert Run(run.store).block(0).committed == STEPS


def test_an_extension_that_was_cut_off_is_made_by_the_same_call(tmp_path, monkeypatch):
    run = run_of(tmp_path, WSD)
    for step in (40, 45, STEPS):
        commit(run, 0, step)
    run.block(0).checkpoints.set_aside(45, aside(run.block(0)))  # killed after the newest of two
    assert run.block(0).committed == 45 and run.block(0).steps == STEPS
    told_by(run, "training.steps=100")
    assert Run(run.store).block(0).committed == 40
    assert {p.parent.name for p in run.store.path.glob("blocks/00/schedule*/*/COMMIT.json")} == {
        "step_00000045",
        "step_00000050",
    }


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (["training.steps=40"], "a run can only become longer: block 0 has 50 steps (20 are done), not 40; block 1"),
        (["training.steps=50"], "no block becomes longer, they have as many steps already (block 0 50, block 1 50)"),
        ([], "no block becomes longer"),
        (["training.blocks.2.steps=60"], "training.blocks names block 2; the last is 1"),
        (["training.optimizer.lr=1"], "'training.optimizer.lr=1' is not for this command: extend makes blocks longer"),
        (
            ["training.blocks={0: {steps: 60, lr: 1.0}}"],
            "extend makes blocks longer, and changes nothing else: it takes",
        ),
        (["seed=3"], "'seed=3' is not for this command"),
        (["training.steps=many"], "training.steps"),
    ],
)
def test_what_is_no_extension_is_refused_by_name(run, lengths, words):
    commit(run, 0, 20)
    assert words in refused(run, *lengths)


def test_a_run_that_trains_is_not_extended(run):
    with RunLock(run.store, "dbtrain train toy"):
        assert "dbtrain train toy" in refused(run, "training.steps=80", error=RunLockedError)


def test_blocks_that_are_trained_in_turn_are_not_extended(tmp_path):
    run = run_of(tmp_path, method="greedy")
    assert "trains its blocks in turn (method=greedy)" in refused(run, "training.steps=80")


def test_a_run_of_one_job_for_all_blocks_is_extended(tmp_path):
    run = run_of(tmp_path, method="joint")
    told_by(run, "training.steps=80")
    assert [block.steps for block in Run(run.store).blocks] == [80]


def test_a_run_is_not_extended_before_its_branch_is_done_nor_is_the_branch(tmp_path):
    run = run_of(
        tmp_path, model={"arch": "vit", "depth": 4, "dim": 12, "heads": 2, "patch": 4}, init={"branch": {"steps": 5}}
    )
    assert "the branch that every block of" in refused(run, "training.steps=80")
    write_manifest(run.store, replace(run.manifest, branch=True))
    assert "is the branch of a run: extend the run" in refused(Run(run.store), "training.steps=80")


def test_a_block_without_its_optimizers_state_is_extended_only_with_one_that_starts_anew(run):
    what = {role: part for role, part in parts(run, 0, 1).items() if role != "optim"}
    run.block(0).checkpoints.commit(STEPS, what, loss=0.5, attempt=1, fence=lambda: None)
    assert "block 0 was done at step 50 and gave up its optimizer's state" in refused(run, "training.steps=80")
    told_by(run, "training.blocks.1.steps=60")
    told_by(run, "training.steps=80", "training.blocks.1.steps=80", "cluster.restart_optimizer=true")
    assert Run(run.store).config.cluster.restart_optimizer


def test_a_configuration_of_before_is_told_what_to_do(run, tmp_path):
    config = run.config
    longer_config = config.model_copy(update={"training": config.training.model_copy(update={"steps": 80})})
    with pytest.raises(ConfigError, match=r"training.steps: 50 in run.json, 80 now; .*make it longer: dbtrain extend"):
        prepare(longer_config, Run(run.store), pytest.fail)
    told_by(run, "training.steps=80")
    with pytest.raises(ConfigError, match=r"it was extended: to train it on, dbtrain resume .*\(training.steps=80\)"):
        prepare(config, Run(run.store), pytest.fail)
    assert prepare(longer_config, Run(run.store), pytest.fail).schedule(0).end == 80
    other = longer_config.model_copy(update={"seed": 9})
    with pytest.raises(ConfigError, match=r"seed: 0 in run.json, 9 now; choose another name \(name=...\), give"):
        prepare(other, Run(run.store), pytest.fail)


def test_flops_are_those_of_the_new_length_and_a_baseline_of_the_old_one_is_not_silently_compared(run, tmp_path):
    before = training_flops(run.plan)
    old = end_to_end(run.config)
    whole = Run.at(old.run_url)
    whole.store.makedirs()
    prepare(old, whole, pytest.fail)
    told_by(run, "training.steps=100")
    assert training_flops(Run(run.store).plan) == 2 * before
    new = end_to_end(Run(run.store).config)
    assert new.training.steps == pytest.approx(2 * old.training.steps, abs=1)
    with pytest.raises(
        ConfigError, match=rf"training.steps: {old.training.steps} in run.json, {new.training.steps} now"
    ):
        prepare(new, Run.at(new.run_url), pytest.fail)


@pytest.mark.parametrize("packed", [False, True])
def test_gather_takes_the_extension_of_another_place(run, tmp_path, packed):
    there = copied(run, tmp_path / "there")
    commit(run, 0, 20)
    told_by(there, "training.steps=80")
    commit(there, 1, 60)
    source = there.store.url
    if packed:
        pack(there, source := str(tmp_path / "block.packed"))
    lines = []
    gather(run, [source], tell=lines.append)
    assert lines[0] == f"{source} was extended to training.steps=80, and so this run is now:"
    again = Run(run.store)
    assert [block.committed for block in again.blocks] == [20, 60] and [b.steps for b in again.blocks] == [80, 80]
    assert again.manifest.extensions == Run(there.store).manifest.extensions
    assert again.manifest.config_hash == Run(there.store).manifest.config_hash
    gather(again, [source])


def test_gather_takes_what_a_place_that_was_not_extended_trained_with_the_same_schedule(run, tmp_path):
    there = copied(run, tmp_path / "there")
    commit(there, 1, STEPS)
    told_by(run, "training.steps=80")
    gather(run, [there.store.url])
    assert Run(run.store).block(1).committed == STEPS and Run(run.store).block(1).steps == 80


def test_gather_refuses_what_was_trained_by_the_schedule_of_before(tmp_path):
    run = run_of(tmp_path / "home", WSD)
    there = copied(run, tmp_path / "there")
    commit(there, 0, 40)
    commit(there, 0, STEPS)
    commit(there, 1, 30)
    told_by(run, "training.steps=100")
    with pytest.raises(
        ShardError, match=r"block 0 of .*: step 50 was trained by the schedule of 50 steps, and here that "
    ):
        gather(run, [there.store.url])
    assert [block.committed for block in Run(run.store).blocks] == [0, 30]
    gather(there, [run.store.url])  # the extension goes there, whose block is then back before its decay
    gather(run, [there.store.url])
    assert [block.committed for block in Run(run.store).blocks] == [40, 30]


def test_gather_refuses_a_place_that_was_extended_otherwise(run, tmp_path):
    there = copied(run, tmp_path / "there")
    told_by(run, "training.steps=80")
    told_by(there, "training.steps=85")
    told_by(there, "training.steps=90")
    with pytest.raises(ShardError, match=r"was extended to training.steps=90, and .* otherwise, to training.steps=80"):
        gather(run, [there.store.url])


def test_two_places_that_were_extended_alike_fit(run, tmp_path):
    there = copied(run, tmp_path / "there")
    for place in (run, there):
        told_by(place, "training.steps=80")
    commit(there, 0, 70)
    gather(run, [there.store.url])
    assert Run(run.store).block(0).committed == 70


def test_a_place_whose_newest_checkpoint_is_damaged_is_told(run, tmp_path):
    there = copied(run, tmp_path / "there")
    commit(there, 0, 20)
    commit(there, 0, 30)
    shutil.copy(there.store.path / "run.json", next(there.store.path.glob("blocks/00/step_00000030/model*")))
    lines = []
    gather(run, [there.store.url], tell=lines.append)
    assert (
        "has a checkpoint of step 30 that is damaged" in lines[0] and "step 20 is the newest that is whole" in lines[0]
    )
    assert Run(run.store).block(0).committed == 20


def test_the_command_says_what_is_next(tmp_path):
    from typer.testing import CliRunner

    run = run_of(tmp_path / "toy")
    done = CliRunner().invoke(cli.app, ["extend", run.store.url, "training.steps=80"])
    assert done.exit_code == 0 and f"now: dbtrain resume {run.store.url}" in " ".join(done.output.split())
    done = CliRunner().invoke(cli.app, ["extend", run.store.url, "training.steps=70"])
    assert done.exit_code == 2 and "Traceback" not in done.output
    other = shutil.copytree(run.store.path, tmp_path / "copy")
    done = CliRunner().invoke(cli.app, ["extend", str(other), "training.steps=90"])
    assert done.exit_code == 2 and "a run's directory has its name" in " ".join(done.output.split())
    assert len(Run.at(str(other)).manifest.extensions) == 1
