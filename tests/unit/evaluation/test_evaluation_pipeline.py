"""A merged model whose blocks lie in other processes: the same bits, also when processes die in between."""

import json
import threading

import numpy as np
import pytest
import torch

from dbtrain.config import load_config
from dbtrain.errors import HostDiedError, PlacementError
from dbtrain.evaluation.images.pictures import sample_run
from dbtrain.evaluation.losses import measure_losses
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.pipeline.placement import fastest, loads, most_speedup, share_out
from dbtrain.evaluation.pipeline.tensors import pack, unpack
from dbtrain.evaluation.pipeline.walks import InFlight
from dbtrain.evaluation.report import evaluate_run
from dbtrain.evaluation.text.generate import generate_text
from tests.unit.evaluation.test_evaluation_resident import run_of  # noqa: F401

CPU = torch.device("cpu")
PIPELINE = ["evaluation.resident=pipeline"]


class ThreadHost:
    """Holds the object in this process; dies at a call of this number that asks for a prediction."""

    def __init__(self, made, last):
        self.made, self.last, self.calls, self.lock = made, last, 0, threading.Lock()

    def call(self, method, *arguments):
        with self.lock:
            self.calls += method in ("predict", "extend")
            if self.last is not None and self.calls >= self.last:
                raise HostDiedError("killed")
        return getattr(self.made, method)(*arguments)

    def tell(self, method, *arguments):
        self.call(method, *arguments)


class ThreadHosts:
    """Room for so many processes, of which the first `mortal` die at their `last` call."""

    device, threads = "cpu", torch.get_num_threads()

    def __init__(self, room=2, mortal=0, last=1):
        self.free, self.mortal, self.last = room, mortal, last
        self.started, self.hosts, self.closed = [], [], False
        self.making = threading.Lock()  # random numbers of PyTorch are those of the whole process

    def room(self):
        return self.free

    def start(self, make, *arguments):
        with self.making:
            self.started.append(arguments[1])
            last = self.last if len(self.started) <= self.mortal else None
            self.hosts.append(ThreadHost(make(*arguments), last))
            return self.hosts[-1]

    def close(self):
        self.closed = True


EVALUATED = [("vit", "accuracy"), ("ar_lm", "bits"), ("ar_lm", "generated"), ("masked_lm", "elbo_bits"),
             ("joint", "accuracy"), ("greedy", "accuracy")]  # fmt: skip


def chosen(metric):
    own = {"generated": ["evaluation.texts=3"], "accuracy": ["evaluation.batch_size=48"]}
    return [f"evaluation.metric={metric}", *own.get(metric, [])]


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize(("name", "metric"), EVALUATED)
def test_scores_are_the_same_bits(run_of, name, metric, room):  # noqa: F811
    run, hosts, lines, asked = run_of(name), ThreadHosts(room), [], chosen(metric)
    _, here = evaluate_run(run, [*asked, "evaluation.resident=all"])
    _, there = evaluate_run(run, [*asked, *PIPELINE], hosts=lambda config: hosts, tell=lines.append)
    assert here == there and hosts.closed
    models = 1 if name == "joint" else 2
    assert len(hosts.started) == room and {unit for units in hosts.started for unit in units} == set(range(models))
    assert f"a pipeline of {room} process{'es' * (room > 1)} (cpu)" in lines[-1]


@pytest.mark.parametrize(("name", "metric"), EVALUATED)
def test_what_a_dead_process_was_asked_is_asked_again(run_of, name, metric):  # noqa: F811
    run, hosts, asked = run_of(name), ThreadHosts(3, mortal=3, last=4), chosen(metric)
    _, here = evaluate_run(run, [*asked, "evaluation.resident=all"])
    _, there = evaluate_run(run, [*asked, *PIPELINE], hosts=lambda config: hosts)
    assert here == there and len(hosts.started) > 3


def test_a_process_that_dies_while_it_starts_is_replaced(run_of):  # noqa: F811
    hosts, begun = ThreadHosts(2), []
    start = hosts.start

    def start_or_die(*arguments):
        begun.append(arguments)
        if len(begun) <= 2:
            raise HostDiedError("killed")
        return start(*arguments)

    hosts.start = start_or_die
    run = run_of("vit")
    _, there = evaluate_run(run, [*chosen("accuracy"), *PIPELINE], hosts=lambda config: hosts)
    assert there == evaluate_run(run, [*chosen("accuracy"), "evaluation.resident=all"])[1] and len(begun) == 4


def test_a_process_that_always_dies_is_given_up(run_of):  # noqa: F811
    hosts = ThreadHosts(2, mortal=100)
    with pytest.raises(PlacementError, match="block 0 of the pipeline died 3 times without an answer, at last: killed"):
        evaluate_run(run_of("vit"), PIPELINE, hosts=lambda config: hosts)
    assert hosts.closed and hosts.started.count((0,)) == 3


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_samples_are_the_same_bits(run_of, tmp_path, solver):  # noqa: F811
    run, drawn = run_of("dit"), []
    asked = [f"evaluation.solver={solver}", "evaluation.steps=6", "evaluation.batch_size=3"]
    for resident in ("all", "pipeline"):
        hosts = ThreadHosts(3, mortal=2, last=5)
        own = [*asked, f"evaluation.resident={resident}"]
        sample_run(run, tmp_path / f"{resident}.npy", 10, 0, own, hosts=lambda config, hosts=hosts: hosts)
        drawn.append(np.load(tmp_path / f"{resident}.npy"))
    assert np.array_equal(*drawn)


