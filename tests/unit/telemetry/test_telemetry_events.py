import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dbtrain.coordinator.progress import Progress
from dbtrain.errors import ShardError
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry import events
from dbtrain.telemetry.events import EVENTS, EventLog, EventTail, last_words, read_events


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "attempts" / "1")


def test_events_are_json_lines_that_come_back_in_order(store):
    log = EventLog(store, clock=iter([10.0, 11.23456]).__next__)
    log.emit("start", rank=0, host="größe\n")
    log.emit("step", step=1, loss=0.5)
    lines = store.read_text(EVENTS).splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "step"]
    assert read_events(store) == [
        {"t": 10.0, "event": "start", "rank": 0, "host": "größe\n"},
        {"t": 11.235, "event": "step", "step": 1, "loss": 0.5},
    ]


def test_a_tail_gives_every_event_once_as_they_come(store):
    log, tail = EventLog(store), EventTail(store)
    assert tail.read() == []
    log.emit("start")
    assert [event["event"] for event in tail.read()] == ["start"]
    assert tail.read() == []
    log.emit("step", step=1)
    log.emit("step", step=2)
    assert [event["step"] for event in tail.read()] == [1, 2]


def test_a_tail_reads_only_what_has_grown(store, monkeypatch):
    log, tail, reads, reading = EventLog(store), EventTail(store), [], Store.reading
    monkeypatch.setattr(
        Store, "reading", lambda of, name, start: reads.append((name, start)) or reading(of, name, start)
    )
    log.emit("start")
    assert [len(tail.read()) for _ in range(3)] == [1, 0, 0] and reads == [(EVENTS, 0)]
    size = store.size(EVENTS)
    log.emit("end")
    assert [len(tail.read()) for _ in range(3)] == [1, 0, 0] and reads[1:] == [(EVENTS, size)]


@pytest.mark.parametrize("writer", [0, 3, "coordinator"])
def test_in_an_object_store_a_log_goes_on_in_pieces_so_that_little_is_written_again(tmp_path, monkeypatch, writer):
    store, written = Store(f"memory://{tmp_path.name}/{writer}"), []
    write = store._files.write
    monkeypatch.setattr(store._files, "write", lambda name, data: written.append(len(data)) or write(name, data))
    monkeypatch.setattr(events, "PIECE", 1000)
    tail, seen = EventTail(store, writer), []
    for step in range(200):
        # a log that is opened anew, as by a coordinator that was started again, goes on where the last one ended
        if step % 30 == 0:
            log = EventLog(store, writer)
        log.tell("step", step=step)
        if step % 7 == 0:
            seen += tail.read()
    seen += tail.read() + tail.read()
    assert [event["step"] for event in seen] == list(range(200))
    assert [event["step"] for event in EventTail(store, writer).read()] == list(range(200))
    lengths = [store.size(name) for name in store.list()]
    assert len(lengths) > 5 and max(lengths) < 1100 and max(written) < 1100


def test_a_log_that_was_written_as_one_object_is_read_and_a_copy_on_a_disk_too(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "PIECE", 100)
    remote, local = Store(f"memory://{tmp_path.name}/old"), Store(tmp_path / "copied")
    lines = [json.dumps({"t": 1, "event": "step", "step": step}).encode() + b"\n" for step in range(50)]
    remote.write(EVENTS, b"".join(lines))
    local.write(EVENTS, b"".join(lines[:30]))
    local.write(f"{EVENTS}.1", b"".join(lines[30:]))
    for store in (remote, local):
        assert [event["step"] for event in read_events(store)] == list(range(50))


def test_on_a_disk_a_log_is_one_file(store, monkeypatch):
    monkeypatch.setattr(events, "PIECE", 100)
    log = EventLog(store)
    for step in range(20):
        log.tell("step", step=step)
    assert store.list() == [EVENTS] and len(read_events(store)) == 20


