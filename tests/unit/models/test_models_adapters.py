"""Networks of diffusers and transformers in blocks: the four promises of DESIGN, section 8, for each class."""

from types import SimpleNamespace

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import Tokens, VpEps
from dbtrain.method.split import global_name, split_evenly
from dbtrain.models.adapters.names import is_added, original_name, our_name
from dbtrain.models.adapters.timesteps import TimeSteps
from dbtrain.models.adapters.told import lines
from dbtrain.models.registry import architecture
from tests.unit.models.originals import CASES, CLASSES, DEPTH, VOCABULARY, arch_of, batch, block, original

STEM = {"stem.added.code.weight", "stem.added.code.bias"}
LEVEL = {f"stem.added.level.network.{part}.{kind}" for part in (0, 2) for kind in ("weight", "bias")}
LAYERS = {f"layers.{i}.added.modulation.{kind}" for i in range(DEPTH) for kind in ("weight", "bias")}
ADDITIONS = {
    "hf_vit": STEM | LEVEL | LAYERS,
    "hf_dit": set(),
    "hf_wan": {"stem.added.classes.weight"},
    "hf_wan_text": set(),
    "hf_wan_film": set(),
    "hf_llama": STEM | LEVEL | LAYERS,
    "hf_llama_tied": STEM | LEVEL | LAYERS | {"stem.added.start.weight"},
}


class Raw(VpEps):
    """Shows the network's own input and output."""

    def scale_input(self, noisy, level):
        return noisy

    def estimate(self, output, noisy, level):
        return output


@torch.no_grad()
def filled(model, network):
    """Our model with the original's weights."""
    own = dict(model.named_parameters())
    for name, value in network.named_parameters():
        mine = our_name(type(model.cut_as), name)
        if mine in own:
            own[mine].copy_(value)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_block_of_all_layers_is_the_original_bit_for_bit(case, tmp_path):
    network = original(case, tmp_path)
    raw = Raw() if case == "hf_dit" else Tokens() if arch_of(case) == "hf_wan" else None
    model = filled(block(case, parametrisation=raw), network)
    own = batch(case)
    example = model.example(own)
    if case in ("hf_vit", "hf_llama", "hf_llama_tied"):
        noisy = example.clean + 3 * torch.randn_like(example.clean)
        level = torch.full(example.clean.shape[:-1], 3.0)
        context = example.context if case == "hf_vit" else own["tokens"]
        given = model.predict(range(DEPTH), noisy, level, context)
        wanted = network(context).logits
    else:
        noisy, level = example.clean, torch.tensor([0.02, 0.3, 0.6, 0.99])
        time = model.cut_as.time(level, model.parametrisation)
        if case == "hf_dit":
            given = model.predict(range(DEPTH), noisy, level, example.context)
            wanted = network(noisy, timestep=time, class_labels=example.context).sample[:, :1]
        else:
            given = model.predict(range(DEPTH), noisy, level, example.context)
            video = noisy if case == "hf_wan_film" else noisy[:, :, None]
            wanted = network(video, timestep=time, encoder_hidden_states=text_of(model, own)).sample
            wanted = wanted if case == "hf_wan_film" else wanted[:, :, 0]
            assert given.shape == noisy.shape  # by `Tokens` the estimate is the output
    assert torch.equal(given, wanted) and given.std() > 0


def text_of(model, own):
    """What diffusers' pipeline gives a Wan: a caption's embeddings with zeros after its last token; of data with
    classes, the rows of a table."""
    if "label" in own:
        return model.get_parameter("stem.added.classes.weight")[own["label"]].reshape(4, 2, -1)
    lengths = own["mask"].sum(dim=1).tolist()
    rows = [torch.cat([row[:n], torch.zeros(len(row) - n, 8)]) for row, n in zip(own["text"], lengths, strict=True)]
    return torch.stack(rows)


@torch.no_grad()
def test_what_a_masked_token_holds_changes_nothing_and_a_caption_does():
    model, own = block("hf_wan_text").eval(), batch("hf_wan_text")
    level = torch.full((4,), 0.5)

    def made(text, mask):
        example = model.example({"image": own["image"], "text": text, "mask": mask})
        return model.predict(range(DEPTH), own["image"], level, example.context)

    before = made(own["text"], own["mask"])
    noise = torch.randn_like(own["text"])
    assert torch.equal(made(torch.where(own["mask"][..., None], own["text"], 100 * noise), own["mask"]), before)
    changed = made(own["text"] + noise * (torch.arange(4) == 2)[:, None, None], own["mask"])
    assert [torch.equal(a, b) for a, b in zip(changed, before, strict=True)] == [True, True, False, True]


