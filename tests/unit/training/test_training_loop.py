import importlib
import math
import sys
from types import ModuleType

import pytest
import torch

from dbtrain.config import TrainingConfig
from dbtrain.errors import NonFiniteLossError
from dbtrain.run.schedule import cosine, schedule_of

ENGINE, LOOP = "dbtrain.training.engine", "dbtrain.training.loop"


@pytest.fixture(scope="module")
def train():
    """The loop without DeepSpeed, which takes seconds to import and which the loop only names as a type."""
    bare = ENGINE not in sys.modules
    if bare:
        sys.modules[ENGINE] = ModuleType(ENGINE)
        sys.modules[ENGINE].Engine = object
    yield importlib.import_module(LOOP).train
    if bare:
        del sys.modules[ENGINE], sys.modules[LOOP]


class Run:
    """Engine, batches and observer in one; micro-batch m of step s is the pair (s, m)."""

    def __init__(self, micro=1, losses=None, stop_after=None, norms=None, wrong_after=None):
        self.micro, self.losses, self.stop_after = micro, losses or {}, stop_after
        self.norms, self.wrong_after = norms or {}, wrong_after
        self.trained, self.commits, self.reports, self.rates, self.averaged, self.begun = [], [], [], [], [], []
        self.norm_is_of_gradient, self.told, self.validated = True, [], []

    def micro_batches(self, step):
        return iter([(step, m) for m in range(self.micro)])

    def accumulate(self, step, micro):
        self.trained.append((step, micro))
        return torch.tensor(self.losses.get((step, micro), 1.0 + step))

    @property
    def gradient_norm(self):
        step = self.trained[-1][0]
        return torch.tensor(self.norms.get(step, 10.0 * (step + 1)))

    def non_finite(self):
        at = self.wrong_after
        return "the optimizer's exp_avg of w" if at is not None and self.trained[-1][0] >= at else None

    def set_lr(self, scale):
        self.rates.append(scale)

    def update_ema(self, step):
        self.averaged.append(step)

    def snapshot(self):
        return {"model": {"steps": torch.tensor(len({step for step, _ in self.trained}))}}

    def before_step(self, step):
        self.begun.append(step)

    def see_loss(self, step, loss):
        return loss

    def progress(self, step, report):
        self.reports.append((step, report.loss, report.steps))
        self.told.append((step, report.lr, report.grad_norm))

    def validate(self, step):
        self.validated.append((step, self.committed[-1] if self.commits else 0))

    def commit(self, step, take, loss):
        self.commits.append((step, int(take()["model"]["steps"]), loss))

    def should_stop(self, step):
        return self.stop_after is not None and step >= self.stop_after

    def go(self, train, start=0, schedule=None, **settings):
        config = TrainingConfig(**{"steps": 10, "checkpoint_every": 4, "log_every": 3, **settings})
        return train(self, self, config, schedule or schedule_of(config, (), 0), start, self, self.should_stop)

    @property
    def committed(self):
        return [step for step, _, _ in self.commits]


def test_every_step_is_trained_once_and_commits_fall_on_their_steps_and_on_the_last(train):
    run = Run(micro=3)
    assert run.go(train) == "done"
    assert run.trained == [(step, m) for step in range(10) for m in range(3)]
    assert run.begun == list(range(10)) and run.averaged == list(range(1, 11))
    # the snapshot of a commit is the state after as many steps as its number says
    assert [(step, steps) for step, steps, _ in run.commits] == [(4, 4), (8, 8), (10, 10)]


def test_reports_have_the_mean_loss_of_every_step_since_the_last(train):
    run = Run()
    run.go(train)
    assert run.reports == [(3, 2.0, 3), (4, 4.0, 1), (6, 5.5, 2), (8, 7.5, 2), (9, 9.0, 1), (10, 10.0, 1)]
    assert sum(steps for _, _, steps in run.reports) == 10


def test_reports_have_the_rate_and_the_gradient_norm_of_their_last_step(train):
    run = Run(stop_after=5)
    run.go(train, optimizer={"lr": 0.5, "warmup": 10})
    assert run.told == [
        (3, pytest.approx(0.15), 30.0),
        (4, pytest.approx(0.2), 40.0),
        (5, pytest.approx(0.25), 50.0),
    ]


def test_a_norm_that_is_not_of_the_gradient_is_not_reported(train):
    run = Run()
    run.norm_is_of_gradient = False
    run.go(train)
    assert [norm for _, _, norm in run.told] == [None] * 6


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(train):
    run = Run(micro=2, losses={(0, 0): 1.0, (0, 1): 4.0})
    run.go(train, steps=1)
    assert run.reports == [(1, 2.5, 1)] and run.commits == [(1, 1, 2.5)]