def test_events_of_two_threads_do_not_overwrite_each_other(tmp_path, monkeypatch):
    """On an object store to add is to read, to add and to write."""
    store = Store(f"memory://{tmp_path.name}/attempts/1")
    log, read = EventLog(store), type(store._files).read

    def slow(files, name):
        content = read(files, name)
        time.sleep(0.01)
        return content

    log.emit("start")
    monkeypatch.setattr(type(store._files), "read", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: log.emit("step", step=step), range(12)))
    assert sorted(event["step"] for event in read_events(store)[1:]) == list(range(12))


def test_every_rank_has_a_file_of_its_own(store):
    EventLog(store).emit("start")
    EventLog(store, 2).emit("end", outcome="failed")
    assert [event["event"] for event in read_events(store)] == ["start"]
    assert [event["event"] for event in last_words(store, 3)] == ["end"] and last_words(store, 2) == []


def test_a_torn_last_line_waits_until_it_is_whole(store):
    log, tail = EventLog(store), EventTail(store)
    log.emit("start")
    store.append(EVENTS, b'{"t": 1, "event": "st')
    assert [event["event"] for event in tail.read()] == ["start"]
    assert tail.read() == []
    store.append(EVENTS, b'ep", "step": 7}\n')
    assert [event["step"] for event in tail.read()] == [7]


@pytest.mark.parametrize("line", [b"\0\0\0\0", b"[1, 2]", b'{"t": 1}', b'{"event": "x"}', b"", b"\xff\xfe"])
def test_a_line_that_is_no_event_is_passed_over(store, line):
    log = EventLog(store)
    log.emit("start")
    store.append(EVENTS, line + b"\n")
    log.emit("end")
    assert [event["event"] for event in read_events(store)] == ["start", "end"]


def test_progress_is_that_of_the_newest_attempt_and_time_adds_up():
    progress = Progress()
    step = {"event": "step", "seconds": 2.0, "steps": 10, "memory": 5}
    for event in (
        {"event": "start"},
        {"event": "ready", "step": 0},
        {**step, "step": 10, "loss": 2.0},
        {"event": "skipped", "reason": "damaged"},
        {"event": "resumed", "step": 5, "loss": 2.5},
    ):
        progress.take(event)
    assert (progress.step, progress.loss, progress.rate, progress.seconds) == (5, 2.5, 5.0, 2.0)
    progress.take({**step, "step": 15, "loss": 1.5, "seconds": 0.0})
    assert (progress.step, progress.loss, progress.rate, progress.memory) == (15, 1.5, None, 5)
    assert progress.end is None
    progress.take({"event": "end", "outcome": "done"})
    assert progress.end["outcome"] == "done"


@pytest.fixture
def outage(store, monkeypatch):
    """Put the store away, or bring it back; a full disk takes a part of what is written."""
    append = store.append

    def refuse(name, data):
        append(name, data[:10])
        raise ShardError("the disk is full")

    return lambda away: monkeypatch.setattr(store, "append", refuse if away else append)


def test_what_is_told_while_the_storage_is_away_comes_before_what_follows(store, outage):
    log = EventLog(store)
    log.tell("start")
    outage(True)
    for step in (1, 2):
        log.tell("step", step=step)
    assert [event["event"] for event in read_events(store)] == ["start"]
    outage(False)
    log.emit("end")
    log.tell("late")
    assert [event.get("step", event["event"]) for event in read_events(store)] == ["start", 1, 2, "end", "late"]


def test_an_end_that_cannot_be_written_is_an_error_and_is_not_told_later(store, outage):
    log = EventLog(store)
    outage(True)
    with pytest.raises(ShardError, match="disk is full"):
        log.emit("end", outcome="done")
    outage(False)
    log.emit("end", outcome="failed")
    assert [event["outcome"] for event in read_events(store)] == ["failed"]


def test_an_outage_without_an_end_holds_a_bounded_number_of_lines(store, outage, monkeypatch):
    monkeypatch.setattr(events, "HELD", 3)
    log = EventLog(store)
    outage(True)
    for step in range(10):
        log.tell("step", step=step)
    outage(False)
    log.tell("step", step=10)
    assert [event["step"] for event in read_events(store)] == [7, 8, 9, 10]
