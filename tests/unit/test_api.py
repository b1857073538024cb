"""The Python interface: it says the same as the commands, prints nothing, and its merged model is a module."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import dbtrain
from dbtrain import api
from dbtrain.errors import ArgumentError, ConfigError, DbtrainError, IncompleteRunError, PlacementError, ShardError
from dbtrain.evaluation.loading import all_blocks
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.evaluation.merged_network import MergedNetwork
from dbtrain.evaluation.text.generate import GENERATORS
from dbtrain.method.split import global_name
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data
from tests.unit.small_runs import BASE, commit, settled

CPU = torch.device("cpu")
RANGE = {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0}
SIZES = {"depth": 3, "dim": 16, "heads": 2}
LETTERS = {"source": "python_topics", "length": 12}
KINDS = {
    "vit": {},
    "dit": {"model": {"arch": "dit", **SIZES, "patch": 4}, "codebook": None},
    "ar_lm": {"model": {"arch": "ar_lm", **SIZES}, "data": LETTERS, "codebook": {"dim": 32}},
    "recurrent": {"model": {"arch": "recurrent", **SIZES}, "data": LETTERS, "codebook": {"dim": 32}, "blocks": 1},
    "masked_lm": {"model": {"arch": "masked_lm", **SIZES}, "data": LETTERS, "codebook": None, "noise": {}},
}


def network(kind, folder, seed=0):
    """A merged model of that architecture with weights at random, and its data."""
    sections = {**BASE, "noise": RANGE, **KINDS[kind]}
    if sections["data"] is LETTERS:
        sections["data"] = {**LETTERS, "cache": str(folder)}
    config = dbtrain.load_config(None, base={key: value for key, value in sections.items() if value is not None})
    data = load_data(config)
    run_plan = design(config, data, lambda *_: pytest.fail("nothing here needs a calibration"))

    def load(block):
        generator = torch.Generator().manual_seed(seed + block)
        named = run_plan.model(block).state_dict().items()
        return {global_name(block, n): t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in named}

    return MergedNetwork(MergedModel(run_plan, all_blocks(run_plan, load, CPU), CPU)).eval(), data


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def test_the_package_shows_what_it_has_and_imports_nothing_large_for_it():
    program = "import sys, dbtrain; assert 'train' in dir(dbtrain); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n" and done.returncode == 0, done.stderr
    assert {name: getattr(dbtrain, name) for name in dbtrain.__all__} == {n: getattr(api, n) for n in dbtrain.__all__}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dbtrain.trian  # noqa: B018


def test_a_run_is_prepared_merged_scored_and_asked_without_a_word(tmp_path, capfd):
    config = dbtrain.load_config(None, [f"out={tmp_path}"], base=BASE)
    run = dbtrain.prepare(config)
    assert [block.row.phase for block in dbtrain.status(run)] == ["pending"] * 2
    with pytest.raises(IncompleteRunError, match="block 0 at step 0 of 2"):
        dbtrain.merge(run)
    with pytest.raises(ShardError, match="run the merge first"):
        dbtrain.load_merged(run)
    commit(run.store)
    merged = dbtrain.merge(run)
    assert merged.samples == 32 and [block for block, *_ in merged.result.blocks] == [0, 1]
    shown = []
    found = dbtrain.evaluate(run, ["evaluation.readout=mean"], shown=shown.append)
    assert shown == [found] and found.metric.better == "higher" and found.progress == ""

    test = load_data(config).test
    batch = test.batch(torch.arange(len(test)), CPU)
    model = dbtrain.load_merged(tmp_path / "toy" / "merged")
    classes = dbtrain.predict(model, batch["image"], batch_size=100)
    for size in (0, -1):  # each would answer some of the inputs only
        with pytest.raises(ConfigError, match=f"batch_size={size} "):
            dbtrain.predict(model, batch["image"], batch_size=size)
    assert torch.equal(dbtrain.predict(model, batch["image"].double()), classes)
    with pytest.raises(ConfigError, match="up to nan, do not fit"):
        model(batch["image"] * torch.nan)
    with pytest.raises(ConfigError, match="inputs are a ndarray: give a tensor"):
        dbtrain.predict(model, batch["image"].numpy())
    for wrong in (batch["image"] * 8 + 8, (batch["image"] * 8 + 8).byte()):  # as scikit-learn has the digits
        with pytest.raises(ConfigError, match=r"up to 16, do not fit: this model takes floats from -1"):
            model(wrong)
    score = float((classes == batch["label"]).double().mean())
    assert score == pytest.approx(found.scores["test"][config.evaluation.readout], abs=1e-6)
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_latents_are_classified_in_their_own_scale_which_is_that_of_no_pixels(tmp_path):
    draws = torch.Generator().manual_seed(0)
    latents = 5 * torch.randn(40, 1, 8, 8, generator=draws)
    save_file({"latent": latents, "label": torch.arange(40) % 10}, tmp_path / "latents.safetensors")
    data = {"source": "latents", "path": str(tmp_path / "latents.safetensors"), "classes": 10}
    run = dbtrain.prepare(dbtrain.load_config(None, [f"out={tmp_path}"], base={**BASE, "data": data}))
    commit(run.store)
    dbtrain.merge(run)
    assert dbtrain.predict(dbtrain.load_merged(run), latents).shape == (40,)


def test_a_text_in_the_place_of_a_list_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"give a list, as in \['training.steps=3'\]"):
        dbtrain.load_config("vit_digits", "training.steps=3")
    with pytest.raises(ConfigError, match="device='nonsense' is no device of PyTorch"):
        dbtrain.load_merged(settled(tmp_path), "nonsense")
    with pytest.raises(ConfigError, match=r"device=cuda:77: PyTorch sees \d GPU"):
        dbtrain.load_merged(settled(tmp_path), "cuda:77")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: dbtrain.load_config("vit_digits", b"x"),
            "overrides=b'x' is of the type bytes: give a list of texts",
        ),
        (
            lambda run: dbtrain.load_config("vit_digits", ["blocks=2", 1]),
            "overrides[1]=1 is of the type int: give a text",
        ),
        (lambda run: dbtrain.load_config(3), "path=3 is of the type int: give the path of a file"),
        (lambda run: dbtrain.merge(run, "data.path=x"), "type str: give a list, as in ['data.path=x']"),
        (
            lambda run: dbtrain.evaluate(run, "evaluation.steps=3"),
            "type str: give a list, as in ['evaluation.steps=3']",
        ),
        (lambda run: dbtrain.evaluate(run, section={"steps": 3}), "section={'steps': 3} is of the type dict"),
        (lambda run: dbtrain.train(None), "config=None is of the type NoneType: give a configuration, a run, or"),
        (lambda run: dbtrain.prepare("vit_digits"), "config='vit_digits' is of the type str: give a configuration"),
        (lambda run: dbtrain.load_merged(None), "path=None is of the type NoneType: give the directory or URL"),
        (lambda run: dbtrain.status(3), "run=3 is of the type int: give a run, or its directory or URL"),
        (lambda run: dbtrain.run_config(None), "run=None is of the type NoneType"),
        (lambda run: dbtrain.train(run, blocks="0,1"), "blocks='0,1' is of the type str: give a list of their numbers"),
        (lambda run: dbtrain.train(run, blocks=0), "blocks=0 is of the type int: give a list of their numbers"),
        (lambda run: dbtrain.train(run, blocks=["0"]), "blocks[0]='0' is of the type str: give the number of a block"),
        (lambda run: dbtrain.train(run, address=3), "address=3 is of the type int"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named_with_what_to_give(tmp_path, call, message):
    with pytest.raises(TypeError) as told:
        call(settled(tmp_path).url)
    assert message in str(told.value) and isinstance(told.value, DbtrainError)


def test_a_view_is_told_what_the_command_says(tmp_path):
    class Told(api.SilentView):
        def __init__(self):
            self.lines = []

        def tell(self, line):
            self.lines.append(line)

    run, told = settled(tmp_path), Told()
    commit(run)
    dbtrain.merge(run.url)
    dbtrain.evaluate(run.url, view=told)
    assert len(told.lines) == 1 and told.lines[0].startswith("took ")


def test_a_run_goes_on_with_its_own_configuration_and_at_another_cluster(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        api, "train_blocks", lambda config, view, calibrate, verbose, only: trained.append((config, only))
    )
    run = settled(tmp_path)
    again = dbtrain.train(run.url, blocks=[1], address="127.0.0.1:1")
    assert again.store.url == run.url
    ((config, only),) = trained
    assert only == [1] and config.cluster.address == "127.0.0.1:1" and config.run_url == run.url


def test_a_cluster_that_does_not_answer_is_an_error_and_no_exit(tmp_path):
    run = settled(tmp_path)
    with pytest.raises(PlacementError, match="127.0.0.1:9"):
        dbtrain.train(run.url, address="127.0.0.1:9")


def test_a_classifier_answers_with_the_readout_of_its_run(cache):
    model, data = network("vit", cache)
    batch = data.test.batch(torch.arange(7), CPU)
    found = model(batch["image"])
    merged = model.merged
    by_readout = readouts(merged.evaluations(batch, merged.draws(torch.arange(7))))
    assert torch.equal(found, by_readout[merged.run_plan.config.evaluation.readout])
    assert found.shape == (7, 10) and torch.allclose(found.sum(dim=1), torch.ones(7))
    assert torch.equal(dbtrain.predict(model, batch["image"], 2), found.argmax(dim=1))
    with pytest.raises(ConfigError, match=r"images of shape \(7, 1, 4, 4\) .* takes \(N, 1, 8, 8\)"):
        model(batch["image"][:, :, :4, :4])


def test_the_module_is_one_as_any_other(cache):
    model, data = network("vit", cache)
    images = data.test.batch(torch.arange(3), CPU)["image"].double()
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for block in model.merged.blocks for p in block.parameters()
    )
    model(images.float()).sum().backward()
    assert all(p.grad is not None for p in model.blocks[1].parameters() if p.requires_grad)
    other, _ = network("vit", cache, seed=5)
    assert not torch.equal(other(images.float()), model(images.float()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images.float()), model(images.float()))


def test_a_model_that_draws_gives_a_sample_of_each_class(cache):
    model, _ = network("dit", cache)
    assert len(model.sampling.levels) == 50
    model.draw_with(steps=4, solver="euler", spacing="slices", seed=3)
    classes = torch.tensor([3, 1, 4, 1])
    found = model(classes)
    assert found.shape == (4, 1, 8, 8)
    assert torch.equal(found, dbtrain.predict(model, classes)) and not torch.equal(found[1], found[3])
    with pytest.raises(ConfigError, match="from 0 to 9, not \\[10\\]"):
        model(torch.tensor([10]))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"spacing": "Karras"}, "spacing=Karras"),
        ({"solver": "huen"}, "solver"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": "2"}, "guidance"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"seed": 1.5}, "seed=1.5 is of the type float"),
    ],
)
def test_how_samples_are_drawn_is_checked_when_it_is_said(cache, how, said):
    model, _ = network("dit", cache)
    before = model.sampling
    with pytest.raises(ArgumentError, match=said):
        model.draw_with(**how)
    assert model.sampling == before


@pytest.mark.parametrize("kind", ["ar_lm", "recurrent"])
def test_a_causal_model_gives_the_next_token_after_each(kind, cache):
    model, data = network(kind, cache)
    tokens = data.test.batch(torch.arange(3), CPU)["tokens"][:, :8]
    found = model(tokens)
    assert found.shape == (3, 9, model.vocabulary)
    shorter = model(tokens[:, :5])
    assert torch.allclose(found[:, :6], shorter, atol=1e-5)  # what comes later is not seen
    continued = GENERATORS[type(model.merged.blocks[0]).continues](model.merged, tokens, 1, 0.0, 0, 0)
    assert torch.equal(dbtrain.predict(model, tokens), continued[:, 0])
    assert len(model.continue_text("a", 4)) == 4
    with pytest.raises(ConfigError, match="length=0 adds nothing"):
        model.continue_text("a", 0)
    with pytest.raises(ConfigError, match="T up to 11"):
        model(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ConfigError, match="a token is below 0 or above"):
        model(torch.full((1, 3), model.vocabulary))


def test_a_masked_model_fills_in_masks_and_leaves_what_is_seen(cache):
    model, data = network("masked_lm", cache)
    tokens = data.test.batch(torch.arange(4), CPU)["tokens"].clone()
    for text, masked in enumerate((1, 5, 9, 12)):  # of other blocks each
        tokens[text, :masked] = model.vocabulary
    found, filled = model(tokens), dbtrain.predict(model, tokens)
    assert found.shape == (4, 12, model.vocabulary) and torch.allclose(found.sum(dim=-1), torch.ones(4, 12))
    seen = tokens < model.vocabulary
    assert torch.equal(found.argmax(dim=-1)[seen], tokens[seen]) and torch.equal(filled[seen], tokens[seen])
    assert (filled < model.vocabulary).all()
    alone = torch.cat([model(tokens[text : text + 1]) for text in range(4)])
    assert torch.allclose(found, alone, atol=1e-5)