def test_losses_and_a_text_are_the_same_bits(run_of):  # noqa: F811
    run, hosts = run_of("ar_lm"), ThreadHosts(2, mortal=2, last=4)
    assert measure_losses(run, 4, 20) == measure_losses(
        run, 4, 20, overrides=PIPELINE, hosts=lambda config: ThreadHosts(2)
    )
    here = generate_text(run, "the ", 6, 1.0, 1)
    assert generate_text(run, "the ", 6, 1.0, 1, overrides=PIPELINE, hosts=lambda config: hosts) == here
    assert len(hosts.started) > 2


def test_every_process_knows_the_largest_batch_from_the_first(run_of):  # noqa: F811
    for name, size in (("vit", 48), ("masked_lm", 4)):
        hosts = ThreadHosts(2)
        evaluate_run(
            run_of(name), [f"evaluation.batch_size={size}", *PIPELINE], hosts=lambda config, hosts=hosts: hosts
        )
        assert {host.made._speed._size for host in hosts.hosts} == {size}


def test_precision_is_that_of_the_device_which_computes(run_of):  # noqa: F811
    hosts = ThreadHosts(1)
    hosts.device = "meta"
    with open_run(run_of("vit"), CPU, changed=changed, hosts=lambda config: hosts) as model:
        assert model.device.type == "cpu" and model.blocks.computes_on.type == "meta"


def changed(config):
    return load_config(None, PIPELINE, base=config.model_dump(mode="json"))


def test_a_cache_that_is_not_needed_any_more_is_dropped(run_of):  # noqa: F811
    hosts = ThreadHosts(1)
    generate_text(run_of("ar_lm"), "the ", 3, 1.0, 1, overrides=PIPELINE, hosts=lambda config: hosts)
    assert len(hosts.hosts) == 1 and not hosts.hosts[0].made._caches


def test_a_command_without_a_cluster_keeps_the_blocks_here_and_a_full_cluster_says_so(run_of):  # noqa: F811
    run = run_of("vit")
    assert open_run(run, CPU, changed=changed).blocks.told() == "all 2 blocks in memory"
    hosts = ThreadHosts(0)
    with pytest.raises(PlacementError, match="the cluster has no room for a process that holds blocks"):
        open_run(run, CPU, changed=changed, hosts=lambda config: hosts)
    assert hosts.closed


def test_processes_are_shared_out_in_proportion():
    even = {0: 4, 1: 4, 2: 4}
    assert share_out(even, 3) == [(0,), (1,), (2,)] and most_speedup(even, share_out(even, 3)) == 3
    assert share_out(even, 2) == [(0, 2), (1,)] and most_speedup(even, share_out(even, 2)) == 1.5
    assert share_out(even, 1) == [(0, 1, 2)] and most_speedup(even, share_out(even, 1)) == 1
    uneven = {0: 2, 1: 12, 2: 4}
    placed = share_out(uneven, 6)
    assert placed == [(0,), (1,), (1,), (1,), (2,), (2,)] or placed == [(0,), (1,), (1,), (1,), (1,), (2,)]
    assert most_speedup(uneven, placed) == 18 / max(12 / placed.count((1,)), 4 / placed.count((2,)))


def test_no_process_is_taken_that_makes_nothing_faster():
    even = dict.fromkeys(range(4), 4)
    taken = {room: len(fastest(even, room)) for room in range(1, 10)}
    assert taken == {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 9: 8}
    assert fastest(even, 3) == [(0, 2), (1, 3)]


def test_loads_follow_the_levels_of_a_sample(run_of):  # noqa: F811
    run_plan = run_of("dit").plan
    section = run_plan.config.evaluation.model_copy(update={"steps": 6, "spacing": "slices", "solver": "euler"})
    assert loads(run_plan, section) == {0: 3 * 3, 1: 3 * 2}
    # a step to the next level asks its block once more, but for the first level
    assert loads(run_plan, section.model_copy(update={"solver": "heun"})) == {0: 5 * 3, 1: 6 * 2}
    assert loads(run_of("joint").plan, run_of("joint").config.evaluation) == {0: 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_tensors_arrive_as_they_are(dtype, shape):
    tensor = (torch.rand(shape) * 5).to(dtype)
    packed = pack(tensor)
    packed.content.setflags(write=False)
    back = unpack(packed, CPU)
    assert torch.equal(back, tensor) and back.dtype == dtype and back.shape == tensor.shape


def test_walks_in_flight_keep_the_setting_of_gradients_and_tell_an_error():
    with torch.no_grad():
        assert list(InFlight(2).each(lambda item: (item, torch.is_grad_enabled()), [1, 2])) == [(1, False), (2, False)]

    def fail(item):
        raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        list(InFlight(2).each(fail, [1, 2]))


def test_the_record_is_written_as_without_a_pipeline(run_of):  # noqa: F811
    run = run_of("vit")
    evaluate_run(run, [*chosen("accuracy"), *PIPELINE], hosts=lambda config: ThreadHosts(2))
    there = json.loads(run.store.read("evaluation.json"))
    evaluate_run(run, [*chosen("accuracy"), "evaluation.resident=all"])
    assert json.loads(run.store.read("evaluation.json")) == there
