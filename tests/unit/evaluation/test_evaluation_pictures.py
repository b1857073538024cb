import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.errors import ConfigError, DataError
from dbtrain.evaluation.images import classifier, frechet
from dbtrain.evaluation.images.drawn import read_drawn
from dbtrain.evaluation.images.pictures import enlarged, grid, sample_run
from dbtrain.evaluation.report import evaluate_run
from dbtrain.method.sampler import spaced_levels
from dbtrain.method.split import global_name
from dbtrain.run.merge import merge
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store

DIT = {
    "name": "toy",
    "blocks": 2,
    "model": {"arch": "dit", "depth": 2, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
    "training": {"steps": 1},
}
HOW = ["evaluation.steps=4", "evaluation.guidance=1.5"]
SETTINGS = {"count": 5, "seed": 0, "overrides": HOW}


def merged_run(base):
    """A run whose blocks were committed as they start, merged."""
    config = load_config(None, base=base)
    run = Store(config.run_url)
    run.makedirs()
    run_plan = prepare(config, Run(run), lambda *_: {})
    manifest = read_manifest(run)
    for block in range(config.blocks):
        state = run_plan.model(block).state_dict()
        parts = {"model": {global_name(block, n): t for n, t in state.items()}}
        checkpoints = Checkpoints(run.child("blocks", f"{block:02d}"), manifest.identity(block))
        checkpoints.commit(1, parts, loss=1.0, attempt=1, fence=lambda: None)
    merge(Run(run))
    return run


def test_a_grid_puts_every_picture_in_its_place():
    samples = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 3, 2)
    sheet = grid(samples)
    assert sheet.shape == (2 * 3 + 2, 3 * 2 + 2 * 2) and sheet.dtype == np.uint8
    assert [int(sheet[0, 0]), int(sheet[0, 4]), int(sheet[0, 8])] == [0, 64, 128]
    assert [int(sheet[5, 0]), int(sheet[5, 4]), int(sheet[5, 8])] == [191, 255, 255]
    assert (sheet[3:5] == 255).all()
    colours = grid(torch.tensor([[[[1.0]], [[-3.0]], [[0.0]]]]))
    assert colours.tolist() == [[[255, 0, 128]]]


def test_a_run_is_sampled_to_a_picture_and_to_an_array(tmp_path):
    run = merged_run({**DIT, "out": str(tmp_path)})
    for name in ("a.png", "a.npy"):
        sample_run(Run(run), tmp_path / name, **SETTINGS)
    with Image.open(tmp_path / "a.png") as picture:
        samples = torch.from_numpy(np.load(tmp_path / "a.npy"))
        # each of the 8 x 8 pixels is a square of 8 x 8, so that a person sees it
        assert picture.size == (3 * 64 + 4, 2 * 64 + 2) and picture.mode == "L"
        shown = np.asarray(picture)
        assert np.array_equal(shown[3:64:8, 66 + 3 : 130 : 8], grid(samples[1:2]))
        assert np.array_equal(shown[:64, 66:130], np.kron(grid(samples[1:2]), np.ones((8, 8), np.uint8)))


@pytest.mark.parametrize(("size", "shown"), [((28, 28), (84, 84)), ((40, 70), (80, 140)), ((64, 99), (64, 99))])
def test_small_pictures_are_enlarged_a_whole_number_of_times_and_others_are_left(size, shown):
    pictures = torch.rand(2, 3, *size)
    large = enlarged(pictures)
    times = shown[0] // size[0]
    assert large.shape == (2, 3, *shown) and all(
        torch.equal(large[..., i::times, i::times], pictures) for i in range(times)
    )


