import json
import os
import threading
import time
from dataclasses import replace

import pytest

from dbtrain.errors import FencedError, RunLockedError, ShardError
from dbtrain.shards.checksummed_json import seal, unseal
from dbtrain.shards.storage.fence import check, claim
from dbtrain.shards.storage.lock import LOCK, RunLock, is_held
from dbtrain.shards.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "run") if request.param == "local" else Store(f"memory://{tmp_path.name}/run")


def plant(store, **changes):
    """A lock left by somebody else."""
    with RunLock(store, "gone"):
        fields = unseal(store.read(LOCK), 1, "w")
    store.write(LOCK, seal({**fields, "token": "other", **changes}, 1, "w"))


def test_one_at_a_time(store):
    with RunLock(store, "first"):
        with pytest.raises(RunLockedError, match=r"'first' on host .*pid \d+, since 20") as caught:
            RunLock(store, "second").acquire()
        assert "\n" not in str(caught.value) and "wait for it or stop it" in str(caught.value)
    with RunLock(store, "second"):
        assert json.loads(store.read(LOCK))["owner"] == "second"
    assert not store.exists(LOCK)


def test_acquire_twice_and_release_twice(store):
    lock = RunLock(store, "a")
    lock.release()
    with pytest.raises(RunLockedError, match="not held"):
        lock.check()
    lock.acquire()
    lock.check()
    with pytest.raises(RunLockedError, match="already"):
        lock.acquire()
    lock.release()
    lock.release()
    lock.acquire()
    lock.release()


def test_whether_somebody_works_on_a_run_is_told_without_taking_it(store):
    assert not is_held(store)
    with RunLock(store, "a"):
        assert is_held(store)
    plant(store, pid=dead_pid(), beat=time.time())
    assert not is_held(store)
    plant(store, pid=dead_pid(), beat=time.time(), machine="elsewhere")
    assert is_held(store)
    store.remove(LOCK)
    plant(store, beat=time.time() - 31, machine="elsewhere", ttl=30.0)
    assert not is_held(store)
    store.write(LOCK, b"torn")
    with pytest.raises(ShardError, match="delete it"):
        is_held(store)


def test_heartbeat_keeps_it(store):
    with RunLock(store, "a", ttl_s=0.3) as lock:
        before = store.read(LOCK)
        time.sleep(0.8)
        assert store.read(LOCK) != before
        with pytest.raises(RunLockedError, match="used by 'a'"):
            RunLock(store, "b", ttl_s=0.3).acquire()
        lock.check()


def dead_pid():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_dead_process_on_this_host_is_taken_over_at_once(store):
    plant(store, pid=dead_pid(), beat=time.time())
    with RunLock(store, "b") as lock:
        lock.check()


def test_a_process_number_of_another_machine_means_nothing(store):
    plant(store, pid=dead_pid(), beat=time.time(), machine="elsewhere")
    with pytest.raises(RunLockedError):
        RunLock(store, "b").acquire()


def test_when_the_run_is_free_is_what_is_true_of_this_owner(store):
    with RunLock(store, "a"), pytest.raises(RunLockedError) as here:
        RunLock(store, "b").acquire()
    assert "free as soon as that process ends" in str(here.value) and " s " not in str(here.value)
    plant(store, beat=time.time(), machine="elsewhere", ttl=30.0)
    with pytest.raises(RunLockedError) as elsewhere:
        RunLock(store, "b").acquire()
    assert "free only 30 s after its last heartbeat" in str(elsewhere.value)
    assert "watches for 15 s more" in str(elsewhere.value)


@pytest.mark.parametrize("age", [100, -100])
def test_stale_elsewhere_is_taken_over_whatever_its_clock(store, age):
    plant(store, beat=time.time() - age, machine="elsewhere", ttl=0.2)
    with RunLock(store, "b"):
        pass


def test_a_machine_that_slept_keeps_the_run(store):
    with RunLock(store, "a", ttl_s=0.6) as lock:
        lock._mine = replace(lock._mine, beat=time.time() - 100)
        store.write(LOCK, lock._mine.dump(LOCK))
        beats = threading.Thread(target=lambda: (time.sleep(0.1), lock._beat()))
        beats.start()
        with pytest.raises(RunLockedError):
            RunLock(store, "b", ttl_s=0.6).acquire()
        beats.join()
        lock.check()


def test_where_locks_cannot_be_renewed_nothing_starts_and_nothing_stays(store, monkeypatch):
    def refuse(name, old, new):
        raise ShardError("cannot replace LOCK.json (Function not implemented)")

    monkeypatch.setattr(store, "swap", refuse)
    with pytest.raises(ShardError, match="not implemented"):
        RunLock(store, "a").acquire()
    assert not store.exists(LOCK)


def test_a_clock_that_is_behind_does_not_lose_a_live_lock(store):
    plant(store, beat=time.time() - 100, machine="elsewhere", ttl=0.6)
    stop = threading.Event()

    def beats():
        while not stop.wait(0.1):
            fields = unseal(store.read(LOCK), 1, "w")
            store.write(LOCK, seal({**fields, "beat": fields["beat"] + 0.1}, 1, "w"))

    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with pytest.raises(RunLockedError):
            RunLock(store, "b").acquire()
    finally:
        stop.set()
        thread.join()


def test_of_many_takers_of_a_stale_lock_one_wins(tmp_path):
    store, wins, refused = Store(tmp_path), [], []
    plant(store, pid=dead_pid(), beat=time.time())
    gate = threading.Barrier(8)

    def take(number):
        lock = RunLock(store, str(number))
        gate.wait()
        try:
            lock.acquire()
            wins.append(lock)
        except RunLockedError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(wins) == 1 and len(refused) == 7
    wins[0].release()


