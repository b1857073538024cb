import pytest
import torch

from dbtrain.config import load_config
from dbtrain.data.splits import DataSet
from dbtrain.evaluation.loading import all_blocks
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.evaluation.text.generate import continue_text
from dbtrain.evaluation.text.uncached import uncached
from dbtrain.evaluation.text.unmasking import sharpened, unmask
from dbtrain.evaluation.verify import verify
from dbtrain.method.split import global_name
from dbtrain.run.make_plan import design
from tests.unit.conftest import never

BASE = {
    "name": "toy",
    "model": {"arch": "masked_lm", "depth": 3, "dim": 16, "heads": 2},
    "data": {"source": "digits"},
    "training": {"steps": 4, "batch_size": 8},
}
TOKENS = DataSet(None, None, None, {"length": 40, "vocabulary": 3})


@pytest.fixture(scope="module")
def merged():
    """Blocks that each always predict one token, of their own number."""
    run_plan = design(load_config(None, [], base=BASE), TOKENS, never)

    def load(block):
        state = run_plan.model(block).state_dict()
        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        state["stem.tokens.weight"] += 1
        state["head.linear.weight"][block] += 10
        return {global_name(block, name): tensor for name, tensor in state.items()}

    return MergedModel(run_plan, all_blocks(run_plan, load, torch.device("cpu")), torch.device("cpu"))


def masks(count):
    return torch.full((count, 40), 3)


@pytest.mark.parametrize("steps", [1, 5])
def test_each_block_fills_in_its_share_of_the_tokens(merged, steps):
    texts = unmask(merged, masks(200), steps, 1.0, seed=1)
    shares = torch.bincount(texts.flatten(), minlength=3) / texts.numel()
    # block b owns a third of the masked shares, in which it reveals a third of the tokens
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_what_is_seen_at_the_start_stays(merged):
    start = masks(4)
    start[:, 5:9] = torch.tensor([2, 0, 1, 2])
    texts = unmask(merged, start, 3, 1.0, seed=1)
    assert torch.equal(texts[:, 5:9], start[:, 5:9]) and texts.max() < 3


@pytest.mark.parametrize(
    ("masked", "filled"),
    [(40, [1 / 3, 1 / 3, 1 / 3]), (30, [1 / 9, 4 / 9, 4 / 9]), (20, [0, 1 / 3, 2 / 3]), (9, [0, 0, 1])],
)
def test_after_a_prompt_only_blocks_of_the_masked_share_that_is_left_are_asked(merged, masked, filled):
    start = masks(400)
    start[:, : 40 - masked] = 0
    texts = unmask(merged, start, 14, 1.0, seed=1)[:, 40 - masked :]
    shares = torch.bincount(texts.flatten(), minlength=3) / texts.numel()
    assert shares.tolist() == pytest.approx(filled, abs=0.02)
    assert [share > 0 for share in shares.tolist()] == [share > 0 for share in filled]


def test_a_text_without_masks_is_left_as_it_is(merged):
    text = torch.tensor([[0, 1, 2, 1] * 10])
    assert torch.equal(unmask(merged, text, 2, 1.0, seed=1), text)


def test_a_text_is_a_function_of_the_seed(merged):
    assert torch.equal(unmask(merged, masks(4), 2, 1.0, seed=1), unmask(merged, masks(4), 2, 1.0, seed=1))
    assert not torch.equal(unmask(merged, masks(4), 2, 1.0, seed=1), unmask(merged, masks(4), 2, 1.0, seed=2))


def test_temperature_sharpens_and_zero_takes_the_likeliest():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert torch.equal(sharpened(logits, 0.0).softmax(-1), torch.tensor([[0.0, 1.0, 0.0]]))
    assert torch.allclose(sharpened(logits, 0.5).softmax(-1), (2 * logits).softmax(-1))


def test_both_sides_of_a_merge_walk_through_the_same_masks(merged):
    def load(block):
        return {global_name(block, name): tensor for name, tensor in merged.blocks[block].state_dict().items()}

    batch = {"tokens": torch.zeros(4, 40, dtype=torch.int64)}
    plan, device = merged.run_plan, merged.device
    assert verify(merged, MergedModel(plan, all_blocks(plan, load, device), device), batch) == []

    def wrong(block):
        tensors = load(block)
        tensors[f"blocks.{block}.head.linear.weight"] = tensors[f"blocks.{block}.head.linear.weight"] + block
        return tensors

    apart = MergedModel(merged.run_plan, all_blocks(merged.run_plan, wrong, merged.device), merged.device)
    assert [line.split(" at ")[0] for line in verify(merged, apart, batch)] == ["block 1", "block 2"]


LETTERS = {
    "name": "toy",
    "blocks": 1,
    "data": {"source": "python_topics", "length": 24},
    "codebook": {"dim": 32},
    "evaluation": {"steps_per_block": 3},
}
KINDS = {
    "masked": {"blocks": 3, "model": {"arch": "masked_lm", "depth": 3, "dim": 16, "heads": 2}},
    "recurrent": {
        "model": {"arch": "recurrent", "dim": 16, "heads": 2},
        "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    },
}
LETTER_DATA = DataSet(None, None, None, {"length": 24, "vocabulary": 27})


def awake(kind):
    run_plan = design(load_config(None, [], base={**LETTERS, **KINDS[kind]}), LETTER_DATA, never)

    def load(block):
        generator = torch.Generator().manual_seed(block)
        named = run_plan.model(block).state_dict().items()
        return {global_name(block, n): t + 0.5 * torch.randn(t.shape, generator=generator) for n, t in named}

    return MergedModel(run_plan, all_blocks(run_plan, load, torch.device("cpu")), torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_continued_by_a_function_of_the_seed(kind):
    model = awake(kind)
    one, same, other = (continue_text(model, "the la", 12, 1.0, seed) for seed in (1, 1, 2))
    assert one == same != other and len(one) == 12
    assert continue_text(model, "ab la", 12, 1.0, 1) != one
    likeliest = [continue_text(model, "the la", 12, 0.0, seed) for seed in (1, 2)]
    # which tokens are revealed first is a matter of chance under masking
    assert kind == "masked" or likeliest[0] == likeliest[1]


def test_the_likeliest_continuation_of_a_recurrent_model_is_that_of_its_whole_text():
    model = awake("recurrent")
    prompt = torch.tensor([[3, 1, 4]])
    text = torch.cat([prompt, uncached(model, prompt, 8, 0.0, 0)], dim=1)
    with torch.no_grad():
        whole = readouts(model.evaluations({"tokens": text}, model.draws(torch.arange(1)), 3))["mean"]
    assert torch.equal(whole.argmax(dim=-1)[:, 3:], text[:, 3:])
