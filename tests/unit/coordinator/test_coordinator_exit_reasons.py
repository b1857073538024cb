"""What the end of an attempt is called, from what Ray 2.60 says of dead processes and lost nodes."""

import pytest

from dbtrain.coordinator.exit_reasons import KILLED, LOST_NODE, NODE_DIED, SHORT_OF_MEMORY, UNREACHED, classify
from dbtrain.coordinator.progress import Progress

DIED = (
    "ActorDiedError: The actor died unexpectedly before finishing this task. class_name: RayTrainWorker actor_id: "
    "c870c6d96c932a253368cb4701000000 pid: 20516 namespace: 689fc250-08c9-42d7-a3cf-aee68d6f8a74 ip: 127.0.0.1 "
)
SIGKILL = (
    f"{DIED}The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker "
    "crashed unexpectedly due to SIGSEGV or another unexpected error. If the process was killed by the kernel OOM "
    "killer (verifiable by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation."
)
LOW = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 177e40) was "
    "3.12GB used / 23.54GB limit (0.132395) OOM kill reason: Memory usage 3346477056B exceeded threshold"
)
NODE = (
    f"{DIED}The actor died because its node has died. Node Id: 1483a840 the actor's node was terminated unexpectedly: "
    "health check failed due to missing too many heartbeats"
)


@pytest.mark.parametrize("before", ["", "WorkerGroupStartupFailedError: the workers did not start: "])
def test_a_killed_process_is_a_crash_in_one_short_line(before):
    exit_ = classify(Progress(), before + SIGKILL, 30, 60, stopping=False)
    assert (exit_.kind, exit_.reason, exit_.step) == ("crashed", KILLED, 30)
    assert "SIGKILL" in KILLED and "no memory left" in KILLED and len(KILLED) < 120


@pytest.mark.parametrize("before", ["OutOfMemoryError: ", f"{DIED}Worker exit detail: "], ids=["task", "actor"])
def test_a_worker_that_ray_killed_for_memory_crashed_and_was_not_taken_back(before):
    """Both "node" and "died" may stand in what Ray says of it, and it would start again 100 times instead of 3."""
    exit_ = classify(Progress(), before + LOW, 30, 60, stopping=False)
    assert (exit_.kind, exit_.reason, exit_.step) == ("crashed", SHORT_OF_MEMORY, 30)
    assert "micro_batch" in SHORT_OF_MEMORY and len(SHORT_OF_MEMORY) < 200


def test_a_lost_node_is_a_preemption_in_one_short_line():
    exit_ = classify(Progress(), NODE, 30, 60, stopping=False)
    assert (exit_.kind, exit_.reason) == ("preempted", LOST_NODE)


def test_a_worker_that_does_not_answer_on_a_node_that_lives_has_crashed():
    """Ray 2.60's words for a frozen process; where its node is dead, the controller says so in their place."""
    told = (
        "ActorUnavailableError: The actor 84f7 is unavailable: The actor is temporarily unavailable: RpcError: RPC "
        "error: keepalive watchdog timeout rpc_code: 14. The task may or may not have been executed on the actor."
    )
    exit_ = classify(Progress(), told, 20, 60, stopping=False)
    assert (exit_.kind, exit_.reason) == ("crashed", UNREACHED)
    assert classify(Progress(), f"RuntimeError: {NODE_DIED}; before: {told}", 20, 60, False).kind == "preempted"


def test_what_is_not_known_is_repeated_but_not_without_end():
    exit_ = classify(Progress(), "RuntimeError: " + 100 * "CUDA error ", 0, 60, stopping=False)
    assert exit_.kind == "crashed" and exit_.reason.startswith("RuntimeError: CUDA error")
    assert len(exit_.reason) == 500


def test_a_worker_that_said_why_is_believed_before_the_cluster():
    progress = Progress(end={"outcome": "crashed", "error": "MemoryError: no room", "t": 1.0})
    assert classify(progress, SIGKILL, 0, 60, stopping=False).reason == "MemoryError: no room"


BROKEN = {"outcome": "crashed", "error": "RuntimeError: Connection closed by peer [10.0.0.2]:15772", "t": 1.0}


def test_a_lost_node_of_several_is_one_although_the_first_worker_spoke_of_a_broken_connection():
    exit_ = classify(Progress(end=BROKEN), f"RuntimeError: {NODE_DIED}; before: Connection closed", 30, 60, False)
    assert (exit_.kind, exit_.reason) == ("preempted", LOST_NODE)
    assert classify(Progress(end=BROKEN), f"RuntimeError: {BROKEN['error']}", 30, 60, False).kind == "crashed"


@pytest.mark.parametrize(
    ("end", "kind"),
    [({"outcome": "failed", "error": "nan", "retry": False}, "failed"), ({"outcome": "stopped"}, "preempted")],
)
def test_a_lost_node_changes_nothing_of_an_end_that_had_another_cause(end, kind):
    exit_ = classify(Progress(end=end), NODE, 30, 60, stopping=False)
    assert (exit_.kind, exit_.reason == LOST_NODE) == (kind, False)


def crashed(error, at=7, said=None):
    end = {"outcome": "crashed", "error": error, "t": 1.0, "at": at}
    return classify(Progress(end=end), said, 5, 60, stopping=False)


def test_an_error_of_the_program_is_known_by_its_type_message_and_step():
    cause = crashed("ValueError: wrong shape of <Batch at 0x7f01>").cause
    assert cause == crashed("ValueError: wrong shape of <Batch at 0x7fff>").cause  # its address says nothing
    others = [crashed("TypeError: wrong shape"), crashed("ValueError: other"), crashed("ValueError: wrong shape", 8)]
    assert cause and all(other.cause and other.cause != cause for other in others)
    assert crashed("ImportError: no such module", None).cause  # before the first step


@pytest.mark.parametrize(
    "error",
    [
        BROKEN["error"],
        "MemoryError: ",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "OSError: [Errno 28] No space left on device",
        "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited",
        "RuntimeError: [gloo/transport/tcp/pair.cc:547] Application timeout caused pair closure",
    ],
)
def test_what_others_or_the_machine_may_have_done_is_no_error_of_the_program(error):
    assert crashed(error).kind == "crashed" and crashed(error).cause is None


def test_a_killed_process_a_lost_node_and_a_hang_are_no_errors_of_the_program():
    assert crashed("ValueError: x", said=SIGKILL).cause is None and crashed("ValueError: x", said=NODE).cause is None
    hung = {"outcome": "crashed", "error": "no step for 600 s", "t": 1.0}  # the watchdog's word has no step
    assert classify(Progress(end=hung), None, 5, 60, stopping=False).cause is None
    storage = {"outcome": "failed", "error": "the disk is away", "retry": True, "t": 1.0}
    assert classify(Progress(end=storage), None, 5, 60, stopping=False).cause is None
