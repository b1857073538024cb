import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import EDM
from dbtrain.method.split import global_name, local_name, split_evenly
from dbtrain.models.dit import DiT

NOISE = GaussianNoise(LogNormal(-1.2, 1.2, 0.002, 80.0), 0.5, "edm")
OWN = EDM(0.5)
LEVELS = torch.tensor([0.002, 0.1, 0.5, 5.0, 80.0])


def dit(**changes):
    settings = {"image": (3, 8, 4), "classes": 10, "depth": 6, "dim": 16, "heads": 4, "patch": 2}
    torch.manual_seed(0)
    return DiT(noise=NOISE, parametrisation=OWN, **{**settings, **changes})


def awake(**changes):
    """A model whose modulation is not at its start of zero."""
    model = dit(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(5, 3, 8, 4, generator=generator), LEVELS, torch.tensor([0, 3, 9, 3, 10])


def groups(model):
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())  # nothing else is stored in a shard
    return {".".join(name.split(".")[: 2 if name.startswith("layers.") else 1]) for name in names}


def test_a_block_holds_a_stem_a_head_and_its_own_layers_under_their_numbers():
    assert groups(dit()) == {"stem", "head", *(f"layers.{i}" for i in range(6))}
    assert groups(dit(layers=range(2, 4))) == {"stem", "head", "layers.2", "layers.3"}
    assert dit(layers=range(2, 4)).num_layers == 6


def test_at_the_start_the_network_adds_nothing_to_the_skip_connection(inputs, before_head):
    model = dit()
    noisy, level, _ = inputs
    assert torch.equal(*(before_head(model, range(count), *inputs)[0] for count in (6, 0)))
    output = model.predict(range(6), *inputs)
    skip = 0.25 / (level**2 + 0.25)  # EDM, Table 1
    assert torch.allclose(output, skip[:, None, None, None] * noisy, rtol=1e-5)


def test_the_weighted_loss_at_the_start_is_one_at_every_level():
    """EDM's weight and preconditioning make it so for data of the standard deviation sigma_data."""
    model, count = dit(), 256
    clean = 0.5 * torch.randn(count, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    for value in LEVELS:
        level = value.expand(count)
        noisy = NOISE.corrupt(clean, level, Draws(torch.tensor(1), torch.arange(count)))
        context = torch.zeros(count, dtype=torch.int64)
        with torch.no_grad():
            loss = model.loss(model.predict(range(6), noisy, level, context), clean)
        assert loss.shape == (count,)
        assert float((NOISE.weight(level) * loss).mean()) == pytest.approx(1.0, abs=0.03)


def test_each_patch_of_the_output_stands_where_its_token_read_the_input():
    model = dit(depth=1)
    with torch.no_grad():
        # a token carries its patch: the first 12 of 16 channels are its pixels, and the head hands them back
        model.stem.patches.weight.copy_(torch.eye(16)[:, :12].reshape(16, 3, 2, 2))
        model.stem.patches.bias.zero_()
        model.stem.positions.zero_()
        model.head.norm = torch.nn.Identity()
        model.head.linear.weight.copy_(torch.eye(16)[:12])
    noisy, level = torch.arange(2 * 96.0).reshape(2, 3, 8, 4), torch.ones(2)
    got = model.predict(range(1), noisy, level, torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(got, OWN.estimate(OWN.scale_input(noisy, level), noisy, level), rtol=1e-5)


def test_the_output_depends_on_image_level_and_class(inputs, before_head):
    model = awake()
    noisy, level, label = inputs

    def output(*changed):
        # raw, without the skip connection, which depends on image and level by itself
        return model.head(*before_head(model, range(6), *changed))

    base = output(noisy, level, label)
    for changed in ((noisy + 1, level, label), (noisy, level * 2, label), (noisy, level, (label + 1) % 11)):
        assert not torch.allclose(base, output(*changed))
    assert torch.equal(model.unconditional(label), torch.full((5,), 10))
    assert not torch.allclose(base[0], output(noisy, level, model.unconditional(label))[0])
    with pytest.raises(ConfigError, match="guidance needs a model that was trained with model.label_dropout"):
        awake(label_dropout=0.0).unconditional(label)


def test_split_into_blocks_and_put_together_again_is_bitwise_the_same(inputs):
    split = split_evenly(6, 3)
    noisy, level, _ = inputs
    blocks = [awake(layers=split.layers(b)) for b in range(3)]
    merged = {global_name(b, n): t for b, block in enumerate(blocks) for n, t in block.state_dict().items()}
    assert len(merged) == sum(len(block.state_dict()) for block in blocks)
    for b, block in enumerate(blocks):
        again = dit(layers=split.layers(b)).eval()
        own = set(block.state_dict())
        again.load_state_dict({name: merged[global_name(b, name)] for name in own})
        assert {local_name(b, global_name(b, name)) for name in own} == own
        expected = block.predict(split.layers(b), *inputs)
        assert torch.equal(again.predict(split.layers(b), *inputs), expected)


def draws(step, positions):
    return Draws(torch.tensor(derive_seed(0, "noise", 1, step)), positions)


def hidden(model, step, positions):
    batch = {"image": torch.zeros(len(positions), 3, 8, 4), "label": torch.full((len(positions),), 4)}
    context = model.example(batch, draws(step, positions)).context
    assert set(context.tolist()) <= {4, 10}
    return context == 10


def test_labels_are_hidden_at_the_given_rate_and_only_in_training():
    positions = torch.arange(20_000)
    assert float(hidden(dit(), 0, positions).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert not hidden(dit(label_dropout=0.0), 0, positions).any()
    batch = {"image": torch.zeros(3, 3, 8, 4), "label": torch.tensor([1, 2, 3])}
    example = dit(label_dropout=0.9).example(batch)
    assert example.context is batch["label"] and example.clean is batch["image"] and example.target is batch["image"]


def test_which_labels_are_hidden_is_a_function_of_step_and_position_however_the_batch_is_cut():
    model, positions = dit(label_dropout=0.5), torch.arange(64)
    whole = hidden(model, 7, positions)
    assert torch.equal(whole, torch.cat([hidden(model, 7, part) for part in positions.split(16)]))
    assert not torch.equal(whole, hidden(model, 8, positions))
    # levels are other draws of the same step: a hidden label does not tell the level
    levels = draws(7, positions).uniform((), 0)
    assert not torch.equal(whole, levels < 0.5)


def test_the_objective_hides_labels():
    model = dit(label_dropout=0.5)
    seen = []
    model.stem.classes.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    objective = BlockObjective(model, range(6), 0.002, 80.0, "fp32")
    batch = {"image": torch.zeros(64, 3, 8, 4), "label": torch.full((64,), 4)}
    objective(batch, torch.tensor(derive_seed(0, "noise", 1, 7)), torch.arange(64)).backward()
    assert torch.equal(seen[0] == 10, hidden(model, 7, torch.arange(64)))


def test_under_bf16_the_output_stays_float32_and_close(inputs):
    model = awake()
    noisy, level, _ = inputs
    exact = model.predict(range(6), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.predict(range(6), *inputs)
    assert rounded.dtype == torch.float32
    # at the least noise D is z itself to 0.2 %, whatever the network's precision
    assert torch.allclose(rounded[0], exact[0], atol=1e-3) and torch.allclose(rounded, exact, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "model.patch=3 does not divide the 8x4"),
        ({"patch": 8}, "model.patch=8"),
        ({"heads": 5}, "model.dim=16 is not a multiple of model.heads=5"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dit(**changes)
