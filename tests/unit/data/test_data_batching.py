import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.data.batching import EpochOrder


def stream(order, steps, batch):
    return torch.cat([order.indices(step, range(batch)) for step in range(steps)])


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**62))
def test_every_epoch_is_a_permutation_and_whole_batches_cross_its_end(size, batch, seed):
    seen = stream(EpochOrder(size, batch, seed), 3 * size // batch + 1, batch)
    for epoch in seen[: len(seen) // size * size].reshape(-1, size):
        assert epoch.sort().values.tolist() == list(range(size))


@given(st.integers(0, 1000), st.lists(st.integers(0, 24), max_size=5))
def test_a_batch_does_not_depend_on_how_it_is_cut(step, cuts):
    edges = [0, *sorted(cuts), 24]
    whole = EpochOrder(97, 24, 5).indices(step, range(24))
    for order in (EpochOrder(97, 24, 5), None):  # one worker that keeps its order, and one worker a part
        parts = [
            (order or EpochOrder(97, 24, 5)).indices(step, range(a, b))
            for a, b in zip(edges, edges[1:], strict=False)
            if a < b
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_step_does_not_depend_on_those_before_it():
    resumed, continued = EpochOrder(97, 24, 5), EpochOrder(97, 24, 5)
    stream(continued, 40, 24)
    assert torch.equal(resumed.indices(40, range(24)), continued.indices(40, range(24)))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return EpochOrder(200, 200, seed).indices(epoch, range(200))

    assert torch.equal(order(1, 0), order(1, 0))
    assert not torch.equal(order(1, 0), order(2, 0))
    assert not torch.equal(order(1, 0), order(1, 1))
    assert not torch.equal(order(1, 0), torch.arange(200))
