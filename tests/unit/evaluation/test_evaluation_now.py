"""A run that is not done can be merged and looked at; wherever such a model is used it says how far its blocks are."""

import io
import threading

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import ConfigError, IncompleteRunError, ShardError
from dbtrain.evaluation.inspect import inspect_path
from dbtrain.evaluation.opening import model_of, progress_of
from dbtrain.evaluation.report import evaluate_run
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run import newest
from dbtrain.run.run import Run
from dbtrain.run.weight_meaning import notes
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.local import LocalFiles
from dbtrain.shards.storage.store import Store
from tests.unit.run.carried import STEPS, commit, files, sealed

PROGRESS = f"steps 20 of {STEPS}, 30 of {STEPS}"


@pytest.fixture
def run(tmp_path):
    run = sealed(tmp_path)
    commit(run, 0, 20)
    commit(run, 1, 30)
    return run


def everything(run):
    return {str(path): path.read_bytes() for path in sorted(run.store.path.rglob("*")) if path.is_file()}


def said(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_a_half_trained_run_is_merged_when_it_is_asked_for_and_marked_everywhere(run):
    with pytest.raises(IncompleteRunError, match=r"is not finished: .*or merge what there is by now \(--now\)"):
        merge_and_verify(run)
    code, told = said("merge", run.store.url, "--now")
    assert code == 0 and f"its blocks are not done: {PROGRESS}" in told
    merged = MergedDirectory(run.merged)
    assert run.merged.read_json("config.json")["unfinished"] == PROGRESS == merged.progress
    assert "unfinished" not in merged.manifest.others
    console = Console(file=io.StringIO(), width=200)
    inspect_path(run.merged.url, console)
    assert f"not done: {PROGRESS}" in console.file.getvalue() and f"20 of {STEPS}" in console.file.getvalue()
    code, told = said("eval", run.store.url)
    assert code == 0 and f"not done: {PROGRESS}" in told
    assert run.store.read_json("evaluation.json")["unfinished"] == PROGRESS


def test_nothing_starts_from_a_half_trained_model_of_a_run_without_being_asked_to(run):
    merge_and_verify(run, now=True)
    with pytest.raises(ConfigError, match="is a run that is neither merged nor done"):
        WeightSource.open(run.store.url)
    asked = WeightSource.open(run.merged.url)
    told = f"init.from={run.merged.url} is a model whose blocks were not done: {PROGRESS}"
    assert notes(run.plan, asked) == (told,)


def test_the_merge_of_the_whole_run_takes_its_place(run):
    merge_and_verify(run, now=True)
    for block in (0, 1):
        commit(run, block, STEPS)
    result, _ = merge_and_verify(Run(run.store))
    assert result.progress == "" and "unfinished" not in run.merged.read_json("config.json")
    shown = []
    evaluate_run(Run(run.store), show=lambda metric, scores, progress: shown.append(progress))
    assert shown == [""] and "unfinished" not in run.store.read_json("evaluation.json")


def test_a_block_without_a_commit_is_named(tmp_path):
    run = sealed(tmp_path)
    commit(run, 0, 20)
    with pytest.raises(ShardError, match="1 of 2 blocks have no good checkpoint: 1; train those"):
        merge_and_verify(run, now=True)
    with pytest.raises(ShardError, match="1 of 2 blocks have no good checkpoint: 1; train those"), model_of(run, True):
        pass
    assert not run.merged.exists("config.json")


def test_the_newest_commits_are_read_and_nothing_is_written(run):
    before = everything(run)
    with model_of(run, now=True) as merged:
        assert progress_of(run, merged) == PROGRESS
        for block, step in ((0, 20), (1, 30)):
            wanted = run.block(block).checkpoints.load(step, ("ema",)).parts["ema"]
            found = merged.block(block)
            assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)
    assert everything(run) == before