def test_captions_are_hidden_by_the_run_as_if_no_token_were_there():
    model, own = block("hf_wan_text", label_dropout=0.5), batch("hf_wan_text")
    drawn = Draws(torch.tensor(3), torch.arange(400))
    many = {name: tensor.repeat(100, *[1] * (tensor.ndim - 1)) for name, tensor in own.items()}
    context, plain = model.example(many, drawn).context, model.example(many).context
    hidden = ~context.flatten(1).any(dim=1)
    assert 150 < hidden.sum() < 250 and torch.equal(context[~hidden], plain[~hidden])
    assert torch.equal(model.unconditional(plain)[hidden], context[hidden])
    with pytest.raises(ConfigError, match="label_dropout above 0"):
        block("hf_wan_text", label_dropout=0.0).unconditional(plain)


@pytest.mark.parametrize("case", CASES)
def test_the_keys_of_all_blocks_are_the_originals_and_a_list_of_additions(case, tmp_path):
    network, split = original(case, tmp_path), split_evenly(DEPTH, 2)
    stack = type(block(case).cut_as)
    wanted = [name for name, _ in network.named_parameters()]
    assert all(original_name(stack, our_name(stack, name)) == name for name in wanted)
    common = {our_name(stack, name) for name in wanted}
    found = {}
    for number in range(2):
        held = {name: p.shape for name, p in block(case, split.layers(number)).named_parameters()}
        found |= {global_name(number, name): shape for name, shape in held.items()}
        own = {
            name for name in common if name.split(".")[0] != "layers" or int(name.split(".")[1]) in split.layers(number)
        }
        added = {n for n in ADDITIONS[case] if n.startswith("stem") or int(n.split(".")[1]) in split.layers(number)}
        assert set(held) == own | added
        assert {name for name in held if is_added(name)} == added
    private = [n for n in common | ADDITIONS[case] if not n.startswith("layers.")]
    assert set(found) == {n for n in common | ADDITIONS[case] if n.startswith("layers.")} | {
        f"blocks.{b}.{name}" for b in range(2) for name in private
    }
    shapes = {our_name(stack, name): p.shape for name, p in network.named_parameters()}
    assert all(shapes[n] == held[n] for n in held if not is_added(n))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_of_every_block_gets_a_gradient(case, precision):
    split = split_evenly(DEPTH, 2)
    for number in range(2):
        model = block(case, split.layers(number))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        objective = BlockObjective(model, split.layers(number), 0.3, 0.9, precision)
        objective(batch(case), torch.tensor(5), torch.arange(4)).backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if ADDITIONS[case] & STEM])
def test_the_start_is_the_original_and_the_level_and_code_are_learned_from_it(case, precision):
    """At zero the output does not depend on level and code; what tells it gets a gradient at the first step."""
    model = block(case)
    BlockObjective(model, range(DEPTH), 0.3, 0.9, precision)(batch(case), torch.tensor(5), torch.arange(4)).backward()
    assert model.get_parameter("stem.added.code.weight").grad.any()
    assert all(model.get_parameter(name).grad.any() for name in LAYERS)


def test_the_time_of_a_ddpm_is_the_index_of_its_sigma_at_both_ends_and_every_edge():
    model = block("hf_dit")
    steps = model.cut_as.steps
    sigmas = steps.sigmas()
    assert sigmas[0] == pytest.approx((1e-4 / (1 - 1e-4)) ** 0.5) and len(sigmas) == 1000
    every = model.cut_as.time(sigmas, model.parametrisation)
    assert torch.allclose(every, torch.arange(1000, dtype=torch.float64), atol=1e-9)
    ends = model.cut_as.time(torch.tensor([1e-5, float(sigmas[-1]), 1e4]), model.parametrisation)
    assert ends[0] == 0 and ends[1] == pytest.approx(999, abs=1e-3) and ends[2] == 999
    edges = torch.tensor(model.noise.split(4).edges, dtype=torch.float64)
    times = model.cut_as.time(edges, model.parametrisation)
    assert (times.diff() < 0).all()
    below = times.floor().long()
    assert ((sigmas[below] <= edges) & (edges <= sigmas[(below + 1).clamp(max=999)])).all()


def test_the_loss_of_a_dit_is_that_of_eps_as_it_was_trained():
    model = block("hf_dit")
    noise = GaussianNoise(LogNormal(-1.2, 1.2, 0.0101, 80.0), 0.5, architecture("hf_dit").noise_defaults["weighting"])
    clean, eps, level = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0.02, 1.0, 79.0])
    noisy, predicted = clean + level[:, None, None, None] * eps, torch.randn(3, 1, 8, 8)
    loss = model.loss(model.parametrisation.estimate(predicted, noisy, level), clean)
    wanted = (predicted - eps).square().flatten(1).mean(dim=1)
    assert torch.allclose(noise.weight(level) * loss, wanted, rtol=1e-3)


def test_the_betas_are_those_of_diffusers_scheduler():
    from diffusers import DDPMScheduler

    for schedule in ("linear", "scaled_linear"):
        keys = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 100, "beta_schedule": schedule}
        kept = DDPMScheduler(**keys).alphas_cumprod.double()
        assert torch.allclose(TimeSteps.of(keys).sigmas(), ((1 - kept) / kept).sqrt(), rtol=1e-4)


