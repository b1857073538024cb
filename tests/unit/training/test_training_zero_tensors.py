"""What is offloaded lies on the host: pieces are the optimizer's own memory, and gathering goes where the group can."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dbtrain.training import zero_tensors as layout
from dbtrain.training.zero_tensors import Sharded


@pytest.fixture
def offloaded(monkeypatch):
    """(layout, parameter, flat weights, their moments): the second of two parameters of 3 and 4 elements, one rank.

    The accelerator is one that only knows shapes; whatever is moved to it cannot be read.
    """
    flat = torch.arange(7.0).requires_grad_()
    optimizer = SimpleNamespace(state={flat: {"exp_avg": torch.zeros(7)}})
    zero = SimpleNamespace(
        fp32_partitioned_groups_flat=[flat],
        grad_position={1: [0, 3, 4]},
        get_param_id=lambda parameter: 1,
        optimizer=optimizer,
    )
    parameter = nn.Parameter(torch.empty(0))
    part = torch.arange(3.0, 7.0)
    part.ds_numel = 4
    vars(parameter).update(ds_tensor=part, ds_numel=4, ds_shape=(2, 2))
    monkeypatch.setattr(
        layout.deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(current_device_name=lambda: "meta")
    )
    monkeypatch.setattr(layout.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(layout.dist, "get_rank", lambda: 0)
    return Sharded(zero), parameter, flat, optimizer.state[flat]["exp_avg"]


def test_a_restore_reaches_the_optimizer(offloaded):
    sharded, parameter, flat, moments = offloaded
    full = torch.tensor([[9.0, 8.0], [7.0, 6.0]])
    with torch.no_grad():
        sharded.scatter(parameter, full, sharded.piece(parameter, None))
        sharded.scatter(parameter, full + 1, sharded.piece(parameter, "exp_avg"))
        sharded.assign(parameter, full)
    assert flat.tolist() == [0, 1, 2, 9, 8, 7, 6] and moments.tolist() == [0, 0, 0, 10, 9, 8, 7]
    assert parameter.ds_tensor.tolist() == [9, 8, 7, 6]


def test_parts_are_gathered_on_the_accelerator(offloaded, monkeypatch):
    sharded, parameter, _, _ = offloaded
    gathered = []
    monkeypatch.setattr(layout.dist, "all_gather", lambda parts, part: gathered.extend([*parts, part]))
    full = sharded.gather(parameter, sharded.piece(parameter, None))
    assert [part.device.type for part in gathered] == ["meta", "meta"] and full.shape == (2, 2)


@pytest.mark.parametrize(("rank", "held"), [(0, [0, 1]), (1, [2, 3]), (2, [4]), (3, None)])
def test_the_last_parts_of_a_parameter_are_shorter_than_their_pieces_or_empty(monkeypatch, rank, held):
    """Five elements on four ranks, two for each: the third one's second and all of the fourth's are padding."""
    flat = torch.full((2,), 9.0)
    zero = SimpleNamespace(
        fp32_partitioned_groups_flat=[flat], grad_position={1: [0, 0, 2]}, get_param_id=lambda parameter: 1
    )
    parameter = nn.Parameter(torch.empty(0))
    part = torch.full((2,), 9.0)
    part.ds_numel = 2
    vars(parameter).update(ds_tensor=part, ds_numel=5, ds_shape=(5, 1))
    monkeypatch.setattr(layout.dist, "get_rank", lambda: rank)
    sharded, full = Sharded(zero), torch.arange(5.0).reshape(5, 1)
    sharded.scatter(parameter, full, sharded.piece(parameter, None))
    sharded.assign(parameter, full)
    expected = (held or []) + [9.0] * (2 - len(held or []))
    assert flat.tolist() == part.tolist() == expected
    assert (None if held is None else sharded.piece(parameter, None).tolist()) == held