def test_samples_that_are_sent_nowhere_else_lie_in_the_run(tmp_path, monkeypatch):
    run = merged_run({**DIT, "out": str(tmp_path / "runs")})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    few = ["--count", "2", "--steps", "2"]
    told = CliRunner().invoke(cli.app, ["sample", "../runs/toy", *few])
    assert told.exit_code == 0 and f"in {run.path}/samples.png" in told.output
    with Image.open(run.path / "samples.png") as picture:
        assert picture.size == (2 * 64 + 2, 64)
    drawn, plan = read_drawn((run.path / "samples.png").read_bytes(), "samples.png"), Run(run).plan
    assert drawn.weights == MergedDirectory(run.child("merged")).weights_hash and drawn.edges == plan.ranges.edges
    levels = spaced_levels(plan.noise(), plan.ranges, 2, "karras")
    assert drawn.steps == tuple((level, plan.ranges.owner(level)) for level in levels)
    assert drawn.counted() == [(1, 1), (1, 2)], "Heun evaluates the second level for the first step too"
    routing = (run.path / "samples-routing.svg").read_text()
    assert "samples-routing.svg" in told.output and "block 0: 1" in routing and "block 1: 1" in routing
    assert not list((tmp_path / "here").iterdir())
    told = CliRunner().invoke(cli.app, ["sample", "../runs/toy", *few, "--out", "two.npy"])
    assert told.exit_code == 0 and "in two.npy" in told.output and np.load("two.npy").shape == (2, 1, 8, 8)
    assert (tmp_path / "here" / "two-routing.svg").read_text() == routing


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.jpg", "must end in .png"), ("absent/a.png", "there is no directory"), ("a", "must end in .png")],
)
def test_where_samples_cannot_go_is_refused_before_any_is_drawn(tmp_path, name, message):
    run = merged_run({**DIT, "out": str(tmp_path)})
    with pytest.raises(ConfigError, match=message):
        sample_run(Run(run), tmp_path / name, **SETTINGS)


def test_a_place_that_refuses_samples_is_no_bug(tmp_path):
    run = merged_run({**DIT, "out": str(tmp_path)})
    (tmp_path / "taken.png").mkdir()
    told = CliRunner().invoke(cli.app, ["sample", run.url, "--steps", "2", "--out", str(tmp_path / "taken.png")])
    assert told.exit_code == 2 and "cannot be written (Is a directory)" in " ".join(told.output.split())


def test_samples_that_are_no_numbers_are_not_shown(tmp_path):
    run = merged_run({**DIT, "out": str(tmp_path)})
    asked = ["--steps", "3", "--guidance", "1e300", "--out", str(tmp_path / "a.npy")]
    told = CliRunner().invoke(cli.app, ["sample", run.url, *asked])
    assert told.exit_code == 2 and "samples have values that are NaN or infinite" in " ".join(told.output.split())
    assert not (tmp_path / "a.npy").exists()


def test_samples_are_drawn_as_they_are_scored_unless_an_option_says_otherwise(tmp_path):
    how = {"steps": 3, "solver": "euler", "guidance": 1.5}
    run = merged_run({**DIT, "out": str(tmp_path), "evaluation": how})

    def drawn(*asked):
        told = CliRunner().invoke(cli.app, ["sample", run.url, "--count", "2", *asked])
        assert told.exit_code == 0, told.output
        made = read_drawn((run.path / "samples.png").read_bytes(), "samples.png")
        return made.solver, made.guidance, len(made.steps)

    assert drawn() == ("euler", 1.5, 3)
    assert drawn("--solver", "heun", "--steps", "2", "evaluation.guidance=1") == ("heun", 1.0, 2)
    assert load_config(None, base={**DIT, "out": str(tmp_path)}).evaluation.solver == "heun"  # of eval and sample alike


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "2"], "guidance needs a model that was trained with model.label_dropout above 0"),
        (["--spacing", "slices", "--steps", "3"], "3 steps cannot be shared evenly by 2 slices"),
        (["--caption", "a dog", "--text", "absent"], "--caption is for runs whose data has captions"),
        (["--solver", "EulerDiscreteScheduler"], "does not fit noise.process=flow"),
        (["--vae", "absent", "--out", "a.jpg"], "--out a.jpg must end in .png"),
        (["training.steps=3"], "'training.steps=3' would change the run"),
    ],
)
def test_a_wrong_option_is_told_before_weights_are_copied_or_an_encoder_is_loaded(
    tmp_path, monkeypatch, options, message
):
    noise = {"process": "flow"} if "--solver" in options else {}
    model = {**DIT["model"], "label_dropout": 0.0}
    run = merged_run({**DIT, "out": str(tmp_path), "model": model, "noise": noise})
    monkeypatch.setattr("dbtrain.evaluation.opening.newest_model", None)  # copies weights
    for now in (["--now"], []):
        told = CliRunner().invoke(cli.app, ["sample", run.url, *options, *now])
        assert told.exit_code == 2 and message in " ".join(told.output.split()), told.output


