import pytest
import torch
from torch import nn

from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.interface import BlockModel, Example
from dbtrain.method.levels import LogNormal
from dbtrain.method.objective import BlockObjective
from dbtrain.method.ranges import equal_shares

PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)


class Spy(BlockModel):
    """The smallest model behind the plug; it keeps what it was shown."""

    num_layers = 6

    def __init__(self, weighting="none"):
        super().__init__()
        self.noise = GaussianNoise(PAPER, 0.5, weighting)
        self.gain = nn.Parameter(torch.ones(1))

    def example(self, batch, draws=None):
        self.draws = draws
        return Example(batch["y"], batch["y"], batch["y"])

    def predict(self, layers, noisy, level, context):
        self.layers, self.noisy, self.level = layers, noisy, level
        return self.gain * noisy

    def loss(self, output, target):
        return (output - target).pow(2).mean(dim=-1)

    def denoised(self, output):
        return output


def run(model, layers=range(2, 4), low=0.1796, high=0.505, count=4000, key=5):
    objective = BlockObjective(model, layers, low, high, "fp32")
    return objective({"y": torch.zeros(count, 8)}, torch.tensor(key), torch.arange(count))


def test_a_block_is_trained_on_its_layers_and_its_slice_only():
    model = Spy()
    low, high = equal_shares(PAPER, 3).of(1)
    run(model, low=low, high=high)
    assert model.layers == range(2, 4)
    assert model.level.min() >= low * (1 - 1e-5) and model.level.max() <= high * (1 + 1e-5)
    # within the slice the levels follow the run's distribution: a third of its mass, evenly
    share = (PAPER.cdf(model.level.double()) * 3 - 1).sort().values
    assert torch.allclose(share, torch.linspace(0, 1, 4000, dtype=torch.float64), atol=0.04)


def test_the_loss_is_the_weighted_mean_over_the_samples():
    model = Spy()
    plain = run(model).detach()
    per_sample = model.noisy.detach().pow(2).mean(dim=-1)
    assert plain.shape == () and plain.dtype == torch.float32
    assert float(plain) == pytest.approx(float(per_sample.mean()), rel=1e-5)
    weighted = Spy("edm")
    expected = (weighted.noise.weight(model.level) * per_sample).mean()
    assert float(run(weighted).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_that_of_its_cuts():
    model, y = Spy(), torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    objective = BlockObjective(model, range(2), 0.1, 10.0, "fp32")
    with torch.no_grad():
        whole = objective({"y": y}, torch.tensor(3), torch.arange(12))
        cuts = [objective({"y": y[i]}, torch.tensor(3), i) for i in torch.arange(12).split(4)]
        other = objective({"y": y}, torch.tensor(4), torch.arange(12))
    assert float(whole) == pytest.approx(float(torch.stack(cuts).mean()), rel=1e-6)
    assert float(whole) != float(other)


def test_bf16_leaves_levels_noise_and_loss_in_float32():
    model = Spy()
    objective = BlockObjective(model, range(2), 0.1, 10.0, "bf16")
    loss = objective({"y": torch.zeros(4, 8)}, torch.tensor(0), torch.arange(4))
    assert (loss.dtype, model.level.dtype, model.noisy.dtype) == (torch.float32,) * 3


def test_compiled_it_gives_the_same_loss_and_gradient():
    losses, gradients = [], []
    for compiled in (False, True):
        model = Spy()
        objective = BlockObjective(model, range(2, 4), 0.1796, 0.505, "fp32")
        if compiled:
            objective.compile(backend="aot_eager")
        loss = objective({"y": torch.ones(4, 8)}, torch.tensor(3), torch.arange(4))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.gain.grad)
    assert torch.allclose(*losses)
    assert torch.allclose(*gradients)
