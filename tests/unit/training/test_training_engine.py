"""What of an engine needs no DeepSpeed: its host copies. tests/resume/engine_states.py tests the rest, on two ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dbtrain.training import engine as engine_module
from dbtrain.training.engine import Engine
from dbtrain.training.host_copies import FromHost, HostCopies


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gathers_and_the_first_alone_copies_to_the_host(monkeypatch, rank):
    gathered = []
    layout = SimpleNamespace(
        piece=lambda parameter, state: parameter.data,
        gather=lambda parameter, piece: gathered.append(1) or piece,
    )
    parameter = nn.Parameter(torch.arange(4.0))
    engine = object.__new__(Engine)
    vars(engine).update(
        _layout=layout, _parameters={"w": parameter}, _ema={"w": parameter.data.clone()}, _ema_decay=0.9
    )
    monkeypatch.setattr(engine_module.dist, "get_rank", lambda: rank)
    engine._copies = HostCopies(engine._shapes(), FromHost(), pytest.fail)
    snapshot = engine.snapshot()
    snapshot.wait()
    parts = snapshot.parts
    assert len(gathered) == 4 and set(parts) == {"model", "ema", "optim"}
    if rank:
        assert parts == {"model": {}, "ema": {}, "optim": {}}
        return
    assert set(parts["optim"]) == {"exp_avg/w", "exp_avg_sq/w"}
    assert torch.equal(parts["model"]["w"], parameter.data) and parts["model"]["w"] is not parameter.data


@pytest.mark.parametrize("kept", [True, False])
def test_without_its_state_the_optimizer_starts_anew(kept):
    pieces = {state: torch.zeros(4) for state in ("exp_avg", "exp_avg_sq")}
    parameter = nn.Parameter(torch.zeros(4))
    layout = SimpleNamespace(
        piece=lambda parameter, state: pieces[state] if state else parameter.data,
        scatter=lambda parameter, full, piece: piece.copy_(full),
        assign=lambda parameter, full: None,
        owners=lambda: [(parameter, {})],
    )
    step = torch.zeros(())
    engine = object.__new__(Engine)
    base = SimpleNamespace(state={parameter: {"step": step}})
    vars(engine).update(_layout=layout, _parameters={"w": parameter}, _ema={}, _ema_decay=0.0, _base=base)
    parts = {"model": {"w": torch.ones(4)}}
    if kept:
        parts["optim"] = {f"{state}/w": torch.full((4,), 2.0) for state in pieces}
    engine.restore(parts, 30)
    assert torch.equal(parameter.data, torch.ones(4)) and step == (30 if kept else 0)
    assert all(bool((piece == (2.0 if kept else 0.0)).all()) for piece in pieces.values())