def test_a_decoder_that_does_not_fit_is_told_before_samples_are_drawn(tmp_path, monkeypatch):
    run = merged_run({**DIT, "out": str(tmp_path)})
    monkeypatch.setattr("dbtrain.evaluation.images.pictures.draw", None)

    def decode(latents):
        raise DataError(f"latents of {latents.shape[1]} channels are not of this autoencoder")

    with pytest.raises(DataError, match="latents of 1 channels are not of this autoencoder"):
        sample_run(Run(run), tmp_path / "a.png", **SETTINGS, decoder=lambda: decode)


def test_latents_are_no_pictures_and_come_back_in_their_own_scale(tmp_path):
    generator = torch.Generator().manual_seed(0)
    np.save(tmp_path / "z.npy", 3 * torch.randn(40, 4, 4, 4, generator=generator).numpy())
    np.save(tmp_path / "y.npy", np.arange(40) % 2)
    data = {"source": "latents", "path": str(tmp_path / "z.npy"), "labels": str(tmp_path / "y.npy"), "classes": 2}
    run = merged_run({**DIT, "out": str(tmp_path), "data": data})
    with pytest.raises(ConfigError, match="samples of 4 channels are no pictures.*--out samples.npy"):
        sample_run(Run(run), tmp_path / "a.png", **SETTINGS)
    # at its start the network denoises as if all latents were N(0, 0.5^2) after scaling: so of deviation 3 before it
    sample_run(
        Run(run),
        tmp_path / "a.npy",
        **{**SETTINGS, "count": 100, "overrides": ["evaluation.steps=40", "evaluation.guidance=1.5"]},
    )
    samples = np.load(tmp_path / "a.npy")
    assert samples.shape == (100, 4, 4, 4) and samples.dtype == np.float32
    assert samples.std() == pytest.approx(3.0, rel=0.06)


def test_a_classifier_draws_nothing(tmp_path):
    model = {"arch": "vit", "depth": 2, "dim": 16, "heads": 2, "patch": 4}
    noise = {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20}
    run = merged_run({**DIT, "out": str(tmp_path), "model": model, "noise": noise})
    with pytest.raises(ConfigError, match="model.arch=vit draws no samples from noise; these do: dit"):
        sample_run(Run(run), tmp_path / "a.png", **SETTINGS)


def test_a_run_is_evaluated_with_overrides_of_its_evaluation_only(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = merged_run({**DIT, "out": str(tmp_path)})
    made = []
    read, judge = RunPlan.data, frechet.judge_of
    monkeypatch.setattr(RunPlan, "data", lambda self: made.append("data") or read(self))
    monkeypatch.setattr(frechet, "judge_of", lambda *told: made.append("judge") or judge(*told))
    metric, scores = evaluate_run(Run(run), ["evaluation.samples=120", "evaluation.steps=4"])
    assert made == ["data", "judge"]
    assert metric.better == "lower" and set(scores) == {"validation", "test"}
    readouts = ["heun_4", "first", "shuffled_blocks", "scrambled_class", "training_images"]
    assert [list(split) for split in scores.values()] == [readouts] * 2
    # samples of a model that has learned nothing are far from digits, digits are near
    assert scores["test"]["training_images"] < 0.2 * scores["test"]["heun_4"]
    written = run.read_json("evaluation.json")
    assert written["metric"] == "frechet_classifier" and written["scores"] == scores
    assert written["depends_on"]["samples"] == 120 and len(written["depends_on"]["classifier"]) == 16
    assert len(list((tmp_path / "cache/dbtrain").iterdir())) == 1
    for override in ("training.steps=2", "seed=1"):
        with pytest.raises(ConfigError, match=f"{override}' would change the run"):
            evaluate_run(Run(run), [override])
    with pytest.raises(ConfigError, match="did you mean evaluation.steps"):
        evaluate_run(Run(run), ["evaluation.stpes=4"])
