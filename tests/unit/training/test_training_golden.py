"""Averaged weights and learning rate beside their formulas, written out here."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dbtrain.run import schedule
from dbtrain.training.engine import Engine


@pytest.fixture
def averaged():
    """(engine, parameter) with averages of one parameter, which starts at (1, -2, 3)."""

    def make(decay):
        parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        engine = object.__new__(Engine)
        layout = SimpleNamespace(piece=lambda p, state: p.data)
        average = {"w": parameter.data.clone()}
        vars(engine).update(_layout=layout, _parameters={"w": parameter}, _ema=average, _ema_decay=decay)
        return engine, parameter

    return make


@pytest.mark.parametrize("decay", [0.999, 0.9, 0.5])
def test_averaged_weights_follow_their_formula(averaged, decay):
    """average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)) after t steps  # TensorFlow's
    ExponentialMovingAverage with num_updates."""
    engine, parameter = averaged(decay)
    wanted = [1.0, -2.0, 3.0]
    for t in range(1, 121):
        now = [math.sin(t), t / 10, -1.0 / t]
        parameter.data.copy_(torch.tensor(now))
        engine.update_ema(t)
        d = min(decay, (1 + t) / (10 + t))
        wanted = [d * before + (1 - d) * value for before, value in zip(wanted, now, strict=True)]
        assert engine._ema["w"].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5), t


def test_the_start_is_soon_forgotten(averaged):
    """Of the first weights 2/11 x 3/12 x ... is left: under 1e-4 after ten steps, and without a warm-up 0.99."""
    engine, parameter = averaged(0.999)
    share = 1.0
    for t in range(1, 11):
        parameter.data.zero_()
        engine.update_ema(t)
        share *= (1 + t) / (10 + t)
    assert share < 1e-4
    assert engine._ema["w"].tolist() == pytest.approx([share, -2 * share, 3 * share], rel=1e-4)


@pytest.mark.parametrize(("steps", "warmup", "final"), [(600, 100, 0.0), (97, 13, 0.1), (50, 0, 0.5), (1, 0, 0.0)])
def test_the_learning_rate_follows_its_formula(steps, warmup, final):
    for step in range(steps):
        if step < warmup:
            wanted = (step + 1) / warmup
        else:
            wanted = final + (1 - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert schedule.cosine(step, steps, warmup, final) == pytest.approx(wanted, rel=1e-12), step


def test_after_the_warm_up_it_is_pytorchs_cosine():
    steps, warmup, final = 200, 20, 0.05
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=final)
    for step in range(warmup, steps):
        assert schedule.cosine(step, steps, warmup, final) == pytest.approx(cosine.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        cosine.step()
