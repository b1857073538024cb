"""What is offloaded lies on the host: pieces are the optimizer's own memory, and gathering goes where the group can."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dbtrain.training import layout
from dbtrain.training.layout import Sharded


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
    monkeypatch.setattr(layout, "get_accelerator", lambda: SimpleNamespace(current_device_name=lambda: "meta"))
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
