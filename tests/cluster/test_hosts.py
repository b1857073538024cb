"""Hosts with networks of their own: no block talks to another, and a host that goes away costs only its block."""

import json
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from tests.cluster.hosts import Network, Program
from tests.cluster.machines import HEAD, RUN_S, SPARE, WORKERS, Machines, attempt_events, hosts_of, steps_of
from tests.conftest import STEPS, events, shards, wait_for

SLOW = [{"block": block, "step": step, "kind": "slow"} for block in range(3) for step in range(21, STEPS)]
"""Steps of three seconds each: the blocks train on while a host's loss is found out, which takes Ray about 20 s."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def between_workers(traffic: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Bytes of each pair of workers, also of those that sent none."""
    return {pair: traffic[pair] for pair in permutations([*WORKERS, SPARE], 2)}


def test_blocks_on_three_hosts_send_each_other_no_byte(machines: Machines, expected: dict[str, bytes]) -> None:
    network = machines.network
    before = network.traffic.read()
    assert machines.send("ada", "bob", 1_000_000)
    sent = network.traffic.read() - before
    assert 1_000_000 < sent["ada", "bob"] < 1_200_000  # the counter counts, and no byte twice
    assert sent["ada", "cyd"] == 0

    before = network.traffic.read()
    command = machines.train("open")
    assert command.wait(RUN_S) == 0, command.output()
    while_training = network.traffic.read() - before

    run = machines.folder / "open" / "run"
    assert sorted(hosts_of(run).values()) == sorted(WORKERS)
    assert (run / "merged" / "model.safetensors.index.json").exists()
    print(dict(while_training))
    assert all(while_training[name, HEAD] > 1000 for name in WORKERS)
    assert set(between_workers(while_training).values()) == {0}
    assert shards(run, STEPS) == expected


def test_a_host_that_was_lost_a_moment_ago_is_left_out(machines: Machines, expected: dict[str, bytes]) -> None:
    """Ray counts it as alive for some 20 s more."""
    spare = machines.start_ray(SPARE, 1)
    assert spare.wait(300) == 0, spare.output()
    machines.network.plug(SPARE, False)
    command = machines.train("lost", "--blocks", "0")
    assert command.wait(RUN_S) == 0, command.output()
    assert "4 node(s), cpu" in command.output()
    own = {name: data for name, data in expected.items() if name.startswith("00/")}
    assert shards(machines.folder / "lost" / "run", STEPS) == own
    machines.network.plug(SPARE, True)
    machines.stop_ray([SPARE])


def test_a_cut_host_a_dark_host_a_dead_raylet_and_a_dead_head(machines: Machines, expected: dict[str, bytes]) -> None:
    """All this on hosts that cannot reach each other, only the head; in the end the bits are those of one machine."""
    network = machines.network
    network.isolate([*WORKERS, SPARE], True)
    assert not machines.send("ada", "bob", 1000)
    assert machines.send("ada", HEAD, 1000)
    command = machines.train("faults", faults=json.dumps(SLOW))
    run = machines.folder / "faults" / "run"
    wait_for(
        lambda: command.over or all(20 in steps_of(events(run, block), "commit") for block in range(3)),
        RUN_S,
        "step 20 of all",
    )
    assert not command.over, command.output()
    cut, dark, well = range(3)
    placed = hosts_of(run)
    spare = machines.start_ray(SPARE, 2)
    assert spare.wait(300) == 0, spare.output()

    ended = lose_two_hosts(network, run, placed, cut, dark, command)
    the_old_worker_ended_or_was_refused(run, cut, ended)
    assert hosts_of(run) == {cut: SPARE, dark: SPARE, well: placed[well]}
    # the third block has noticed nothing
    assert {event["event"] for event in events(run, well)} <= {"start", "ready", "step", "commit"}
    done = steps_of(events(run, well), "step")
    assert done == list(range(5, done[-1] + 1, 5))

    network.plug(placed[cut], True)
    machines.stop_ray([placed[cut]])
    healed = machines.start_ray(placed[cut], 1)
    assert healed.wait(300) == 0, healed.output()
    machines.sigkill(placed[well], "raylet")
    moved(run, well, 2, command, "SIGKILL of the raylet")
    assert hosts_of(run) == {cut: SPARE, dark: SPARE, well: placed[cut]}

    machines.sigkill(HEAD, "gcs_server")
    fault = time.time()
    assert command.wait(RUN_S) != 0, command.output()
    print(f"the command ended {time.time() - fault:.1f} s after the head: {command.output()[-400:]}")
    there = [SPARE, placed[cut], placed[well]]
    machines.stop_ray([HEAD, *there])
    machines.start_all([(HEAD, 0), *((name, 1) for name in there)])
    again = machines.train("faults")
    assert again.wait(RUN_S) == 0, again.output()
    assert shards(run, STEPS) == expected


def lose_two_hosts(network: Network, run: Path, placed: dict[int, str], cut: int, dark: int, command: Program) -> float:
    """Cut one host's cable and another's power; when the worker on the first ended, which still sees the storage."""
    pid = events(run, cut)[0]["pid"]
    host = network.hosts[placed[cut]]
    assert pid in host.processes()
    network.plug(placed[cut], False)
    network.hosts[placed[dark]].power_off()
    fault, ended = time.time(), 0.0
    while time.time() < fault + RUN_S and not all(steps_of(attempt_events(run, b, 2), "ready") for b in (cut, dark)):
        assert not command.over, command.output()
        if not ended and pid not in host.processes():
            ended = time.time()
        time.sleep(0.1)
    wait_for(lambda: pid not in host.processes(), 120, "the end of the worker cut off")
    for block in (cut, dark):
        start, ready = (
            next(e["t"] for e in attempt_events(run, block, 2) if e["event"] == k) for k in ("start", "ready")
        )
        print(f"block {block}: {start - fault:.1f} s from the fault to its next worker, {ready - fault:.1f} s to train")
    return ended or time.time()


def the_old_worker_ended_or_was_refused(run: Path, block: int, ended: float) -> None:
    """It did not outlive its replacement's claim by more than the watchdog's look, and committed nothing after it."""
    old, new = (attempt_events(run, block, attempt) for attempt in (1, 2))
    owner = json.loads((run / "blocks" / f"{block:02d}" / "OWNER.json").read_text())
    assert owner["attempt"] == 2
    claimed = owner["time"]
    print(f"the worker cut off ended {claimed - ended:+.1f} s before its replacement was placed")
    assert ended < claimed + 2.0
    assert claimed < new[0]["t"]
    assert all(event["t"] < claimed for event in old if event["event"] == "commit")
    resumed = steps_of(new, "resumed")
    assert resumed == [max(steps_of(old, "commit"))]


def moved(run: Path, block: int, attempt: int, command: Program, why: str) -> None:
    """Wait until a block trains in its next attempt, from its newest commit."""
    fault = time.time()
    wait_for(
        lambda: command.over or bool(steps_of(attempt_events(run, block, attempt), "ready")), RUN_S, "the next attempt"
    )
    assert not command.over, command.output()
    committed = max(steps_of(attempt_events(run, block, attempt - 1), "commit"))
    assert steps_of(attempt_events(run, block, attempt), "resumed") == [committed]
    print(f"block {block}: {time.time() - fault:.1f} s from {why} to its next training")
