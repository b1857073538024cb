"""A merged model of which one block at a time is in memory: the same answers, and no more memory than that."""

import json
import os
import re
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import ShardError
from dbtrain.evaluation import residency, transfer
from dbtrain.evaluation.opening import read_merged_model
from dbtrain.evaluation.residency import ResidentBlocks, choose
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.side_by_side import Beside
from tests.unit.alive import Alive
from tests.unit.small_runs import commit, settled

CPU = torch.device("cpu")
MODEL = {"depth": 5, "dim": 12, "heads": 2}
TEXT = {"source": "python_topics", "length": 16}
RUNS = {
    "vit": {"model": {"arch": "vit", "patch": 4, **MODEL}},
    "dit": {"model": {"arch": "dit", "patch": 4, **MODEL}, "codebook": {}},
    "ar_lm": {"model": {"arch": "ar_lm", **MODEL}, "data": TEXT, "codebook": {"dim": 28}},
    "masked_lm": {"model": {"arch": "masked_lm", **MODEL}, "data": TEXT, "codebook": {}, "noise": {}},
    "joint": {"model": {"arch": "vit", "patch": 4, **MODEL}, "method": "joint"},
    "greedy": {"model": {"arch": "vit", "patch": 4, **MODEL}, "method": "greedy"},
}
"""Five layers in two blocks, so that these differ."""
OWN = {"greedy": lambda block, name: block == 0 or name.startswith(("layers.3.", "layers.4.", "head."))}
"""Which parameters a shard holds, where they are not all that its block computes with."""


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    made = {}

    def run_of(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            changes = dict(RUNS[name])
            if "data" in changes:
                changes["data"] = {**TEXT, "cache": str(out / "tokens")}
            evaluation = {"batch_size": 4, "texts": 10, "steps_per_block": 2}
            store = settled(out / "runs", evaluation=evaluation, **changes)
            commit(store, blocks=(0,) if name == "joint" else (0, 1), holds=OWN.get(name, lambda block, name: True))
            merge_and_verify(Run(store))
            made[name] = Run(store)
        return made[name]

    return run_of


def told(*command):
    """What a command prints, without what it says of times and memory."""
    result = CliRunner().invoke(cli.app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    return result


def kept(run, name):
    return json.loads(run.store.read(name))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save(path)
    return path


EVALUATED = [
    ("vit", "accuracy"),
    ("ar_lm", "bits"),
    ("ar_lm", "generated"),
    ("masked_lm", "elbo_bits"),
    ("greedy", "accuracy"),
]


@pytest.mark.parametrize(("name", "metric"), EVALUATED)
def test_scores_are_the_same_bits(run_of, name, metric):
    run, found = run_of(name), []
    for resident in ("all", "one"):
        texts = ["evaluation.texts=3"] if metric == "generated" else []
        output = told(
            "eval", run.store.url, f"evaluation.resident={resident}", f"evaluation.metric={metric}", *texts
        ).output
        found.append(kept(run, "evaluation.json")["scores"])
        line = "all 2 blocks in memory" if resident == "all" else "one block of 2 in memory and the next one read ahead"
        assert line in " ".join(output.split())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["vit", "dit", "ar_lm", "masked_lm"])
def test_losses_are_the_same_bits_and_each_block_is_read_once(run_of, name):
    run, found = run_of(name), []
    for resident in ("all", "one"):
        output = told("losses", run.store.url, "--levels", 4, "--samples", 20, f"evaluation.resident={resident}").output
        found.append(kept(run, "losses.json"))
    assert found[0] == found[1] and "read 2 times" in " ".join(output.split())


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_samples_are_the_same_bits_and_each_block_is_read_once(run_of, tmp_path, solver):
    run, found = run_of("dit"), []
    for resident in ("all", "one", "auto"):
        out = tmp_path / f"{resident}.npy"
        command = ("sample", run.store.url, "--count", 10, "--steps", 6, "--solver", solver, "--out", out)
        output = told(*command, "evaluation.batch_size=4", f"evaluation.resident={resident}").output
        found.append(np.load(out))
        assert ("read 2 times" in " ".join(output.split())) == (resident != "all")
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("name", ["ar_lm", "masked_lm"])
def test_a_text_is_continued_and_judged_by_the_same_bits(run_of, name):
    run, found = run_of(name), []
    for resident in ("all", "one"):
        command = ("generate", run.store.url, "--prompt", "the ", "--length", 6, "--seed", 1)
        written = told(*command, f"evaluation.resident={resident}")
        long = "a text of more than one window, which is read in pieces"
        score = told("predict", run.store.url, "--text", long, "--resident", resident).stdout
        found.append((written.stdout, score.partition("one block of")[0]))
        assert ("one block of 2 in memory" in written.stderr) == (resident == "one")
    assert found[0] == found[1] and len(found[0][0]) > 6
    # of a text, a block is read once for all of its pieces
    assert "read 2 times" in " ".join(score.split())


def test_a_picture_is_classified_by_the_same_bits(run_of, picture):
    run = run_of("vit")
    answers = [told("predict", run.store.url, picture, "--resident", r).stdout for r in ("all", "one")]
    assert answers[1].startswith(answers[0]) and "read 2 times" in answers[1]


def test_all_batches_pass_a_block_before_the_next_one_is_read(run_of):
    output = told("eval", run_of("vit").store.url, "evaluation.resident=one").output
    # two splits of many batches walk down the chain: 0, 1; and once more as the control whose order is 1, 0; what
    # is in memory at the end of one walk begins the next
    assert int(re.search(r"read (\d+) times", " ".join(output.split()))[1]) == 5


def test_two_blocks_are_in_memory_and_without_room_for_two_one(run_of, monkeypatch):
    run = run_of("ar_lm")
    for ahead, most in ((True, 2), (False, 1)):
        weights = Alive(residency.check_shard)
        with monkeypatch.context() as patched:
            patched.setattr(residency, "check_shard", weights)
            model = read_merged_model(MergedDirectory(run.merged), CPU, "ahead" if ahead else "alone")
            for block in (0, 1, 0, 1, 0):
                assert all(p.numel() for p in model.blocks[block].parameters())
                assert not any(p.numel() for p in model.blocks.shells[1 - block].parameters())
                while ahead and len(weights.held()) < 2 and model.blocks.reads != 2:  # then nothing is expected
                    time.sleep(0.001)
        assert max(weights.blocks_at_each_read) == most
        del model
        assert weights.held() == []


def test_a_block_that_does_not_fit_beside_another_is_read_when_that_one_is_gone(run_of):
    run, free = run_of("vit"), []
    merged = MergedDirectory(run.merged)

    def load(block):
        if block == 1 and not free:
            free.append(True)
            raise torch.OutOfMemoryError("no room for two")
        return merged.block(block)

    blocks = ResidentBlocks(run.plan, load, CPU)
    assert [list(blocks[number].layers) for number in (0, 1, 0)] == [["0", "1", "2"], ["3", "4"], ["0", "1", "2"]]
    assert "ahead" not in blocks.told() and blocks.reads == 3


def test_an_order_of_its_own_is_learned(run_of):
    run, loads = run_of("vit"), []

    def load(block):
        loads.append(block)
        return MergedDirectory(run.merged).block(block)

    blocks = ResidentBlocks(run.plan, load, CPU)
    for number in (1, 0, 1, 0):
        blocks[number]
    del blocks  # waits for what was read ahead
    # behind 1 nothing was expected, and behind 0 first 1 by number; then 0 behind 1, since it was so before
    assert loads == [1, 0, 1, 0, 1]
    with pytest.raises(IndexError):
        ResidentBlocks(run.plan, load, CPU)[2]


def test_what_is_kept_follows_from_sizes_and_free_memory(run_of, monkeypatch):
    run = run_of("vit")
    merged = MergedDirectory(run.merged)
    sizes = [merged.size(0), merged.size(1)]
    assert sizes == [os.path.getsize(run.merged.path / row.file) for row in merged.blocks]
    for free, wanted in ((2 * sum(sizes), "all"), (1.2 * sum(sizes), "alone"), (2.6 * max(sizes), "all")):
        monkeypatch.setattr(residency, "_free", lambda device, free=free: free)
        assert choose("auto", run.plan, merged, CPU) == wanted
        assert choose("all", run.plan, merged, CPU) == "all"
        assert choose("one", run.plan, merged, CPU) == ("ahead" if 0.8 * free >= 2 * max(sizes) else "alone")
    joint = run_of("joint")
    assert choose("one", joint.plan, MergedDirectory(joint.merged), CPU) == "all"  # one model does all


def test_the_memory_of_a_block_goes_back_to_the_system():
    def resident():
        return psutil.Process().memory_info().rss

    def read():
        tensors = [to.room([1 << 18], torch.float32) for _ in range(100)]
        for tensor in tensors:
            to.fill(tensor, lambda into: into.__setitem__(slice(None), bytes([1]) * len(into)), lambda: None)
        return tensors

    to, before = transfer.OnHost(), resident()
    held = Beside(read).result()
    assert resident() - before > 90 << 20 and all(int(t.view(torch.uint8).min()) == 1 for t in held)
    del held
    # malloc would keep most of it: pieces of 1 MiB are its own, and were used on a thread that is gone
    assert resident() - before < 20 << 20


class Event:
    """In place of CUDA's: a copy is under way until it is waited for."""

    all = []

    def __init__(self):
        self.under_way = False
        Event.all.append(self)

    def record(self, stream):
        self.under_way = True

    def synchronize(self):
        self.under_way = False


def test_a_file_goes_to_a_gpu_in_pieces_and_no_buffer_is_filled_while_it_is_copied(run_of, monkeypatch):
    # without a GPU: the copies are made at once, and what would wait for them is seen
    monkeypatch.setattr(Event, "all", [])
    monkeypatch.setattr(transfer, "PIECE", 1000)
    monkeypatch.setattr(transfer, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    merged = MergedDirectory(run_of("ar_lm").merged)
    found, wanted = merged.block(1, to=transfer.ToGpu(CPU)), merged.block(1)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)

    calls, to = [], transfer.ToGpu(CPU)

    def take(into):
        assert sum(event.under_way for event in Event.all[2:]) < 2 and calls[-1] == "settled"
        calls.append(len(into))
        into[:] = bytes([len(calls)]) * len(into)

    tensor = to.room([3, 350], torch.bfloat16)
    to.fill(tensor, take, lambda: calls.append("settled"))
    assert calls == ["settled", 1000, "settled", 1000, "settled", 100]
    filled = tensor.reshape(-1).view(torch.uint8)
    assert filled.tolist() == [2] * 1000 + [4] * 1000 + [6] * 100


def test_a_file_that_changes_between_two_reads_is_refused(run_of):
    run = run_of("vit")
    model = read_merged_model(MergedDirectory(run.merged), CPU, "alone")
    name = MergedDirectory(run.merged).blocks[0].file
    assert model.blocks[0] and model.blocks[1]
    good = run.merged.read(name)
    try:
        run.merged.write(name, good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ShardError, match="flipped bit"):
            model.blocks[0]
    finally:
        run.merged.write(name, good)
    assert model.blocks[0]
