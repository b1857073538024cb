import hashlib
import os
import pickle
from dataclasses import replace

import pytest
import torch

from dbtrain.errors import FencedError, ShardError
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.commit import FileRecord, dump_commit, step_name, step_number
from dbtrain.shards.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "02") if request.param == "local" else Store(f"memory://{tmp_path.name}/02")


def flip(store, name, place=-9):
    data = bytearray(store.read(name))
    data[place] ^= 1
    store.write(name, bytes(data))


def test_commit_and_newest(store, make):
    checkpoints = Checkpoints(store, make.identity())
    assert checkpoints.newest() is None and checkpoints.steps() == [] and checkpoints.newest_step() is None
    what = make.parts(1)
    done = make.commit(checkpoints, 100, what, loss=0.25, attempt=3)
    assert (done.step, done.loss, done.attempt) == (100, 0.25, 3)
    assert set(done.files) == {"model.safetensors", "ema.safetensors", "optim.safetensors"}
    assert store.child("step_00000100").list() == ["COMMIT.json", *sorted(done.files)]
    found = checkpoints.newest()
    assert found.step == 100 and found.commit == done and make.same(found.parts, what)
    assert checkpoints.verify(100) == [] and checkpoints.newest_step() == 100
    assert list(checkpoints.load(100).parts) == ["model"]
    assert make.same(checkpoints.load(100, roles=None).parts, what)
    assert list(checkpoints.newest(roles=("ema",)).parts) == ["ema"]


def test_a_digest_stands_for_the_tensors_and_for_nothing_else(make):
    steps = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1)]  # seed, step, attempt
    digests = []
    for place, (seed, step, attempt) in enumerate(steps):
        checkpoints = Checkpoints(Store(f"memory://digest-{place}"), make.identity())
        digests.append(make.commit(checkpoints, step, make.parts(seed), attempt=attempt).digest())
    assert digests[0] == digests[1] and len(set(digests)) == 3 and {len(digest) for digest in digests} == {32}


def test_step_names():
    assert step_number("step_00000100") == 100 and step_number(step_name(10**9)) == 10**9
    assert [step_number(n) for n in ("step_1", "step_000000001", "step_0000000a", "x")] == [None] * 4


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(store, make, keep):
    checkpoints = Checkpoints(store, make.identity(), keep=keep)
    for step in range(10, 60, 10):
        make.commit(checkpoints, step, make.parts(step))
    assert checkpoints.steps() == [10, 20, 30, 40, 50][-keep:]
    assert store.list() == [step_name(step) for step in checkpoints.steps()]
    with pytest.raises(ShardError, match="keep=0"):
        Checkpoints(store, make.identity(), keep=0)


def test_a_damaged_checkpoint_does_not_count_as_kept(store, make):
    checkpoints = Checkpoints(store, make.identity(), keep=2)
    for step in (10, 20):
        make.commit(checkpoints, step, make.parts(step))
    flip(store, "step_00000020/model.safetensors")
    told = []
    assert checkpoints.newest(told.append).step == 10 and len(told) == 1
    assert "skipped checkpoint 20 of block 1" in told[0] and "flipped bit" in told[0]
    make.commit(checkpoints, 30, make.parts(30))
    assert 10 in checkpoints.steps() and 30 in checkpoints.steps()
    flip(store, "step_00000030/model.safetensors")
    assert checkpoints.newest(told.append).step == 10


def test_a_commit_below_a_damaged_newer_one_survives_its_own_cleaning(store, make):
    checkpoints = Checkpoints(store, make.identity(), keep=1)
    make.commit(checkpoints, 30, make.parts(30))
    flip(store, "step_00000030/ema.safetensors")
    make.commit(checkpoints, 20, make.parts(20))
    assert checkpoints.newest(lambda line: None).step == 20


def test_uncommitted_leftovers_go_when_they_are_older(store, make):
    checkpoints = Checkpoints(store, make.identity())
    for name in ("step_00000005/model.safetensors", "step_00000099/model.safetensors", "attempts/1/log.txt"):
        store.write(name, b"torn")
    make.commit(checkpoints, 50, make.parts())
    assert store.list() == ["attempts", "step_00000050", "step_00000099"] and checkpoints.steps() == [50]


def test_equal_content_again_changes_nothing(store, make):
    checkpoints = Checkpoints(store, make.identity())
    first = make.commit(checkpoints, 10, make.parts(1), attempt=1)
    before = {n: store.child("step_00000010").read(n) for n in store.child("step_00000010").list()}
    assert make.commit(checkpoints, 10, make.parts(1), attempt=2, loss=9.0) == first
    assert before == {n: store.child("step_00000010").read(n) for n in store.child("step_00000010").list()}


