"""The share of paid GPU time that trains, by simulation: isolated blocks, one synchronous job, elastic training.

Command:  python benchmarks/goodput.py [--gpus 8 64 512 4096 16384] [--mtbf 30 300 3000] [--restart 54] ...
          [--out goodput.json]

A **group** is GPUs that train in step: when one dies, all go back to the group's last commit. Isolated blocks are B
groups of N/B GPUs each (ZeRO inside), FSDP and pipelines one group of N. Elastic training is replicas in step: when
one dies, the others lose a step and go on, and it comes back by a copy from a neighbour (torchft).

The costs are arguments. What stands there is the last that was measured of dbtrain on an H100 (docs/benchmarks.md),
and assumptions where the help says so. They are the same for all methods: whoever restarts faster, restarts faster in
all columns. A GPU does its work at 1, a slow one at `--slow-speed`; a group goes at the speed of its slowest.
Communication is free here but for a pipeline's bubble: this is about failures only.
"""

import argparse
import heapq
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

HOUR = 3600.0
EVENTS = 3000
"""Failures after which a simulation ends: the standard error of its share is then below 0.01."""
LONGEST_S = 100 * 365 * 24 * HOUR


@dataclass(frozen=True)
class Costs:
    """What failures and commits cost; seconds, rates per GPU and second."""

    mtbf: float
    """Mean time between failures of one GPU; infinite for none."""
    restart: float = 54.0
    """From the failure to the next step, where a GPU is at hand."""
    stall: float = 6.9
    """For which a snapshot stops the training."""
    write: float = 67.0
    """From the snapshot to its commit; the training goes on."""
    preempted: float = math.inf
    """Mean time between preemptions of one GPU, after each of which another must be found."""
    warning: float = 30.0
    """Between the warning of a preemption and its end."""
    replace: float = 0.0
    """Until another GPU is found, after a preemption."""
    quorum: float = 10.0
    """For which elastic training stops when a replica goes or comes."""

    @property
    def rate(self) -> float:
        """Events of one GPU a second."""
        return 1 / self.mtbf + 1 / self.preempted


def best_interval(costs: Costs, gpus: int) -> float:
    """Seconds of training between two commits, by Daly 2006, equation (37); sqrt(2 stall M) is Young's of 1974.

    A commit begins when the last one is written, so not more often than that.
    """
    mean = 1 / (gpus * costs.rate)
    if costs.stall >= 2 * mean:
        return max(mean, costs.write)
    part = costs.stall / (2 * mean)
    daly = math.sqrt(2 * costs.stall * mean) * (1 + math.sqrt(part) / 3 + part / 9) - costs.stall
    return max(daly, costs.write)


def closed_form(costs: Costs, gpus: int, interval: float) -> float:
    """Share of the time in which a group trains, of failures only and commits that are written in the stall.

    Daly 2006, equation (20): an interval takes M e^(R/M) (e^((interval + stall)/M) - 1).
    """
    mean = 1 / (gpus * costs.rate)
    exponents = costs.restart / mean, (interval + costs.stall) / mean
    if sum(exponents) > 700:
        return 0.0
    return interval / (mean * math.exp(exponents[0]) * math.expm1(exponents[1]))


@dataclass
class Paid:
    """GPU seconds that were paid for, and those of them that trained something which was kept."""

    total: float = 0.0
    useful: float = 0.0

    @property
    def share(self) -> float:
        return self.useful / self.total if self.total else 1.0


def kept(up: float, costs: Costs, interval: float) -> float:
    """Seconds of training that are committed when a group fails `up` seconds after it began to train."""
    commits = max(0, math.floor((up - costs.write) / (interval + costs.stall)))
    return commits * interval


def trained(up: float, costs: Costs, interval: float) -> float:
    """Seconds of training in the first `up` seconds, of which the snapshots took some."""
    rounds, rest = divmod(up, interval + costs.stall)
    return rounds * interval + min(rest, interval)