def test_a_resumed_block_trains_what_is_left_with_the_rates_of_those_steps(train):
    run, whole = Run(), Run()
    whole.go(train)
    assert run.go(train, start=8) == "done"
    assert run.trained == [(8, 0), (9, 0)] and run.committed == [10]
    assert run.rates == whole.rates[8:]


def test_the_step_before_the_decay_is_committed_so_that_an_extension_can_go_on_from_it(train):
    run = Run()
    run.go(train, optimizer={"schedule": "wsd", "decay": 0.3, "warmup": 2})
    assert run.committed == [4, 7, 8, 10]
    assert run.rates[1:8] == [1.0] * 7 and 1 > run.rates[8] > run.rates[9] > 0


def test_a_block_is_measured_before_the_commit_of_its_step_and_at_the_end(train):
    run, plain = Run(), Run()
    run.go(train, validate_every=4)
    plain.go(train)
    assert run.validated == [(4, 0), (8, 4), (10, 8)] and plain.validated == []
    assert (run.trained, run.commits, run.reports) == (plain.trained, plain.commits, plain.reports)


def test_a_block_that_is_asked_to_leave_is_not_measured_first(train):
    run = Run(stop_after=4)
    run.go(train, validate_every=4)
    assert run.validated == [] and run.committed == [4]


def test_the_time_of_a_measurement_is_not_that_of_the_steps(train, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(f"{LOOP}.time.monotonic", lambda: now[0])
    run, seconds = Run(), []
    run.validate = lambda step: now.__setitem__(0, now[0] + 100.0)
    run.before_step = lambda step: now.__setitem__(0, now[0] + 1.0)
    run.progress = lambda step, report: seconds.append(report.seconds)
    run.go(train, validate_every=1)
    assert seconds == [3.0, 1.0, 2.0, 2.0, 1.0, 1.0]


def test_a_block_that_is_at_its_end_trains_nothing(train):
    run = Run()
    assert run.go(train, start=10) == "done"
    assert not run.trained and not run.commits


@pytest.mark.parametrize("after", [1, 4, 5, 9])
def test_a_stop_request_commits_that_step_and_leaves(train, after):
    run = Run(stop_after=after)
    assert run.go(train) == "stopped"
    assert run.begun == list(range(after)) and run.committed[-1] == after
    assert sorted(set(run.committed)) == run.committed  # none twice


def test_a_stop_request_at_the_last_step_is_no_reason_not_to_be_done(train):
    run = Run(stop_after=10)
    assert run.go(train) == "done" and run.committed == [4, 8, 10]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad", range(12))
def test_a_loss_that_is_not_finite_names_its_step_and_nothing_after_it_is_committed(train, bad, value):
    run = Run(micro=2, losses={(bad, 1): value} | {(step, 0): math.nan for step in range(bad + 1, 12)})
    with pytest.raises(NonFiniteLossError, match=rf"the loss of step {bad + 1} is {value};"):
        run.go(train, steps=12, checkpoint_every=5, log_every=7)
    assert run.committed == [step for step in (5, 10) if step <= bad]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", range(12))
def test_a_gradient_that_is_not_finite_names_its_step_and_nothing_after_it_is_committed(train, bad, value):
    run = Run(norms={bad: value})  # that of one step: the next ones go on as if nothing had been
    with pytest.raises(NonFiniteLossError, match=rf"the gradient norm of step {bad + 1} is {value};"):
        run.go(train, steps=12, checkpoint_every=5, log_every=7)
    assert run.committed == [step for step in (5, 10) if step <= bad]


@pytest.mark.parametrize("bad", range(12))
def test_what_would_be_committed_and_is_not_finite_is_named_and_not_committed(train, bad):
    run = Run(wrong_after=bad)
    with pytest.raises(NonFiniteLossError, match=r"the optimizer's exp_avg of w is not finite after step \d+"):
        run.go(train, steps=12, checkpoint_every=5, log_every=7)
    assert run.committed == [step for step in (5, 10) if step <= bad]


def test_the_rate_warms_up_to_its_peak_and_falls_to_the_end():
    rates = [cosine(step, 100, 10, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_rate_without_warm_up_begins_at_its_peak_and_can_stay_there():
    assert cosine(0, 10, 0, 0.0) == 1
    assert [cosine(step, 10, 0, 1.0) for step in range(10)] == [1.0] * 10
    assert [cosine(step, 3, 5, 0.0) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])
