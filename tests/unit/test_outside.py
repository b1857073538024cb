"""An architecture and a noise process from outside the package, within one process: a class and a row each."""

from collections.abc import Mapping
from typing import Annotated

import pytest
import torch
from annotated_types import Ge, Le
from torch import nn
from torch.nn import functional

from dbtrain.config import load_config, parse_config
from dbtrain.config.model import model_section
from dbtrain.errors import ConfigError
from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.loading import all_blocks
from dbtrain.evaluation.losses import grid
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.metrics import metric_of
from dbtrain.method.draws import derive_seed
from dbtrain.method.interface import BlockModel, Example
from dbtrain.method.levels import LogUniform, read_distribution
from dbtrain.method.noise_processes import NOISE_PROCESSES
from dbtrain.method.ranges import equal_shares
from dbtrain.method.sampler import schedule
from dbtrain.method.split import global_name
from dbtrain.models.registry import ARCHITECTURES, architecture
from dbtrain.run.make_plan import design
from dbtrain.run.plan import level_name
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store

CPU = torch.device("cpu")


class Stem(nn.Module):
    def __init__(self, pixels, code, width):
        super().__init__()
        self.image, self.code, self.time = nn.Linear(pixels, width), nn.Linear(code, width), nn.Linear(1, width)

    def forward(self, image, code, time):
        return self.image(image.flatten(1)) + self.code(code) + self.time(time[:, None])


class Tower(BlockModel):
    """Classifier of images by residual layers without attention.

    Args:
        depth: layers of the whole model.
        width: of the hidden state,
            in all layers.
    """

    codes = "classes"
    takes = ("image",)
    noise_defaults: Mapping[str, object] = {"ranges": "uniform", "sigma_min": 0.2, "sigma_max": 5.0}
    classifies = True
    hides_target = True

    def __init__(
        self,
        *,
        codebook,
        noise,
        parametrisation,
        image,
        depth: Annotated[int, Ge(1)] = 3,
        width: Annotated[int, Ge(4), Le(512)] = 32,
        layers=None,
    ):
        super().__init__()
        self.num_layers, self.noise, self.parametrisation = depth, noise, parametrisation
        self.register_buffer("codebook", codebook, persistent=False)
        self.stem = Stem(image[0] * image[1] * image[2], codebook.shape[1], width)
        self.layers = nn.ModuleDict({str(i): nn.Linear(width, width) for i in layers or range(depth)})
        self.head = nn.Linear(width, len(codebook))

    @classmethod
    def check(cls, keys):
        if keys["width"] % 2:
            raise ConfigError(f"model.width={keys['width']} is odd")

    def example(self, batch, draws=None):
        return Example(self.codebook[batch["label"]], batch["image"], batch["label"])

    def predict(self, layers, noisy, level, context):
        own = self.parametrisation
        hidden = self.stem(context, own.scale_input(noisy, level), own.time(level))
        for i in layers:
            hidden = hidden + self.layers[str(i)](functional.silu(hidden))
        return self.head(hidden)

    def loss(self, output, target):
        return functional.cross_entropy(output, target, reduction="none")

    def denoised(self, output):
        return output.float().softmax(dim=-1) @ self.codebook


class LaplaceNoise:
    """y + b * noise of a Laplace distribution: heavier tails than Gaussian noise."""

    level_name = "b"
    noises = "vectors"
    policies = ("uniform",)
    own_settings = ()
    parametrisations: Mapping[str, str] = {}

    def __init__(self, distribution):
        self.distribution = distribution

    @staticmethod
    def plan(settings, target, measure):
        return {"kind": "loguniform", "sigma_min": settings.sigma_min, "sigma_max": settings.sigma_max}

    @staticmethod
    def make(spec, settings, target):
        return LaplaceNoise(read_distribution(spec))

    def level_shape(self, example):
        return ()

    def draw_uniforms(self, example, draws):
        return draws.uniform((), 0)

    def cdf(self, level):
        return self.distribution.cdf(level.double())

    def quantile(self, share):
        return self.distribution.quantile(share.double()).float()

    def split(self, blocks):
        return equal_shares(self.distribution, blocks)

    def schedule(self, ranges, steps_per_block):
        return schedule(ranges, self.distribution, steps_per_block)

    def corrupt(self, clean, level, draws):
        return clean + level[:, None] * self.noise(tuple(clean.shape[1:]), draws)

    @staticmethod
    def noise(shape, draws):
        half = draws.uniform(shape, 1) - 0.5
        return -half.sign() * (-2 * half.abs()).log1p()

    def weight(self, level):
        return torch.ones_like(level)

    def prior(self, shape, draws):
        return self.distribution.high * self.noise(shape, draws)

    def centre(self, prior):
        return torch.zeros_like(prior)

    def step(self, noisy, denoised, level, next_level, draws):
        return denoised + (next_level / level)[:, None] * (noisy - denoised)