def group(costs: Costs, gpus: int, interval: float, dice: random.Random, events: int = EVENTS) -> Paid:
    """One group through so many failures and preemptions.

    A preemption whose warning is long enough for a commit loses no work. The GPU that is taken is not paid for
    until there is another; those that wait for it are.
    """
    paid, rate, taken = Paid(), gpus * costs.rate, (1 / costs.preempted) / costs.rate
    saved_in_time = costs.warning >= costs.stall + costs.write
    for _ in range(events):
        up = dice.expovariate(rate)
        preempted = dice.random() < taken
        saves = preempted and saved_in_time
        paid.useful += gpus * (trained(up, costs, interval) if saves else kept(up, costs, interval))
        paid.total += gpus * up + (gpus * (costs.stall + costs.write) if saves else 0.0)
        _come_back(paid, costs, gpus, preempted, dice)
        if paid.total > gpus * LONGEST_S or paid.total > 1e6 * (paid.useful + gpus * HOUR):
            break
    return paid


def _come_back(paid: Paid, costs: Costs, gpus: int, preempted: bool, dice: random.Random) -> None:
    """Wait and restart until the restart is through; what fails meanwhile begins it anew."""
    for _ in range(1000):
        wait = costs.replace if preempted else 0.0
        paid.total += (gpus - 1) * wait
        next_event = dice.expovariate(gpus * costs.rate)
        paid.total += gpus * min(next_event, costs.restart)
        if next_event >= costs.restart:
            return
        preempted = dice.random() < (1 / costs.preempted) / costs.rate


def elastic(costs: Costs, gpus: int, replicas: int, dice: random.Random, events: int = EVENTS) -> Paid:
    """Replicas of gpus / replicas GPUs in step; all stop for the quorum when one goes or comes back.

    The others' state is a replica's backup, so commits matter only when all are gone; then half an interval
    is lost, and its commits are left out of the count, in elastic training's favour.
    """
    size, paid, now, stopped_until = gpus // replicas, Paid(), 0.0, 0.0
    up, away = replicas, list[float]()
    taken = (1 / costs.preempted) / costs.rate
    lost = best_interval(costs, gpus) / 2
    seen = 0
    while seen < events and now < LONGEST_S:
        failure = now + dice.expovariate(up * size * costs.rate) if up else math.inf
        event = min(failure, away[0] if away else math.inf)
        paid.total += up * size * (event - now)
        paid.useful += up * size * max(0.0, event - max(now, stopped_until))
        now, stopped_until = event, max(stopped_until, event + costs.quorum)
        if event == failure:
            up, seen = up - 1, seen + 1
            preempted = dice.random() < taken
            heapq.heappush(away, now + _absence(paid, costs, size, preempted, dice))
            if not up:
                paid.useful -= min(paid.useful, size * lost)
        else:
            heapq.heappop(away)
            up += 1
    return paid


def _absence(paid: Paid, costs: Costs, size: int, preempted: bool, dice: random.Random) -> float:
    """Seconds for which a replica is away, paid for but for the GPU that is waited for."""
    before = paid.total
    _come_back(paid, costs, size, preempted, dice)
    restarting = (paid.total - before) / size
    return restarting + (costs.replace / size if preempted else 0.0)


def bubble(stages: int, micro_batches: int, interleaved: int = 1) -> float:
    """Idle share of a 1F1B pipeline; Narayanan et al. 2021, section 2.2: (p-1) / (v m) of the ideal time."""
    idle = (stages - 1) / (interleaved * micro_batches)
    return idle / (1 + idle)


def pace(gpus: int, slow_share: float, slow_speed: float) -> float:
    """Expected speed of a group that waits for its slowest GPU, each being slow with the same chance."""
    all_fast = (1 - slow_share) ** gpus
    return all_fast + (1 - all_fast) * slow_speed