def test_a_damaged_commit_gives_way_to_the_one_before(run, capsys):
    commit(run, 0, 40)
    path = next(run.store.path.glob("blocks/00/step_00000040/ema*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with model_of(run, now=True) as merged:
        assert [row.step for row in merged.blocks] == [20, 30]
    assert "skipped checkpoint 40 of block 0" in capsys.readouterr().err


def committing(run, monkeypatch, method, times):
    """Before a call of the storage, two newer commits of block 0 come and clean the older ones away."""
    real, left, step, busy = getattr(LocalFiles, method), [times], [40], [False]

    def call(files, name, *arguments):
        if left[0] and not busy[0] and "blocks/00/step_" in name:
            left[0] -= 1
            busy[0] = True
            for _ in range(2):
                step[0] += 1
                commit(run, 0, step[0])
            busy[0] = False
        return real(files, name, *arguments)

    monkeypatch.setattr(LocalFiles, method, call)
    return step


@pytest.mark.parametrize("method", ["read", "reading", "copy"])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_commits_that_are_replaced_while_they_are_read_are_looked_for_again(run, monkeypatch, method, times):
    step = committing(Run(run.store), monkeypatch, method, times)
    if method != "copy":  # nothing is linked there
        with model_of(Run.at(run.store.url), now=True) as merged:
            assert merged.blocks[0].step == step[0] > 40 and merged.block(0)
    result, _ = merge_and_verify(Run.at(run.store.url), now=True)
    assert [row[1] for row in result.blocks] == [step[0], 30] and step[0] > 40
    assert result.path == run.merged.url and MergedDirectory(run.merged).blocks[0].step == step[0]
    assert not [name for name in run.store.list() if name.startswith("merged.building")]


@pytest.mark.parametrize("method", ["read", "reading"])
def test_a_block_that_never_holds_still_is_named(run, monkeypatch, method):
    monkeypatch.setattr(newest, "TRIES", 3)
    committing(Run(run.store), monkeypatch, method, 1000)
    fast = pytest.raises(ShardError, match=r"block 0 of .* replaced its commits 3 times while they were read: raise")
    with fast, model_of(Run.at(run.store.url), now=True):
        pass


def test_an_error_of_a_merge_while_it_trains_names_the_files_of_the_run(run, capsys):
    for step in (20, 40):
        commit(run, 0, step)
    paths = [next(run.store.path.glob(f"blocks/00/step_000000{step}/ema*")) for step in (20, 40)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ShardError, match="1 of 2 blocks have no good checkpoint") as caught:
        merge_and_verify(run, now=True)
    told = capsys.readouterr().err
    assert all(str(path) in told and str(path) in str(caught.value) for path in paths), told
    assert ".held" not in str(caught.value) + told and not list(run.store.path.glob("merged*"))


def test_what_fails_without_newer_commits_fails_at_once(run, monkeypatch):
    tried = []

    def full(store, name, pieces):
        tried.append(name)
        raise ShardError("the disk is full")

    monkeypatch.setattr(Store, "write_stream", full)
    with pytest.raises(ShardError, match="the disk is full"), model_of(run, now=True):
        pass
    assert len(tried) == 1


def test_a_run_that_commits_all_the_time_is_read_and_merged(run):
    """A thread commits and cleans up as fast as it can, of the blocks in turn."""
    stop, failed = threading.Event(), []

    def train():
        step = 31
        try:
            while not stop.is_set():
                commit(run, step % 2, step)
                step += 1
        except Exception as error:  # told by the main thread
            failed.append(error)

    thread = threading.Thread(target=train)
    run.manifest, run.config, run.plan  # noqa: B018  read before two threads do
    thread.start()
    try:
        for _ in range(5):
            with model_of(Run(run.store), now=True) as merged:
                assert all(merged.block(block) for block in range(2))
            assert merge_and_verify(Run(run.store), now=True)[0].tensors
    finally:
        stop.set()
        thread.join()
    assert not failed


def test_text_and_pictures_of_a_run_that_is_not_done_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"arch": "dit", "depth": 3, "dim": 12, "heads": 2, "patch": 4}
    run = sealed(tmp_path / "runs", model=model, codebook={}, noise={"ranges": "paper"})
    for block in (0, 1):
        commit(run, block, 10)
    before = files(run)
    code, told = said("sample", run.store.url, "--now", "--count", "2", "--steps", "3")
    assert code == 0 and "in toy-now.png" in told, told
    assert f"its blocks are not done: steps 10 of {STEPS}, 10 of {STEPS}" in told
    assert (tmp_path / "toy-now.png").exists() and not run.store.exists("samples.png") and files(run) == before
    assert said("sample", run.store.url)[0] == 1
