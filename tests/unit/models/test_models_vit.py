import math

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogUniform
from dbtrain.method.parametrisation import Direct
from dbtrain.models.registry import architecture
from dbtrain.models.vit import ViT

CODES = make_codebook("orthogonal", 10, 16, seed=0)


def vit(**changes):
    settings = {"image": (1, 8, 8), "depth": 6, "dim": 16, "heads": 4, "patch": 4}
    torch.manual_seed(0)
    return ViT(
        codebook=CODES,
        noise=GaussianNoise(LogUniform(0.1, 10.0)),
        parametrisation=Direct(0.25),
        **{**settings, **changes},
    )


def awake(**changes):
    """A model whose modulation is not at its start of zero."""
    model = vit(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    noisy, image = torch.randn(5, 16, generator=generator), torch.randn(5, 1, 8, 8, generator=generator)
    return noisy, torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0]), image


def groups(model):
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())  # nothing else is stored in a shard
    return {".".join(name.split(".")[: 2 if name.startswith("layers.") else 1]) for name in names}


def test_parameters_lie_in_the_three_groups_and_the_codebook_is_none():
    model = vit()
    assert groups(model) == {"stem", "head", *(f"layers.{i}" for i in range(6))}
    assert not model.get_buffer("codebook").requires_grad


def test_a_block_holds_its_own_layers_under_their_numbers_in_the_whole_model():
    block, whole = vit(layers=range(2, 4)), vit()
    assert groups(block) == {"stem", "head", "layers.2", "layers.3"}
    assert block.num_layers == 6
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    assert all(shapes[name] == tensor.shape for name, tensor in block.state_dict().items())


def test_layers_are_the_identity_at_the_start(inputs, before_head):
    model = vit()
    stem_only, _ = before_head(model, range(0), *inputs)
    assert torch.equal(before_head(model, range(6), *inputs)[0], stem_only)
    assert not torch.equal(awake().predict(range(6), *inputs), awake().predict(range(0), *inputs))


def test_the_loss_at_the_start_is_that_of_guessing(inputs):
    model = vit()
    noisy, level, image = inputs
    output = model.predict(range(6), *inputs)
    loss = model.loss(output, torch.arange(5))
    assert output.shape == (5, 10) and loss.shape == (5,)
    assert loss.tolist() == pytest.approx([math.log(10)] * 5)


def test_a_prediction_applies_its_range_of_layers_in_order(inputs, before_head):
    model = awake()
    noisy, level, image = inputs
    hidden, condition = model.stem(
        image, model.parametrisation.scale_input(noisy, level), model.parametrisation.time(level)
    )
    for i in (2, 3):
        hidden = model.layers[str(i)](hidden, condition)
    got = before_head(model, range(2, 4), *inputs)
    assert torch.equal(got[0][:, 0], hidden[:, 0]) and torch.equal(got[1], condition)
    assert torch.equal(model.predict(range(2, 4), *inputs), model.head(hidden[:, :1], condition)[:, 0])
    assert not torch.allclose(got[0], before_head(model, range(3, 5), *inputs)[0])
    assert not torch.allclose(got[0], before_head(model, range(2, 3), *inputs)[0])


def test_the_weights_of_a_block_compute_the_same_inside_the_whole_model(inputs):
    whole = awake()
    block = vit(layers=range(2, 4)).eval()
    block.load_state_dict({name: whole.state_dict()[name] for name in block.state_dict()})
    assert torch.equal(block.predict(range(2, 4), *inputs), whole.predict(range(2, 4), *inputs))


def test_the_output_depends_on_image_code_and_level(inputs):
    model = awake()
    noisy, level, image = inputs

    def logits(*changed):
        return model.predict(range(6), *changed)

    base = logits(noisy, level, image)
    for changed in ((noisy + 1, level, image), (noisy, level * 2, image), (noisy, level, image + 1)):
        assert not torch.allclose(base, logits(*changed))


def test_denoised_is_the_expected_code():
    model, logits = vit(), torch.full((2, 10), -1000.0)
    logits[0, 7] = 0.0
    logits[1, 2] = logits[1, 3] = 0.0
    expected = torch.stack([CODES[7], (CODES[2] + CODES[3]) / 2])
    assert torch.allclose(model.denoised(logits), expected, atol=1e-6)
    assert model.denoised(logits.bfloat16()).dtype == torch.float32


def test_example_noises_the_code_of_the_label():
    image, label = torch.zeros(3, 1, 8, 8), torch.tensor([9, 0, 9])
    example = vit().example({"image": image, "label": label})
    assert torch.equal(example.clean, CODES[label]) and example.context is image and example.target is label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "model.patch=3 does not divide the 8x8"),
        ({"patch": 16}, "model.patch=16"),
        ({"image": (1, 8, 6)}, "8x6"),
        ({"heads": 5}, "model.dim=16 is not a multiple of model.heads=5"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        vit(**changes)


def test_neighbouring_levels_stay_apart_under_autocast(inputs):
    model = awake()
    c_noise = torch.tensor([0.5, 0.5005])
    with torch.autocast("cpu", torch.bfloat16):
        embedded = model.stem.level(c_noise)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, model.stem.level(c_noise)) and not torch.equal(embedded[0], embedded[1])


def test_an_unknown_architecture_is_refused_with_those_there_are():
    assert architecture("vit") is ViT
    with pytest.raises(ConfigError, match=r"model.arch='resnet' is none of .*vit"):
        architecture("resnet")
