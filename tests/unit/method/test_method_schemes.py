from dataclasses import replace
from typing import get_args

import pytest
import torch

from dbtrain.config import Config
from dbtrain.method.codebook import make_codebook
from dbtrain.method.draws import Draws
from dbtrain.method.forward_forward import WRONG_STREAM, ForwardForward, ForwardForwardObjective
from dbtrain.method.gaussian import GaussianNoise, NoNoise
from dbtrain.method.levels import LogUniform
from dbtrain.method.loops import order
from dbtrain.method.objective import BlockObjective, JointObjective, Slice
from dbtrain.method.parametrisation import Direct, Unseen
from dbtrain.method.schemes import SCHEMES
from dbtrain.method.split import partition, split_evenly
from dbtrain.models.layers import compile_recomputed, recompute
from dbtrain.models.vit import ViT

CODES = make_codebook("orthogonal", 10, 16, seed=0)
SLICES = [Slice(range(2), 3.0, 10.0), Slice(range(2, 4), 1.0, 3.5), Slice(range(4, 6), 0.1, 1.2)]
BLOCKS = [s.layers for s in SLICES]
KEY, POSITIONS = torch.tensor(7), torch.arange(12)


def awake(noise=None, **changes):
    torch.manual_seed(0)
    settings = {"image": (1, 8, 8), "depth": 6, "dim": 16, "heads": 4, "patch": 4, **changes}
    own = Unseen() if isinstance(noise, NoNoise) else Direct(0.25)
    noise = noise or GaussianNoise(LogUniform(0.1, 10.0))
    model = ViT(codebook=CODES, noise=noise, parametrisation=own, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(12, 1, 8, 8, generator=generator)
    return {"image": image, "label": torch.arange(12) % 10}


def gradients(module, *inputs):
    module.zero_grad()
    loss = module(*inputs)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_every_method_of_the_configuration_is_a_scheme():
    assert set(get_args(Config.model_fields["method"].annotation)) == set(SCHEMES)


def test_the_joint_loss_is_the_mean_of_the_blocks_on_shared_weights(batch):
    model = awake()
    alone = [BlockObjective(model, s.layers, s.low, s.high, "fp32") for s in SLICES]
    losses = [block(batch, KEY + b, POSITIONS).detach() for b, block in enumerate(alone)]
    joint, shared = gradients(JointObjective(model, SLICES, "fp32"), batch, KEY, POSITIONS)
    torch.testing.assert_close(joint, torch.stack(losses).mean())
    # every layer learns at every step, and the stem and head from all blocks
    assert {n for n, _ in model.named_parameters()} == {n.removeprefix("model.") for n in shared}
    own = [gradients(block, batch, KEY + b, POSITIONS)[1] for b, block in enumerate(alone)]
    mean = sum(g["model.head.linear.weight"] for g in own) / 3
    torch.testing.assert_close(shared["model.head.linear.weight"], mean)
    torch.testing.assert_close(shared["model.layers.2.mlp.0.weight"], own[1]["model.layers.2.mlp.0.weight"] / 3)


def test_the_joint_loss_weighs_each_block_by_its_share_of_the_levels(batch):
    model, shares = awake(), (0.2, 0.3, 0.5)
    losses = [
        BlockObjective(model, s.layers, s.low, s.high, "fp32")(batch, KEY + b, POSITIONS) for b, s in enumerate(SLICES)
    ]
    slices = [replace(s, share=2 * share) for s, share in zip(SLICES, shares, strict=True)]
    joint = JointObjective(model, slices, "fp32")(batch, KEY, POSITIONS)
    torch.testing.assert_close(joint, sum(share * loss for share, loss in zip(shares, losses, strict=True)))


def test_the_joint_blocks_draw_noise_of_their_own(batch):
    seen = []

    class Spy(GaussianNoise):
        def corrupt(self, clean, level, draws):
            noisy = super().corrupt(clean, level, draws)
            seen.append((level, (noisy - clean) / level[:, None]))
            return noisy

    JointObjective(awake(Spy(LogUniform(0.1, 10.0))), SLICES, "fp32")(batch, KEY, POSITIONS)
    assert all(s.low <= float(v.min()) and float(v.max()) <= s.high for s, (v, _) in zip(SLICES, seen, strict=True))
    assert not torch.allclose(seen[0][1], seen[1][1]) and not torch.allclose(seen[1][1], seen[2][1])


def test_a_greedy_block_learns_its_own_layers_and_head_on_features_that_stay(batch):
    scheme = SCHEMES["greedy"]
    split = split_evenly(6, 3)
    for block in range(3):
        layers = scheme.runs(split, block)
        slices = [Slice(scheme.runs(split, b), 0.0, 1.0) for b in range(3)]
        objective = scheme.objective(awake(NoNoise(), layers=layers), slices, block, "fp32")
        names = {".".join(n.split(".")[1:3]) for n in gradients(objective, batch, KEY, POSITIONS)[1]}
        assert {n for n in names if n.startswith("layers")} == {f"layers.{2 * block}", f"layers.{2 * block + 1}"}
        assert any(n.startswith("head") for n in names) and any(n.startswith("stem") for n in names) == (block == 0)
        assert scheme.sources(block) == range(block + 1) and layers == range(2 * block + 2)


def test_no_gradient_of_forward_forward_crosses_a_seam(batch):
    model = ForwardForward(awake(NoNoise()), BLOCKS)
    example = model.example(batch)
    for block in range(3):
        model.zero_grad(set_to_none=False)
        model.goodness(range(6), example.clean, example.context)[block].mean().backward()
        touched = {
            n.split(".")[0] + n.split(".")[1] * n.startswith("layers")
            for n, p in model.named_parameters()
            if p.grad.any()
        }
        own = {f"layers{i}" for i in BLOCKS[block]}
        assert touched == own | ({"stem"} if block == 0 else set())


def test_goodness_of_a_block_does_not_inherit_that_of_the_one_before(batch):
    model = ForwardForward(awake(NoNoise()), BLOCKS).eval()
    example = model.example(batch)
    before = model.goodness(range(6), example.clean, example.context)
    seam = model.layers.get_submodule("1")
    seam.register_forward_hook(lambda layer, inputs, output: 3 * output)
    after = model.goodness(range(6), example.clean, example.context)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-3, atol=1e-3)