def test_other_content_replaces_it_and_overwrites_no_file(store, make):
    checkpoints = Checkpoints(store, make.identity())
    make.commit(checkpoints, 10, make.parts(1))
    second = make.commit(checkpoints, 10, make.parts(2), attempt=2)
    found = checkpoints.newest()
    assert make.same(found.parts, make.parts(2)) and found.commit == second and second.attempt == 2
    assert store.child("step_00000010").list() == sorted(["COMMIT.json", *second.files])
    assert not set(second.files) & {"model.safetensors", "ema.safetensors", "optim.safetensors"}


def test_recommit_mends_a_damaged_checkpoint(store, make):
    checkpoints = Checkpoints(store, make.identity())
    make.commit(checkpoints, 10, make.parts(1))
    flip(store, "step_00000010/optim.safetensors")
    assert checkpoints.newest(lambda line: None) is None
    make.commit(checkpoints, 10, make.parts(1))
    assert make.same(checkpoints.newest().parts, make.parts(1))


def test_a_rival_that_still_writes_cannot_spoil_a_commit(store, make):
    """A cut-off attempt writes its shards between ours and our COMMIT.json, and again afterwards."""
    ours, rival = (Checkpoints(store, make.identity()) for _ in range(2))
    calls = []

    def fence():
        calls.append(1)
        if len(calls) == 2:
            with pytest.raises(FencedError):
                rival.commit(10, make.parts(9), loss=None, attempt=1, fence=refuse_second())

    make.commit(ours, 10, make.parts(1), fence=fence, attempt=2)
    assert make.same(ours.newest().parts, make.parts(1))
    with pytest.raises(FencedError):
        rival.commit(10, make.parts(9), loss=None, attempt=1, fence=refuse_second())
    assert make.same(ours.newest().parts, make.parts(1)) and ours.verify(10) == []


def refuse_second():
    calls = []

    def fence():
        calls.append(1)
        if len(calls) == 2:
            raise FencedError("fenced")

    return fence


def test_fence_is_asked_before_writing_and_before_the_commit(store, make):
    checkpoints = Checkpoints(store, make.identity())
    seen = []

    def fence():
        seen.append(store.child("step_00000010").list())

    make.commit(checkpoints, 10, make.parts(), fence=fence)
    assert seen == [[], ["ema.safetensors", "model.safetensors", "optim.safetensors"]]
    with pytest.raises(FencedError):
        make.commit(checkpoints, 20, make.parts(), fence=refuse_second())
    assert checkpoints.steps() == [10]


@pytest.mark.parametrize("field", ["run", "architecture_hash", "codebook_hash"])
def test_another_runs_checkpoint_is_an_error_not_a_skip(store, make, field):
    make.commit(Checkpoints(store, make.identity(**{field: "e" * 64})), 10, make.parts())
    with pytest.raises(ShardError, match=field) as caught:
        Checkpoints(store, make.identity()).newest(lambda line: pytest.fail(line))
    assert "belongs elsewhere" in str(caught.value)


def test_a_flipped_bit_in_every_file_is_found(store, make):
    checkpoints = Checkpoints(store, make.identity())
    make.commit(checkpoints, 10, make.parts(1))
    make.commit(checkpoints, 20, make.parts(2))
    folder = store.child("step_00000020")
    for name in folder.list():
        good = folder.read(name)
        for place in range(0, len(good), max(1, len(good) // 40)):
            bad = bytearray(good)
            bad[place] ^= 1 << (place % 7)
            folder.write(name, bytes(bad))
            told = []
            found = checkpoints.newest(told.append)
            if found.step == 20:  # a blank of the JSON text may change, nothing else
                assert name == "COMMIT.json" and make.same(found.parts, make.parts(2))
                assert chr(good[place]) in " \n"
            else:
                assert found.step == 10 and make.same(found.parts, make.parts(1))
                assert len(told) == 1 and "\n" not in told[0] and checkpoints.verify(20)
                with pytest.raises(ShardError):
                    checkpoints.load(20, ("model", "ema", "optim"))
        folder.write(name, good)
    assert checkpoints.newest().step == 20


def test_torn_and_missing_files(store, make):
    checkpoints = Checkpoints(store, make.identity())
    make.commit(checkpoints, 10, make.parts(1))
    make.commit(checkpoints, 20, make.parts(2))
    folder = store.child("step_00000020")
    data = folder.read("model.safetensors")
    folder.write("model.safetensors", data[:-5])
    assert checkpoints.newest(lambda line: None).step == 10 and "bytes" in checkpoints.verify(20)[0]
    assert checkpoints.newest_step() == 10
    folder.remove("model.safetensors")
    assert checkpoints.newest(lambda line: None).step == 10 and "does not exist" in checkpoints.verify(20)[0]
    folder.write("model.safetensors", data)
    folder.write("COMMIT.json", store.read("step_00000010/COMMIT.json"))
    assert checkpoints.newest(lambda line: None).step == 10 and "of step 10" in checkpoints.verify(20)[0]
    assert checkpoints.newest_step() == 10
    assert checkpoints.verify(99)


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_planted_pickle_is_refused_and_never_run(tmp_path, make):
    """Also with a COMMIT.json that vouches for it: who can write there can seal it anew."""
    folder, fired = Store(tmp_path), tmp_path / "fired"
    checkpoints = Checkpoints(folder, make.identity())
    done = make.commit(checkpoints, 10, make.parts(1))
    torch.save({"blocks.1.stem.w": Bomb(fired)}, tmp_path / "zip")
    for planted in (pickle.dumps(Bomb(fired)), (tmp_path / "zip").read_bytes()):
        record = FileRecord(size=len(planted), sha256=hashlib.sha256(planted).hexdigest())
        files = {**done.files, "model.safetensors": record}
        folder.write("step_00000010/model.safetensors", planted)
        folder.write("step_00000010/COMMIT.json", dump_commit(replace(done, files=files), "COMMIT.json"))
        skipped = []
        assert checkpoints.newest(skipped.append) is None
        assert "pickle" in skipped[0] and "pickle" in checkpoints.verify(10)[0]
        assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired))).close()
    assert fired.exists()  # it would have


