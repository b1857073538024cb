"""The predict command: classes of picture files, and the bits of a text."""

import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.data.packed import TokenWindows
from dbtrain.evaluation.merged_model import readouts
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.predict import classify_files, score_text
from dbtrain.run.merge import merge
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from tests.unit.small_runs import BASE, commit, never

CPU = torch.device("cpu")
TEXT = {"data": {"source": "python_topics", "length": 24}, "codebook": {"dim": 32}}
SIZES = {"depth": 2, "dim": 16, "heads": 2}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    out, cache = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("tokens")

    def run(name, **changes):
        cached = [f"data.cache={cache}"] if "data" in changes else []
        config = load_config(None, [f"out={out}", *cached], base={**BASE, "name": name, **changes})
        store = Store(config.run_url)
        if not store.exists("run.json"):
            store.makedirs()
            prepare(config, Run(store), never)
            commit(store, blocks=range(read_manifest(store).blocks))
            merge(Run(store))
        return Run(store)

    return run


@pytest.fixture
def vit(make):
    return make("vit")


@pytest.fixture
def ar(make):
    return make("ar", model={**SIZES, "arch": "ar_lm"}, **TEXT)


def said(*arguments):
    result = CliRunner().invoke(cli.app, ["predict", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


def picture(path, size=(8, 8), mode="L"):
    data = torch.randint(0, 256, (size[0] * size[1] * len(mode),), generator=torch.Generator().manual_seed(1))
    Image.frombytes(mode, size, bytes(data.tolist())).save(path)
    return path


def test_a_picture_gets_the_probabilities_of_the_sample_that_it_shows(vit, tmp_path):
    data, model = load_data(vit.config), open_run(vit, CPU)
    files = [tmp_path / f"{n}.png" for n in range(3)]
    samples = data.test.batch(torch.arange(3), CPU)
    for file, sample in zip(files, samples["image"], strict=True):
        # digits have 17 shades; 15 of 255 are one of them, and 16 are white
        Image.fromarray(((sample[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(file)
    made = classify_files(model, [str(file) for file in files])
    shown = (((samples["image"] + 1) * 127.5).round() * (2 / 255) - 1).float()
    expected = readouts(model.evaluations({**samples, "image": shown}, model.draws(torch.arange(3))))["mean"]
    assert torch.allclose(made, expected, atol=1e-6)
    code, told = said(vit.store.url, files[0], "--top", 2)
    best = made[0].argsort(descending=True)
    assert code == 0 and f"│ {int(best[0])} │ {100 * float(made[0][best[0]]):.2f} │" in told
    assert f"│ {int(best[2])} │" not in told


def test_pictures_that_do_not_fit_are_refused_by_name(vit, tmp_path):
    wide, colour = picture(tmp_path / "wide.png", (20, 10)), picture(tmp_path / "colour.png", mode="RGB")
    (tmp_path / "no.png").write_bytes(b"hello")
    code, told = said(vit.store.url, wide)
    assert code == 1 and "wide.png is 20x10 (width x height) of 1 channel(s), and the model takes 8x8" in told
    assert "colour.png is 8x8 (width x height) of 3 channel(s)" in said(vit.store.url, colour)[1]
    assert said(vit.store.url, wide, colour, "--fit", "crop")[0] == 0
    code, told = said(vit.store.url, picture(tmp_path / "good.png"), tmp_path / "no.png", tmp_path / "none.png")
    assert code == 1 and "no.png cannot be read as a picture" in told and "1 more of 3" in told and "│" not in told


def test_a_command_that_asks_for_nothing_or_for_the_wrong_thing_is_refused(vit, ar, tmp_path):
    assert said(vit.store.url)[0] == 2 and "give picture files, or a text" in said(vit.store.url)[1]
    assert said(vit.store.url, "a.png", "--text", "a")[0] == 2
    code, told = said(vit.store.url, "--text", "hello")
    assert code == 2 and "model.arch=vit is no language model; these are: masked_lm, recurrent, ar_lm" in told
    code, told = said(ar.store.url, picture(tmp_path / "good.png"))
    assert code == 2 and "model.arch=ar_lm does not classify pictures; these do: vit" in told
    code, told = said(ar.store.url, "--text", "123")
    assert code == 1 and "'123' has no token under data.tokenizer=letters" in told


@torch.no_grad()
def test_the_bits_of_a_text_are_those_of_the_evaluation(ar):
    model, data = open_run(ar, CPU), load_data(ar.config)
    assert isinstance(data.test, TokenWindows)
    tokens = torch.cat([data.test.batch(torch.tensor([n]), CPU)["tokens"][0] for n in range(len(data.test))][:3])
    text = "".join(" abcdefghijklmnopqrstuvwxyz"[token] for token in tokens)
    text = "x" + text[1:]  # a space at the start would be dropped
    score = score_text(model, text)
    assert (score.tokens, score.characters, score.bound) == (72, 72, False)
    first = score_text(model, text[:24])
    batch = {"tokens": torch.cat([torch.tensor([24]), tokens[1:]]).reshape(3, 24)}
    made = readouts(model.evaluations(batch, model.draws(torch.arange(3))))["mean"]
    nats = -made.gather(-1, batch["tokens"][..., None]).double().log()
    assert score.bits == pytest.approx(float(nats.sum()) / math.log(2), rel=1e-5)
    assert first.bits == pytest.approx(float(nats[0].sum()) / math.log(2), rel=1e-5)
    code, told = said(ar.store.url, "--text", text)
    assert code == 0 and f"{score.bits / 72:.4f} bits a token" in told


def test_a_masked_model_tells_a_bound(make):
    run = make("masked", model={**SIZES, "arch": "masked_lm"}, noise={}, data=TEXT["data"])
    score = score_text(open_run(run, CPU), "the quick brown fox")
    # near random weights every token costs about the logarithm of the vocabulary
    assert score.bound and score.bits / score.tokens == pytest.approx(math.log2(27), rel=0.3)
    assert "at most" in score.line()