def test_forward_forward_shows_a_wrong_label_to_every_sample_and_all_of_them_in_time():
    shown = []

    class Spy(ForwardForward):
        def goodness(self, layers, code, context):
            shown.append((code @ CODES.T).argmax(dim=1))
            return super().goodness(layers, code, context)

    objective = ForwardForwardObjective(Spy(awake(NoNoise()), BLOCKS), "fp32")
    label = torch.full((400,), 3)
    objective({"image": torch.zeros(400, 1, 8, 8), "label": label}, KEY, torch.arange(400))
    right, wrong = shown[0].chunk(2)
    assert torch.equal(right, label) and set(wrong.tolist()) == set(range(10)) - {3}
    assert WRONG_STREAM not in (0, 1)
    assert Draws(KEY, torch.arange(400)).uniform((), WRONG_STREAM).shape == (400,)


def test_forward_forward_reads_the_label_off_all_blocks_but_the_first(batch):
    model = ForwardForward(awake(NoNoise()), BLOCKS).eval()
    example = model.example(batch)
    logits = model.predict(range(6), example.clean, torch.ones(12), example.context)
    assert logits.shape == (12, 10)
    right = model.goodness(range(6), example.clean, example.context)[1:].sum(0)
    torch.testing.assert_close(logits[torch.arange(12), example.target], right)
    assert model.predict(range(2), example.clean, torch.ones(12), example.context).shape == (12, 10)


def test_forward_forward_learns_a_rule_that_needs_both_image_and_label():
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(10, 1, 8, 8, generator=generator)
    blocks = [range(1), range(1, 2)]
    objective = ForwardForwardObjective(ForwardForward(awake(NoNoise(), depth=2), blocks), "fp32")
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(100):
        label = torch.randint(0, 10, (64,), generator=generator)
        image = patterns[label] + 0.3 * torch.randn(64, 1, 8, 8, generator=generator)
        objective({"image": image, "label": label}, torch.tensor(step), torch.arange(64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = objective.model.eval()
    with torch.no_grad():
        logits = model.predict(range(2), CODES, torch.ones(10), patterns)
    assert (logits.argmax(dim=1) == torch.arange(10)).float().mean() >= 0.9


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(batch, dropout):
    found = []
    for checkpointed in (False, True):
        model = awake(dropout=dropout)
        if checkpointed:
            recompute(model)
        torch.manual_seed(4)
        found.append(gradients(BlockObjective(model, range(6), 0.1, 10.0, "fp32"), batch, KEY, POSITIONS))
    (loss, plain), (again, recomputed) = found
    assert torch.equal(loss, again) and plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("layers", [range(6), order(range(6), [1, 3, 3, 1, 2, 1])], ids=["once", "looped"])
def test_compiled_layer_by_layer_activation_checkpointing_still_keeps_inputs_only(batch, layers):
    found, kept = [], []
    for checkpointed in (False, True):
        model = awake()
        if checkpointed:
            recompute(model)
            compile_recomputed(model, backend="aot_eager")
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(gradients(BlockObjective(model, layers, 0.1, 10.0, "fp32"), batch, KEY, POSITIONS))
        kept.append(sum(sizes))
    (loss, plain), (again, recomputed) = found
    torch.testing.assert_close(loss, again)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name])
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize(
    ("name", "layers", "blocks", "sizes"),
    [
        ("even", 12, 3, (4, 4, 4)),
        ("front", 12, 3, (6, 4, 2)),
        ("back", 12, 3, (2, 4, 6)),
        ("even", 7, 3, (3, 2, 2)),
        ("front", 6, 6, (1,) * 6),
        ("back", 6, 1, (6,)),
    ],
)
def test_partitions(name, layers, blocks, sizes):
    assert partition(name, layers, blocks) == sizes


def test_every_partition_gives_all_layers_away_and_each_block_one():
    for layers in range(1, 25):
        for blocks in range(1, layers + 1):
            front = partition("front", layers, blocks)
            assert sum(front) == layers and min(front) >= 1
            assert sorted(front, reverse=True) == list(front) == list(reversed(partition("back", layers, blocks)))


def test_the_models_own_codebook_moves_with_forward_forward():
    model = ForwardForward(awake(NoNoise()), BLOCKS).to("meta")
    batch = {"image": torch.empty(2, 1, 8, 8, device="meta"), "label": torch.empty(2, dtype=torch.int64, device="meta")}
    assert model.example(batch).clean.device.type == "meta"
