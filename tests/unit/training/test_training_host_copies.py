"""Snapshots into memory that is kept: everything but the CUDA calls, which a copier of this file stands in for."""

import pytest
import torch

from dbtrain.training.host_copies import FromHost, HostCopies

SHAPES = {"model": {"w": (3, 5), "b": (7,), "s": ()}, "optim": {"exp_avg/w": (3, 5), "none": (0, 2)}}


def sources(value):
    return {part: {n: torch.full(shape, float(value)) for n, shape in named.items()} for part, named in SHAPES.items()}


def take(copies, tensors, passing=False):
    snapshot = copies.begin()
    for part, named in tensors.items():
        for name, tensor in named.items():
            copies.copy(snapshot, part, name, tensor, passing)
    copies.end(snapshot)
    return snapshot


def holds(snapshot, value):
    return all(
        tensor.shape == SHAPES[part][name] and bool((tensor == value).all())
        for part, named in snapshot.parts.items()
        for name, tensor in named.items()
    )


class Mark:
    def __init__(self, stream):
        self.stream, self.upto = stream, len(stream.queued)

    def synchronize(self):
        self.stream.run(self.upto)


class Stream:
    """Copies that happen only when somebody waits for them, as on a GPU that is slow."""

    def __init__(self, refusal=None):
        self.queued, self.done, self.log, self.refusal = [], 0, [], refusal

    def pin(self, memory):
        self.log.append(("pin", memory.numel()))
        return self.refusal

    def begin(self):
        self.log.append("begin")

    def copy(self, into, source):
        self.queued.append((into, source))

    def mark(self):
        return Mark(self)

    def hold_back(self, mark):
        self.log.append("hold back")
        self.run(mark.upto)

    def run(self, upto):
        for into, source in self.queued[self.done : upto]:
            into.copy_(source)
        self.done = max(self.done, upto)


def no_line(line):
    pytest.fail(line)


def test_a_snapshot_is_the_state_at_its_step_whatever_comes_after():
    copies, tensors = HostCopies(SHAPES, FromHost(), no_line), sources(1)
    snapshot = take(copies, tensors)
    for named in tensors.values():
        for tensor in named.values():
            tensor.fill_(2)
    copies.before_update()
    snapshot.wait()
    assert holds(snapshot, 1)


def test_an_update_comes_after_the_copies_and_the_gradients_before_it_do_not_wait():
    stream = Stream()
    copies, tensors = HostCopies(SHAPES, stream, no_line), sources(1)
    snapshot = take(copies, tensors)
    assert stream.done == 0  # the next step computes its gradients meanwhile
    copies.before_update()
    assert stream.done == 5
    for tensor in tensors["model"].values():
        tensor.fill_(2)
    copies.before_update()  # nothing is under way
    snapshot.wait()
    assert holds(snapshot, 1) and stream.log == [("pin", 38), "begin", "hold back"]


def test_memory_is_kept_and_there_is_as_much_as_snapshots_are_held():
    stream = Stream()
    copies, seen = HostCopies(SHAPES, stream, no_line), set()
    for value in range(6):
        snapshot = take(copies, sources(value))
        snapshot.wait()
        assert holds(snapshot, value)
        seen.add(snapshot.parts["model"]["w"].data_ptr())
        if value == 2:
            held = snapshot
        else:
            snapshot.release()
    assert len(seen) == 2 and holds(held, 2) and stream.log.count(("pin", 38)) == 2


def test_memory_that_is_given_back_is_not_written_by_what_is_still_under_way():
    stream = Stream()
    copies = HostCopies(SHAPES, stream, no_line)
    dropped = take(copies, sources(1))  # a newer commit comes before it was written
    dropped.release()
    newer = take(copies, sources(2))
    newer.wait()
    assert holds(newer, 2)


def test_what_was_gathered_for_a_copy_is_copied_before_the_next_one_is_gathered():
    stream = Stream()
    copies = HostCopies(SHAPES, stream, no_line)
    snapshot = copies.begin()
    for value, name in enumerate(SHAPES["model"]):
        copies.copy(snapshot, "model", name, torch.full(SHAPES["model"][name], float(value)), passing=True)
        assert stream.done == value + 1


def test_a_refusal_to_pin_is_told_in_one_line_and_the_snapshot_is_taken():
    told = []
    copies = HostCopies(SHAPES, Stream("cudaHostRegister: error 2"), told.append)
    for value in (1, 2):
        snapshot = take(copies, sources(value))
        snapshot.wait()
        assert holds(snapshot, value)
        snapshot.release()
    assert len(told) == 1 and "error 2" in told[0] and "ulimit -l" in told[0] and "\n" not in told[0]


def test_of_several_workers_those_after_the_first_hold_nothing():
    copies = HostCopies({"model": {}, "optim": {}}, Stream(), no_line)
    snapshot = copies.begin()
    copies.end(snapshot)
    snapshot.release()
    assert snapshot.parts == {"model": {}, "optim": {}}