BASE = {
    "name": "outside",
    "model": {"arch": "tower", "width": 24},
    "data": {"source": "digits"},
    "codebook": {"dim": 16},
    "training": {"steps": 4, "batch_size": 64},
}


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """As a program does before it calls: ``ARCHITECTURES["tower"] = Tower``; taken back after the test."""
    monkeypatch.setitem(ARCHITECTURES, "tower", Tower)
    monkeypatch.setitem(NOISE_PROCESSES, "laplace", LaplaceNoise)


@pytest.fixture(params=["gaussian", "laplace"])
def config(request, tmp_path):
    return load_config(None, [f"out={tmp_path}", f"noise.process={request.param}", *RANGE], base=BASE)


RANGE = ["noise.sigma_min=0.2", "noise.sigma_max=5"]


def never(*_):
    raise AssertionError("nothing here needs a calibration")


def trained(run_plan, data, steps=80):
    """Tensors of every block, each trained by itself."""
    made = []
    for block in range(run_plan.shards.blocks):
        objective, losses = run_plan.objective(block), []
        optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
        for step in range(steps):
            batch = data.train.batch((torch.arange(64) + 64 * step) % len(data.train), CPU)
            loss = objective(batch, torch.tensor(derive_seed(0, block, step)), torch.arange(64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        made.append({global_name(block, name): t for name, t in objective.model.state_dict().items()})
    return made


def test_both_are_trained_merged_and_evaluated_like_those_of_the_package(config, digits):
    run_plan = design(config, digits, never)
    assert run_plan.ranges == equal_shares(LogUniform(0.2, 5.0), 3)
    merged = MergedModel(run_plan, all_blocks(run_plan, trained(run_plan, digits).__getitem__, CPU), CPU)
    name, _ = metric_of(config)
    scores = accuracy(merged, digits.test, config.evaluation)
    assert name == "accuracy" and min(scores[readout] for readout in ("chain", "mean", "first")) > 0.7
    assert [owner for _, owner, boundary in grid(run_plan, 3) if not boundary] == [0, 1, 2]


def test_a_run_of_both_is_settled_and_read_back(config):
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    manifest = read_manifest(run)
    again = Run(run).plan
    assert again.config == config and again.config.content_hash() == config.content_hash()
    assert type(again.noise()) is type(design(config, again.data(), never).noise())
    assert (
        level_name(manifest) == again.noise().level_name == {"gaussian": "sigma", "laplace": "b"}[config.noise.process]
    )
    assert isinstance(again.model(1), Tower) and set(again.model(1).layers) == {"1"}


def test_the_keys_of_the_section_are_the_arguments_of_the_class():
    section = model_section("tower")
    assert set(section.model_fields) == {"arch", "depth", "loops", "width"}
    assert section.model_fields["width"].description == "Of the hidden state, in all layers."
    given = load_config(None, base=BASE)
    assert given.model.model_dump() == {"arch": "tower", "depth": 3, "loops": None, "width": 24}
    assert (given.noise.ranges, given.noise.sigma_max, given.noise.process) == ("uniform", 5.0, "gaussian")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=8", "unknown key model.widht; did you mean model.width?"),
        ("model.width=3", "model.width=3: .* be greater than or equal to 4"),
        ("model.width=7", "model.width=7 is odd"),
        ("model.width=513", "model.width=513: .* be less than or equal to 512"),
        ("model.arch=towr", "towr.*(none of|match any of).*tower"),
        ("noise.process=laplac", "noise.process='laplac' is none of .*laplace; did you mean laplace?"),
        ("evaluation.metric=bits", "evaluation.metric=bits does not fit model.arch=tower: set it to accuracy"),
    ],
)
def test_mistakes_are_told_as_of_those_of_the_package(override, message):
    with pytest.raises(ConfigError, match=message):
        metric_of(load_config(None, [override], base=BASE))


def test_a_row_may_say_where_to_import_a_class_from(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "other", "dbtrain.models.vit:ViT")
    assert architecture("other").__name__ == "ViT"
    given = load_config(None, base={**BASE, "model": {"arch": "other"}})
    assert parse_config(given.model_dump(mode="json"), "run.json") == given