@dataclass(frozen=True)
class Scene:
    """What is asked: how many GPUs under which costs, and how many of them are slow."""

    gpus: int
    costs: Costs
    slow_share: float = 0.0
    slow_speed: float = 1.0

    def of_group(self, size: int, dice: random.Random, costs: Costs | None = None) -> float:
        """Share of paid time that trains, of groups of `size` GPUs that know nothing of each other."""
        given = costs or self.costs
        done = group(given, size, best_interval(given, size), dice)
        return done.share * pace(size, self.slow_share, self.slow_speed)

    def of_elastic(self, size: int, dice: random.Random) -> float:
        """The same, of replicas of `size` GPUs that train in step."""
        done = elastic(self.costs, self.gpus, max(1, self.gpus // size), dice)
        return done.share * pace(self.gpus, self.slow_share, self.slow_speed)


def shares(scene: Scene, given: argparse.Namespace) -> dict[str, float]:
    """A row of the table: for each method, the share of paid time that trains."""
    dice, found = random.Random(given.seed), dict[str, float]()
    for blocks in given.blocks:
        size = max(1, scene.gpus // blocks)
        found[f"blocks B={blocks}"] = scene.of_group(size, dice)
        # as it is built: the first rank of a block writes for all, so a commit takes as much longer
        one_writer = replace(scene.costs, stall=scene.costs.stall * size, write=scene.costs.write * size)
        found[f"B={blocks}, one writer"] = scene.of_group(size, dice, one_writer)
    found["elastic"] = scene.of_elastic(min(given.replica, scene.gpus), dice)
    found["FSDP"] = scene.of_group(scene.gpus, dice)
    pipeline = 1 - bubble(given.stages, given.micro_batches)
    found["1F1B"] = found["FSDP"] * pipeline
    return found


def scenes(given: argparse.Namespace) -> Iterator[tuple[str, Scene]]:
    """Failures alone at every size; spot preemptions; slow GPUs."""
    rest = {key: getattr(given, key) for key in ("restart", "stall", "write", "warning", "quorum")}
    for mtbf in given.mtbf:
        for gpus in given.gpus:
            yield f"a failure per GPU every {mtbf:g} h", Scene(gpus, Costs(mtbf * HOUR, **rest))
    calm = max(given.mtbf) * HOUR
    spot = Costs(calm, preempted=given.preempted * HOUR, replace=given.replace, **rest)
    for gpus in given.gpus:
        yield f"spot: a preemption per GPU every {given.preempted:g} h, {given.replace:g} s without", Scene(gpus, spot)
    for speed in given.slow_speed:
        for gpus in given.gpus:
            name = f"one GPU in {1 / given.slow_share:.0f} at {speed:g} of the speed"
            yield name, Scene(gpus, Costs(calm, **rest), given.slow_share, speed)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096, 16384])
    add("--mtbf", type=float, nargs="+", default=[30, 300, 3000], help="hours between failures of one GPU")
    add("--blocks", type=int, nargs="+", default=[8, 64])
    add("--restart", type=float, default=54, help="s from a failure to the next step; H100: 33 + 5 + 16")
    add("--stall", type=float, default=6.9, help="s, of a snapshot; H100, 9.8 GB from pageable memory")
    add("--write", type=float, default=67, help="s until the commit is there; H100 host, 13 GB a GPU")
    add("--preempted", type=float, default=24, help="hours between preemptions of one spot GPU; an assumption")
    add("--warning", type=float, default=120, help="s before a preemption; clouds say 30 to 120")
    add("--replace", type=float, default=600, help="s until another spot GPU is there; an assumption")
    add("--quorum", type=float, default=10, help="s for which elastic training stops; an assumption")
    add("--replica", type=int, default=8, help="GPUs of one elastic replica")
    add("--slow-share", type=float, default=0.001, help="of the GPUs; an assumption")
    add("--slow-speed", type=float, nargs="+", default=[0.7, 0.85])
    add("--stages", type=int, default=8, help="of the 1F1B pipeline")
    add("--micro-batches", type=int, default=64, help="of a step of the pipeline")
    add("--seed", type=int, default=0)
    add("--out", metavar="JSON")
    return parser


def main() -> None:
    given = arguments().parse_args()
    rows = [(name, scene, shares(scene, given)) for name, scene in scenes(given)]
    console, table, last = Console(width=130), None, ""
    for name, scene, found in rows:
        if name != last:
            if table:
                console.print(table)
            table, last = Table("GPUs", *found, title=name, title_justify="left"), name
        table.add_row(str(scene.gpus), *(f"{100 * share:.1f}" for share in found.values()))
    console.print(table)
    if given.out:
        said = [{"scene": name, **asdict(scene), "shares": found} for name, scene, found in rows]
        Path(given.out).write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
