import pytest

from dbtrain.coordinator.placement import Node, choose_device, place
from dbtrain.errors import ConfigError, PlacementError
from dbtrain.run.requests import Request, requests


def ask(block, workers=1, **resources):
    return Request(block, workers, resources or {"CPU": 1.0}, None, "cpu")


def node(name, **resources):
    return Node(name, resources)


def test_blocks_go_to_the_first_node_with_room_and_the_rest_waits():
    where = place([ask(b) for b in range(4)], [node("a", CPU=2), node("b", CPU=1)])
    assert where == {0: ["a"], 1: ["a"], 2: ["b"], 3: None}


def test_a_block_that_waits_keeps_nothing_from_a_smaller_one():
    where = place([ask(0, CPU=2), ask(1, CPU=3), ask(2, CPU=1)], [node("a", CPU=3)])
    assert where == {0: ["a"], 1: None, 2: ["a"]}


def test_fractions_of_a_gpu_add_up():
    thirds = [ask(b, CPU=1, GPU=1 / 3) for b in range(4)]
    assert place(thirds, [node("a", CPU=8, GPU=1)]) == {0: ["a"], 1: ["a"], 2: ["a"], 3: None}
    tenths = [ask(b, GPU=0.1) for b in range(11)]
    assert list(place(tenths, [node("a", GPU=1)]).values()).count(None) == 1


def test_workers_of_a_block_may_lie_on_several_nodes_and_start_all_or_none():
    nodes = [node("a", GPU=2), node("b", GPU=1)]
    assert place([ask(0, 3, GPU=1)], nodes) == {0: ["a", "a", "b"]}
    # block 1 finds two of its three workers' places and must give them back to block 2
    where = place([ask(0, 1, GPU=1), ask(1, 3, GPU=1), ask(2, 2, GPU=1)], nodes)
    assert where == {0: ["a"], 1: None, 2: ["a", "b"]}


def test_custom_resources_choose_the_node():
    nodes = [node("a", CPU=8), node("b", CPU=8, h200=1)]
    assert place([ask(0, CPU=1, h200=1), ask(1, CPU=1, h200=1), ask(2, CPU=1)], nodes) == {0: ["b"], 1: None, 2: ["a"]}


def test_a_block_that_fits_nowhere_is_named_with_what_it_wants_and_what_there_is():
    with pytest.raises(PlacementError) as caught:
        place([ask(0, CPU=1), ask(1, 2, CPU=4, GPU=1.5)], [node("big", CPU=6, GPU=1), node("small", CPU=1)])
    message = str(caught.value)
    for words in ("block 1", "2 worker(s)", "4 CPU, 1.5 GPU", "big has 6 CPU, 1 GPU", "small has 1 CPU, 0 GPU"):
        assert words in message
    with pytest.raises(PlacementError, match="no nodes"):
        place([ask(0)], [])


def test_requests_take_the_clusters_values_and_the_exceptions_of_a_block(make_config):
    config = make_config(
        "cluster.cpus_per_worker=2",
        "cluster.gpus_per_worker=0.5",
        "cluster.resources.zone=1",
        "training.micro_batch=4",
        "cluster.blocks.1.workers=3",
        "cluster.blocks.1.gpus_per_worker=1",
        "cluster.blocks.1.micro_batch=2",
        "cluster.blocks.1.resources.zone=2",
        "cluster.blocks.2.cpus_per_worker=0.5",
    )
    zero, one, two = requests(config, "cuda")
    assert [r.block for r in (zero, one, two)] == [0, 1, 2]
    assert (zero.workers, zero.micro_batch, zero.resources) == (1, 4, {"CPU": 2, "GPU": 0.5, "zone": 1})
    assert (one.workers, one.micro_batch, one.resources) == (3, 2, {"CPU": 2, "GPU": 1, "zone": 2})
    assert (two.workers, two.resources["CPU"]) == (1, 0.5)
    assert all("GPU" not in request.resources for request in requests(config, "cpu"))


def test_workers_of_one_block_never_share_a_gpu_and_none_holds_several(make_config):
    shared = make_config("cluster.workers=2", "cluster.gpus_per_worker=0.5")
    with pytest.raises(ConfigError, match="block 0 has 2 workers of gpus_per_worker=0.5.*gpus_per_worker=1"):
        requests(shared, "cuda")
    assert requests(shared, "cpu")[0].workers == 2  # no GPU, nothing to share
    for device in ("cuda", "cpu"):  # on CPUs too, where it would be left out without a word
        for key, block in (("cluster.blocks.1.gpus_per_worker", 1), ("cluster.gpus_per_worker", 0)):
            with pytest.raises(ConfigError, match=rf"block {block} .*per_worker=2.*one GPU: set cluster.workers=2"):
                requests(make_config(f"{key}=2"), device)


def test_the_device_follows_the_nodes_unless_it_is_demanded():
    cpus, gpus = [node("a", CPU=4)], [node("a", CPU=4), node("b", CPU=4, GPU=1)]
    assert [choose_device(w, cpus) for w in ("auto", "cpu")] == ["cpu", "cpu"]
    assert [choose_device(w, gpus) for w in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    with pytest.raises(PlacementError, match="none of the 1 nodes has a GPU"):
        choose_device("cuda", cpus)
