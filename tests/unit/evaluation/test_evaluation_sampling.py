import math

import pytest
import torch

from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.residency import ResidentBlocks
from dbtrain.method.sampler import guide, spaced_levels
from dbtrain.method.split import global_name
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data

SMALL = {
    "name": "toy",
    "model": {"arch": "dit", "depth": 3, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
}
CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
MEAN, STD = 0.3, 0.5


class Gaussian(torch.nn.Module):
    """The exact denoiser of pixels ~ N(0.3 * (class - 4.5), 0.5^2), which are N(0, 0.5^2) if no class is told."""

    def predict(self, layers, noisy, level, context):
        mean = torch.where(context == 10, 0.0, MEAN * (context - 4.5))
        sigma, mean = level[:, None, None, None], mean[:, None, None, None]
        return (STD**2 * noisy + sigma**2 * mean) / (STD**2 + sigma**2)

    def denoised(self, output):
        return output

    def unconditional(self, context):
        return torch.full_like(context, 10)


@pytest.fixture(scope="module")
def data():
    return load_data(load_config(None, base=SMALL))


@pytest.fixture
def run_plan(data):
    return design(load_config(None, base=SMALL), data, lambda *_: {})


@pytest.fixture
def weights(run_plan):
    """Tensors of each block by global name, with a modulation that is not zero."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for block in range(3):
        state = run_plan.model(block).state_dict()
        made.append(
            {global_name(block, n): t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        )
    return made


def levels_of(run_plan, steps, spacing):
    return spaced_levels(run_plan.noise(), run_plan.ranges, steps, spacing)


def gaussian_error(run_plan, steps, solver):
    """Greatest distance of a sample to the end of its exact trajectory."""
    labels = torch.arange(20) % 10
    levels = levels_of(run_plan, steps, "karras")
    seen = []

    class Watch(Gaussian):
        def predict(self, layers, noisy, level, context):
            seen.append(noisy)
            return super().predict(layers, noisy, level, context)

    samples = draw(run_plan, lambda _: Watch(), labels, SHAPE, Sampling(levels, solver), 20)
    mean = (MEAN * (labels - 4.5))[:, None, None, None]
    exact = mean + (seen[0] - mean) * STD / math.sqrt(STD**2 + 80.0**2)
    return float((samples - exact).abs().max())


def test_samples_of_an_exact_denoiser_converge_to_its_distribution(run_plan):
    euler, heun = ([gaussian_error(run_plan, n, solver) for n in (18, 36, 72)] for solver in ("euler", "heun"))
    assert euler[0] > 1.7 * euler[1] > 2.8 * euler[2]  # first order
    assert heun[0] > 3 * heun[1] > 9 * heun[2]  # second order
    assert heun[2] < 0.01 and all(h < e for h, e in zip(heun, euler, strict=True))
    labels = torch.full((200,), 7)
    samples = draw(
        run_plan, lambda _: Gaussian(), labels, SHAPE, Sampling(levels_of(run_plan, 72, "karras"), "heun"), 64
    )
    # 12,800 pixels
    assert float(samples.mean()) == pytest.approx(MEAN * 2.5, abs=0.015)
    assert float(samples.std()) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_moves_the_mean_by_its_scale(run_plan, scale):
    """Of two Gaussians of one width the guided denoiser is that of a Gaussian at scale times the mean."""
    plan = Sampling(levels_of(run_plan, 72, "karras"), "heun", scale)
    samples = draw(run_plan, lambda _: Gaussian(), torch.full((200,), 7), SHAPE, plan, 200)
    # the start, of mean zero, is not quite that of the data's noise at sigma_max
    assert float(samples.mean()) == pytest.approx(scale * MEAN * 2.5 * (1 - STD / 80), abs=0.008)
    assert float(samples.std()) == pytest.approx(STD, abs=0.01)


def test_guidance_is_linear_between_and_beyond_both_estimates():
    told, free = torch.tensor([3.0]), torch.tensor([1.0])
    assert [float(guide(told, free, scale)) for scale in (0, 1, 2, 4)] == [1.0, 3.0, 5.0, 9.0]


def test_each_block_is_read_once_however_many_batches_there_are(run_plan, weights):
    loads = []

    def load(block):
        loads.append(block)
        return weights[block]

    for solver in ("euler", "heun"):
        loads.clear()
        blocks = ResidentBlocks(run_plan, load, CPU)
        plan = Sampling(levels_of(run_plan, 9, "slices"), solver, 2.0)
        drawn = draw(run_plan, blocks.__getitem__, torch.arange(10), SHAPE, plan, 4)
        # three batches, and yet each block is read once
        assert loads == [0, 1, 2] and blocks.reads == 3
        assert drawn.shape == (10, 1, 8, 8) and drawn.isfinite().all()


def test_a_sample_is_a_function_of_seed_and_number_however_the_batches_are_cut(run_plan, weights):
    blocks = ResidentBlocks(run_plan, weights.__getitem__, CPU)
    labels, levels = torch.arange(10), levels_of(run_plan, 6, "slices")

    def drawn(seed=0, batch_size=10, **changes):
        return draw(run_plan, blocks.__getitem__, labels, SHAPE, Sampling(levels, seed=seed, **changes), batch_size)

    whole = drawn()
    assert torch.equal(whole, drawn())
    assert torch.allclose(whole, drawn(batch_size=3), atol=1e-5)
    assert not torch.allclose(whole, drawn(seed=1), atol=0.1)
    # the controls do change something
    for changes in ({"order": (1, 2, 0)}, {"scrambled": True}, {"guidance": 2.0}):
        assert not torch.allclose(whole, drawn(**changes), atol=1e-4)


def test_each_level_is_asked_of_its_owner_and_a_control_of_another(run_plan):
    asked = []

    def block_at(block):
        asked.append(block)
        return Gaussian()

    levels = levels_of(run_plan, 6, "slices")
    draw(run_plan, block_at, torch.arange(2), SHAPE, Sampling(levels), 2)
    assert asked == [0, 0, 1, 1, 2, 2]
    asked.clear()
    draw(run_plan, block_at, torch.arange(2), SHAPE, Sampling(levels, order=(1, 2, 0)), 2)
    assert asked == [1, 1, 2, 2, 0, 0]


def test_blending_averages_the_blocks_that_were_trained_at_a_level(run_plan):
    first, second = run_plan.ranges.edges[1:3]

    class Constant(Gaussian):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def predict(self, layers, noisy, level, context):
            return torch.full_like(noisy, self.value)

    def last(level, blend):
        made = [Constant(10.0**block) for block in range(3)]
        return float(
            draw(run_plan, made.__getitem__, torch.arange(1), SHAPE, Sampling((level,), blend=blend), 1)[0, 0, 0, 0]
        )

    # a slice is widened by a share of its own width: block 2, the widest, reaches further up than block 1 down
    cases = {80.0: (1, 1), first * 1.01: (1, 5.5), first * 0.99: (10, 5.5), first * 0.7: (10, 10),
             second * 1.1: (10, 55), second * 0.97: (100, 55), second * 0.9: (100, 100), 0.002: (100, 100)}  # fmt: skip
    for level, (plain, blended) in cases.items():
        assert (last(level, False), last(level, True)) == (plain, blended), level


def test_scrambled_classes_are_those_of_others_and_new_at_every_level(run_plan):
    told = []

    class Watch(Gaussian):
        def predict(self, layers, noisy, level, context):
            told.append(context)
            return super().predict(layers, noisy, level, context)

    labels, plan = torch.arange(10), Sampling(levels_of(run_plan, 3, "slices"), scrambled=True)
    draw(run_plan, lambda _: Watch(), labels, SHAPE, plan, 10)
    assert all(torch.equal(context.sort().values, labels) for context in told)
    assert not any((context == labels).any() for context in told) and not torch.equal(told[0], told[1])
    whole = list(told)
    told.clear()
    # a batch may be of one class, or of one sample: others are those of all samples
    draw(run_plan, lambda _: Watch(), labels, SHAPE, plan, 3)
    assert all(torch.equal(torch.cat(told[4 * i : 4 * i + 4]), context) for i, context in enumerate(whole))


def test_schedules_span_the_range_and_fall(run_plan):
    for spacing in ("karras", "slices"):
        levels = levels_of(run_plan, 12, spacing)
        assert len(levels) == 12 and levels[0] == pytest.approx(80.0)
        assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
    owners = run_plan.ranges.block_of(torch.tensor(levels_of(run_plan, 12, "slices"), dtype=torch.float64))
    assert owners.bincount().tolist() == [4, 4, 4]
    with pytest.raises(ConfigError, match="50 steps cannot be shared evenly by 3 slices"):
        levels_of(run_plan, 50, "slices")