def test_a_lock_that_was_taken_over_is_noticed_and_not_released(store):
    lock = RunLock(store, "slow", ttl_s=0.15)
    lock.acquire()
    plant_fields = unseal(store.read(LOCK), 1, "w")
    store.write(LOCK, seal({**plant_fields, "token": "thief", "owner": "thief"}, 1, "w"))
    deadline = time.time() + 3
    while time.time() < deadline:
        try:
            lock.check()
        except RunLockedError as err:
            assert "taken over" in str(err)
            break
        time.sleep(0.02)
    else:
        pytest.fail("not noticed")
    lock.release()
    assert json.loads(store.read(LOCK))["owner"] == "thief"


def lose_replies(monkeypatch, count):
    """The next swaps take effect, and the caller hears of an outage."""
    swap, lost = Store.swap, iter(range(count))

    def cut(self, name, old, new):
        done = swap(self, name, old, new)
        if next(lost, None) is not None:
            raise ShardError("the storage does not answer")
        return done

    monkeypatch.setattr(Store, "swap", cut)


def test_a_heartbeat_that_landed_unheard_is_no_takeover(store, monkeypatch):
    with RunLock(store, "a", ttl_s=0.15) as lock:
        lose_replies(monkeypatch, 2)
        heard = store.read(LOCK)
        for _ in range(4):  # each is another heartbeat
            before, deadline = store.read(LOCK), time.time() + 3
            while store.read(LOCK) == before and time.time() < deadline:
                time.sleep(0.01)
        assert store.read(LOCK) != heard
        lock.check()
    assert not store.exists(LOCK)


def test_a_lock_whose_last_heartbeat_landed_unheard_is_released(store, monkeypatch):
    lock = RunLock(store, "a", ttl_s=0.15)
    lock.acquire()
    lose_replies(monkeypatch, 1)
    before, deadline = store.read(LOCK), time.time() + 3
    while store.read(LOCK) == before and time.time() < deadline:
        time.sleep(0.001)
    lock.release()
    assert not store.exists(LOCK)


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_lock_that_somebody_spoilt_or_removed_is_lost(store, content):
    lock = RunLock(store, "a", ttl_s=0.15)
    lock.acquire()
    store.write(LOCK, content) if content else store.remove(LOCK)
    deadline = time.time() + 3
    with pytest.raises(RunLockedError, match="taken over"):
        while time.time() < deadline:
            lock.check()
            time.sleep(0.02)
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"owner": 1}'])
def test_damaged_lock(store, content):
    store.write(LOCK, content)
    with pytest.raises(ShardError, match="once no coordinator works") as caught:
        RunLock(store, "b").acquire()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"ttl": -1}, {"ttl": 1e30}, {"since": 1e30}, {"ttl": 10**400}, {"pid": 0}])
def test_absurd_but_sealed_lock(store, changes):
    plant(store, **changes)
    with pytest.raises(ShardError):
        RunLock(store, "b").acquire()


def test_ttl_must_be_positive(store):
    for ttl in (0, -1, float("nan")):
        with pytest.raises(ShardError, match="ttl_s"):
            RunLock(store, "a", ttl_s=ttl)


def test_claim_and_check(store):
    with pytest.raises(FencedError, match="nobody owns"):
        check(store, "t1")
    claim(store, 1, "t1")
    claim(store, 1, "t1")
    check(store, "t1")
    claim(store, 2, "t2")
    check(store, "t2")
    with pytest.raises(FencedError, match="owned by attempt 2"):
        check(store, "t1")
    for attempt in (1, 2):
        with pytest.raises(FencedError, match="attempt 2 .*owns it"):
            claim(store, attempt, "t1")
    check(store, "t2")
    for attempt, token in ((-1, "t"), (3, "")):
        with pytest.raises(ShardError, match="attempt="):
            claim(store, attempt, token)
    store.write("OWNER.json", b"{}")
    for call in (lambda: check(store, "t2"), lambda: claim(store, 9, "t9")):
        with pytest.raises(ShardError, match="OWNER.json is damaged"):
            call()


def test_of_many_claims_the_highest_wins(tmp_path):
    for _ in range(5):
        store = Store(tmp_path / str(time.time_ns()))
        gate = threading.Barrier(6)

        def run(attempt, store=store, gate=gate):
            gate.wait()
            try:
                claim(store, attempt, f"t{attempt}")
            except FencedError:
                return

        threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        check(store, "t5")


def test_a_slow_claim_does_not_undo_a_newer_one(store, monkeypatch):
    claim(store, 1, "t1")
    real = Store.read

    def slow_read(self, name):
        seen = real(self, name)
        monkeypatch.setattr(Store, "read", real)
        claim(store, 3, "t3")  # comes between the reading and the writing of attempt 2
        return seen

    monkeypatch.setattr(Store, "read", slow_read)
    with pytest.raises(FencedError, match="attempt 3"):
        claim(store, 2, "t2")
    check(store, "t3")


def test_a_cut_off_attempt_cannot_commit(store, make):
    from dbtrain.shards.checkpoint import Checkpoints

    old, new = Checkpoints(store, make.identity()), Checkpoints(store, make.identity())
    claim(store, 1, "old")
    make.commit(old, 10, make.parts(1), fence=lambda: check(store, "old"))
    claim(store, 2, "new")
    with pytest.raises(FencedError, match="attempt 2"):
        make.commit(old, 20, make.parts(9), fence=lambda: check(store, "old"))
    make.commit(new, 20, make.parts(2), fence=lambda: check(store, "new"))
    assert make.same(new.newest().parts, make.parts(2))
