"""Steps by schedulers of diffusers: the same ones as ours where they must be, and each level by its own block."""

import importlib
import math
import sys
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.config.evaluation import AnySolver
from dbtrain.errors import ConfigError
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.images.schedulers import SCHEDULERS, check_solver
from dbtrain.evaluation.metrics import metric_of
from dbtrain.method.sampler import spaced_levels
from dbtrain.run.make_plan import design
from dbtrain.run.merge import merge
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.unit.small_runs import BASE, commit, never

MEAN, STD = 0.7, 0.5
SHAPE = (1, 8, 8)
SMALL = {
    "name": "toy",
    "model": {"arch": "dit", "depth": 3, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
}
NOISES = {"gaussian": {"ranges": "paper"}, "flow": {"process": "flow", "shift": 3.0}}
PAIRS = [(name, process) for name, row in SCHEDULERS.items() for process in NOISES if getattr(row, process)]


class Exact:
    """The exact denoiser of pixels ~ N(MEAN, STD^2), which keeps what it is asked."""

    def __init__(self, process):
        self.flow, self.asked = process == "flow", []

    def predict(self, layers, noisy, level, context):
        self.asked.append((layers, level[0].item()))
        t = level[:, None, None, None]
        near, far = (1 - t, t) if self.flow else (torch.ones_like(t), t)
        # E[y | z] with z = near y + far eps
        return MEAN + STD**2 * near * (noisy - near * MEAN) / (near**2 * STD**2 + far**2)

    def denoised(self, output):
        return output


@pytest.fixture(scope="module")
def plans():
    data = load_data(load_config(None, base=SMALL))
    return {
        name: design(load_config(None, base={**SMALL, "noise": noise}), data, never) for name, noise in NOISES.items()
    }


def drawn(run_plan, solver, levels, process):
    model = Exact(process)
    labels = torch.arange(64) % 10
    return draw(run_plan, lambda block: model, labels, SHAPE, Sampling(tuple(levels), solver), 64), model.asked


def levels_of(run_plan, steps):
    return spaced_levels(run_plan.noise(), run_plan.ranges, steps, "karras")


@pytest.mark.parametrize(
    ("solver", "process"),
    [
        ("FlowMatchEulerDiscreteScheduler", "flow"),
        ("FlowMatchEulerDiscreteScheduler", "gaussian"),
        ("EulerDiscreteScheduler", "gaussian"),
    ],
)
def test_an_euler_step_of_theirs_is_one_of_ours(plans, solver, process):
    levels = levels_of(plans[process], 12)
    ours, theirs = (drawn(plans[process], name, levels, process)[0] for name in ("euler", solver))
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert float((ours - MEAN).std()) > 0.3


def exact(run_plan, levels, process):
    """The estimate at the last level on the exact path of the ODE from the samplers' own start."""
    model = Exact(process)
    first = []

    def predict(layers, noisy, level, context):
        first.append(noisy)
        return Exact.predict(model, layers, noisy, level, context)

    asked = Exact(process)
    asked.predict = predict
    draw(run_plan, lambda block: asked, torch.arange(64) % 10, SHAPE, Sampling((levels[0],)), 64)
    noisy, high, low = first[0], levels[0], levels[-1]

    def parts(level):
        near = 1 - level if process == "flow" else 1.0
        return near, math.hypot(near * STD, level)

    (near_high, width_high), (near_low, width_low) = parts(high), parts(low)
    at_last = near_low * MEAN + width_low / width_high * (noisy - near_high * MEAN)
    return Exact(process).predict((), at_last, torch.full((64,), low), None)


@pytest.mark.parametrize(("solver", "process"), [pair for pair in PAIRS if "Multistep" in pair[0]])
def test_a_multistep_scheduler_is_nearer_to_the_exact_path_than_euler(plans, solver, process):
    run_plan = plans[process]
    levels = levels_of(run_plan, 20)
    path = exact(run_plan, levels, process)
    errors = [float((drawn(run_plan, name, levels, process)[0] - path).abs().mean()) for name in ("euler", solver)]
    assert errors[1] < 0.5 * errors[0] < 0.1


BESIDE = {
    "at": lambda edge: edge,
    "above": lambda edge: math.nextafter(edge, math.inf),
    "below": lambda edge: math.nextafter(edge, 0),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(("solver", "process"), [*PAIRS, *((s, p) for s in ("euler", "heun") for p in NOISES)])
def test_each_level_at_and_beside_an_edge_is_asked_of_its_owner(plans, solver, process, beside):
    run_plan = plans[process]
    edges = run_plan.ranges.edges
    between = [(high + 3 * low) / 4 for high, low in zip(edges, edges[1:], strict=False)]
    levels = sorted([edges[0], *map(BESIDE[beside], edges[1:-1]), *between], reverse=True)
    samples, asked = drawn(run_plan, solver, levels, process)
    assert samples.isfinite().all()
    # Heun asks for the end of a step, and then again there for the next one
    twice = [levels[0], *(level for level in levels[1:] for _ in range(2))]
    wanted = twice if solver == "heun" else levels
    # of an edge the block above it is the owner just above, and the one below it at the edge itself
    owners = [run_plan.runs(next(b for b in range(3) if level > edges[b + 1])) for level in wanted]
    assert [layers for layers, _ in asked] == owners
    assert [level for _, level in asked] == [torch.tensor(level).item() for level in wanted]


def test_the_configuration_names_those_that_there_are():
    assert set(get_args(AnySolver)) == {"euler", "heun", *SCHEDULERS}


def test_what_does_not_fit_or_is_not_installed_is_refused_before_anything_is_drawn(monkeypatch):
    with pytest.raises(ConfigError, match=r"EulerDiscreteScheduler does not fit noise.process=flow: take FlowMatch"):
        check_solver("EulerDiscreteScheduler", "flow")
    config = load_config(None, ["evaluation.solver=EulerDiscreteScheduler"], base={**SMALL, "noise": NOISES["flow"]})
    with pytest.raises(ConfigError, match=r"does not fit noise.process=flow"):
        metric_of(config)
    with pytest.raises(ConfigError, match=r"evaluation.solver"):
        load_config(None, ["evaluation.solver=EulerDiscreteSheduler"], base=SMALL)
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_unipc_multistep", None)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"needs the extra packages of dbtrain\[diffusers\] .*: install them"):
        check_solver("UniPCMultistepScheduler", "gaussian")


def test_the_command_draws_by_one(tmp_path):
    model = {**BASE["model"], "arch": "dit"}
    config = load_config(None, [f"out={tmp_path}"], base={**BASE, "model": model, "noise": {"process": "flow"}})
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    commit(run)
    merge(Run(run))
    line = ["sample", run.url, "--count", "4", "--steps", "6", "--solver"]
    result = CliRunner().invoke(cli.app, [*line, "DPMSolverMultistepScheduler"])
    assert result.exit_code == 0 and (tmp_path / "toy" / "samples.png").is_file(), result.output
    result = CliRunner().invoke(cli.app, [*line, "EulerDiscreteScheduler"])
    assert result.exit_code == 2 and "does not fit noise.process=flow" in " ".join(result.output.split())
