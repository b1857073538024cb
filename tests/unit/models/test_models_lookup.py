"""The ways in which the gradient of an embedding table is added up: each is the same sum."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dbtrain.models import lookup
from dbtrain.models.lookup import Embedding, one_hot_sum, sorted_sum

WAYS = pytest.mark.parametrize("add_up", [one_hot_sum, sorted_sum])


@WAYS
@pytest.mark.parametrize("count", [1, 11, 300])
def test_the_sum_is_that_of_pytorchs_embedding(add_up, count):
    torch.manual_seed(0)
    table = torch.randn(count, 5, requires_grad=True, dtype=torch.float64)
    rows, gradient = torch.randint(count, (200,)), torch.randn(200, 5, dtype=torch.float64)
    functional.embedding(rows, table).backward(gradient)
    assert torch.allclose(add_up(gradient, rows, count), table.grad, rtol=1e-12, atol=1e-12)


@WAYS
def test_rows_that_nobody_looked_up_get_zero(add_up):
    found = add_up(torch.ones(3, 2), torch.tensor([1, 3, 1]), 5)
    assert found.tolist() == [[0, 0], [2, 2], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("few", [0, 1024], ids=["sorted", "one-hot"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_function_is_a_lookup_with_that_gradient(monkeypatch, few, compiled):
    """As it is on a GPU, run on the CPU."""
    monkeypatch.setattr(lookup, "FEW", few)
    table = nn.Parameter(torch.randn(9, 4))
    rows = torch.randint(9, (3, 7))

    def look_up(table, rows):
        with torch.autocast("cpu", torch.bfloat16):
            return lookup._Lookup.apply(table, rows)

    out = (torch.compile(look_up, backend="aot_eager") if compiled else look_up)(table, rows)
    assert torch.equal(out, table[rows])
    gradient = torch.randn(3, 7, 4)
    (found,) = torch.autograd.grad(out, table, gradient)
    (wanted,) = torch.autograd.grad(functional.embedding(rows, table), table, gradient)
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, atol=1e-6)


def test_the_module_starts_as_pytorchs_and_has_its_names():
    torch.manual_seed(3)
    theirs = nn.Embedding(6, 4)
    torch.manual_seed(3)
    ours = Embedding(6, 4)
    assert torch.equal(ours.weight, theirs.weight) and ours.state_dict().keys() == theirs.state_dict().keys()
    rows = torch.tensor([[0, 5], [5, 2]])
    assert torch.equal(ours(rows), theirs(rows))