def test_the_time_of_a_flow_is_a_thousand_t_at_both_ends_and_every_edge():
    model = block("hf_wan")
    levels = torch.tensor([0.0, *sorted(model.noise.split(3).edges)[1:-1], 0.875, 1.0], dtype=torch.float64)
    assert torch.equal(model.cut_as.time(levels, model.parametrisation), 1000 * levels)


@pytest.mark.parametrize("case", ["hf_vit", "hf_llama"])
def test_the_time_of_a_network_without_one_is_that_of_its_parametrisation(case):
    model, levels = block(case), torch.tensor([0.002, 0.3, 80.0])
    assert torch.equal(model.cut_as.time(levels, model.parametrisation), levels.log() / 4)


def test_the_head_of_a_dit_reads_the_embedder_of_the_blocks_own_first_layer():
    model = block("hf_dit", range(1, 3)).eval()
    example = model.example(batch("hf_dit"))
    arguments = example.clean, torch.full((4,), 0.5), example.context
    before = model.predict([1, 2], *arguments)
    read = []
    model.layers["1"].norm1.emb.register_forward_hook(lambda *_: read.append(1))
    model.layers["2"].norm1.emb.register_forward_hook(lambda *_: read.append(2))
    assert torch.equal(model.predict([1, 2], *arguments), before) and read == [1, 2, 1]


def test_labels_are_hidden_by_the_run_and_never_by_a_layer_as_it_likes():
    model = block("hf_dit").train()
    example = model.example(batch("hf_dit"))
    arguments = example.clean, torch.full((4,), 0.5), example.context
    assert torch.equal(model.predict(range(DEPTH), *arguments), model.predict(range(DEPTH), *arguments))
    none = model.unconditional(example.context)
    assert (none == CLASSES).all() and not torch.equal(
        model.predict(range(DEPTH), *arguments), model.predict(range(DEPTH), *arguments[:2], none)
    )


def test_a_language_model_never_sees_what_comes_later():
    model = block("hf_llama").eval()
    torch.nn.init.normal_(model.get_parameter("stem.added.code.weight"), std=0.5)
    example = model.example(batch("hf_llama"))
    level = torch.full(example.target.shape, 0.5)
    before = model.predict(range(DEPTH), example.clean, level, example.context)
    noisy, context = example.clean.clone(), example.context.clone()
    noisy[:, 6:], context[:, 6:] = noisy[:, 6:] + 1, (context[:, 6:] + 1) % VOCABULARY
    after = model.predict(range(DEPTH), noisy, level, context)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.allclose(before[:, 6:], after[:, 6:])


def test_a_loss_in_chunks_is_the_same():
    model = block("hf_llama_tied")
    example = model.example(batch("hf_llama_tied"))
    arguments = range(DEPTH), example.clean, torch.full(example.target.shape, 0.5), example.context, example.target
    whole = model.predict_loss(*arguments)
    model.cross_entropy.most = 5 * VOCABULARY
    assert torch.allclose(model.predict_loss(*arguments), whole, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_recomputed_layers_give_the_same_gradients(case):
    from dbtrain.models.layers import recompute

    found = []
    for again in (False, True):
        model = block(case)
        for name in LAYERS & ADDITIONS[case]:
            torch.nn.init.constant_(model.get_parameter(name), 0.1)
        if again:
            recompute(model)
        BlockObjective(model, range(DEPTH), 0.3, 0.9, "fp32")(batch(case), torch.tensor(5), torch.arange(4)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_modules_that_the_original_keeps_in_float32_stay_so_under_autocast():
    model, kinds = block("hf_wan"), []
    stem = model.get_submodule("stem")
    stem.condition_embedder.time_embedder.linear_1.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    model.layers["0"].ffn.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    BlockObjective(model, range(DEPTH), 0.3, 0.9, "bf16")(batch("hf_wan"), torch.tensor(5), torch.arange(4))
    assert kinds == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("case", CASES)
def test_a_block_makes_no_other_layers_and_on_meta_nothing_at_all(case):
    model = block(case, range(2, 3), device="meta")
    assert list(model.layers) == ["2"] and all(p.is_meta for p in model.parameters())
    assert arch_of(case) in ("hf_vit", "hf_dit", "hf_wan", "hf_llama")


@pytest.mark.parametrize("case", CASES)
def test_the_plan_tells_how_the_original_is_cut_and_every_addition(case, tmp_path):
    model = block(case, range(1, 3))
    cut, added = lines(model)
    name = type(original(case, tmp_path)).__name__
    assert cut.startswith(
        f"{name}: its layers are {model.stack.layers}.0 to {model.stack.layers}.{DEPTH - 1}, its head"
    )
    assert all(part in cut for part in model.stack.head)
    told = {name.replace(f"layers.{i}.", "layers.N.") for i in range(DEPTH) for name in ADDITIONS[case]}
    told = {name for name in told if not name.startswith("layers.") or name.startswith("layers.N.")}
    assert all(f"{name} (" in added for name in told)
    assert told or added == f"{name}: nothing is added to its parameters"


def test_of_a_network_of_ours_the_plan_tells_nothing():
    assert list(lines(SimpleNamespace(stack=None))) == []