def test_storage_out_of_reach_is_not_an_absence(tmp_path, make, monkeypatch):
    checkpoints = Checkpoints(Store(tmp_path), make.identity())
    make.commit(checkpoints, 10, make.parts(1))

    def refuse(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ShardError, match="does not answer"):
        checkpoints.newest(lambda line: pytest.fail(line))
    with pytest.raises(ShardError, match="does not answer"):
        checkpoints.verify(10)


@pytest.mark.parametrize("failing", ["write", "fsync", "link", "replace"])
def test_disk_full_at_every_operation_keeps_the_old_checkpoint(tmp_path, make, monkeypatch, failing):
    real, old, new = getattr(os, failing), make.parts(1), make.parts(2)
    failures = 0
    for nth in range(100):
        checkpoints = Checkpoints(Store(tmp_path / str(nth)), make.identity())
        make.commit(checkpoints, 10, old)
        count = iter(range(10**6))

        def full(*args, at=nth, count=count):
            if next(count) == at:
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, failing, full)
        try:
            make.commit(checkpoints, 20, new)
        except ShardError as err:
            failures += 1
            assert "disk is full" in str(err) and "\n" not in str(err)
            assert str(tmp_path) in str(err)
        finally:
            monkeypatch.setattr(os, failing, real)
        found = checkpoints.newest()
        assert make.same(found.parts, new if found.step == 20 else old)
        left = [n for _, _, names in os.walk(tmp_path / str(nth)) for n in names if n.endswith(".tmp")]
        assert left == []
        if next(count) <= nth:
            break
    assert failures >= {"replace": 1}.get(failing, 3)


def test_cleaning_that_fails_does_not_fail_the_commit(tmp_path, make, monkeypatch):
    checkpoints = Checkpoints(Store(tmp_path), make.identity(), keep=1)
    make.commit(checkpoints, 10, make.parts(1))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "no")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        make.commit(checkpoints, 20, make.parts(2))
    assert checkpoints.newest().step == 20
    make.commit(checkpoints, 30, make.parts(3))
    assert Store(tmp_path).list() == ["step_00000030"]


def test_parts_that_do_not_fit(store, make):
    checkpoints = Checkpoints(store, make.identity())
    good = make.parts()
    extra = {**good["optim"], "exp_avg/layers.2.other": torch.zeros(1)}
    short = dict(list(good["ema"].items())[1:])
    for bad, match in (
        ({}, "model"),
        ({"ema": good["ema"]}, "model"),
        ({**good, "x": {}}, "only"),
        ({**good, "ema": short}, "differ"),
        ({**good, "optim": extra}, "no model parameter"),
        ({"model": {"layers.9.w": torch.zeros(1)}}, "not of block 1"),
    ):
        with pytest.raises(ShardError, match=match):
            make.commit(checkpoints, 10, bad)
    for changes in ({"loss": float("nan")}, {"loss": float("inf")}, {"attempt": -1}):
        with pytest.raises(ShardError, match="cannot commit"):
            make.commit(checkpoints, 10, good, **changes)
    assert checkpoints.newest() is None
    make.commit(checkpoints, 10, {"model": good["model"]}, loss=None)
    assert checkpoints.newest().commit.loss is None
    with pytest.raises(ShardError, match="no 'ema' part"):
        checkpoints.load(10, ("ema",))
