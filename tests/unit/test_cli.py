"""What the commands make of their arguments."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.shards.storage.store import Store

CONFIGS = Path(__file__).parents[2] / "configs"


def resumed(monkeypatch, where):
    """(exit code, configurations that were trained, what was said)."""
    trained = []
    monkeypatch.setattr(cli.training, "train_and_merge", lambda config, console, verbose: trained.append(config))
    result = CliRunner().invoke(cli.app, ["resume", where])
    return result.exit_code, trained, " ".join(result.output.split())


def test_a_run_that_was_moved_is_resumed_where_it_is(make_run, monkeypatch, tmp_path):
    config, run = make_run()
    (tmp_path / "larger").mkdir()
    run.path.rename(tmp_path / "larger" / "toy")
    monkeypatch.chdir(tmp_path)
    code, (again,), _ = resumed(monkeypatch, "larger/toy/")
    assert code == 0 and again.run_url == str(tmp_path / "larger" / "toy")
    assert again == config.model_copy(update={"out": str(tmp_path / "larger")})


def test_a_run_in_an_object_store_is_resumed_where_it_is(make_run, monkeypatch, tmp_path):
    _, run = make_run()
    moved = Store(f"memory://{tmp_path.name}/runs/toy")
    for name in ("run.json", "codebook.safetensors"):
        moved.write(name, run.read(name))
    _, (again,), _ = resumed(monkeypatch, moved.url)
    assert again.run_url == moved.url and again.out == f"memory://{tmp_path.name}/runs"


def test_a_run_whose_directory_has_another_name_is_refused(make_run, monkeypatch, tmp_path):
    _, run = make_run()
    run.path.rename(tmp_path / "other")
    code, trained, said = resumed(monkeypatch, str(tmp_path / "other"))
    assert code == 2 and trained == [] and "holds the run 'toy'" in said.replace("\n", " ")


@pytest.mark.parametrize(("ranges", "notices"), [("calibrated", 1), ("paper", 0)])
def test_a_plan_says_at_once_that_it_trains_a_pilot_and_keeps_nothing(ranges, notices, tmp_path, monkeypatch, capfd):
    def calibrate(*_):
        told.append(capfd.readouterr())  # what is shown before it begins
        return {"kind": "loguniform", "sigma_min": 0.5, "sigma_max": 20.0}

    told = []
    monkeypatch.setattr("dbtrain.run.calibrate.calibrate", calibrate)
    size = ["model.depth=3", "model.dim=16", "model.heads=2", f"noise.ranges={ranges}", f"out={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        cli.app(["plan", str(CONFIGS / "vit_digits.yaml"), *size])
    assert ended.value.code == 0 and len(told) == notices and not list(tmp_path.iterdir())
    for shown in told:
        assert "training the pilots that calibrate the range" in shown.err and shown.out == ""
        assert "nothing of the run itself is trained, and nothing is kept" in " ".join(shown.err.split())
    rest = capfd.readouterr()
    assert "goes to" in rest.out and "pilot" not in rest.out + rest.err


def test_a_plan_shows_the_steps_and_batch_of_each_block(tmp_path, capfd):
    size = ["model.depth=3", "model.dim=16", "model.heads=2", "noise.ranges=paper", f"out={tmp_path}"]
    own = "training.blocks={0: {steps: 90, batch_size: 50}, 2: {steps: 41}}"
    with pytest.raises(SystemExit) as ended:
        cli.app(["plan", str(CONFIGS / "vit_digits.yaml"), *size, "training.steps=60", own])
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "this machine" in line]
    assert [row[11:13] for row in cells] == [["90", "50"], ["60", "128"], ["41", "128"]]
    of_a_step = [float(row[13]) for row in cells]
    assert of_a_step[1] == of_a_step[2] == pytest.approx(of_a_step[0] * 128 / 50, rel=0.01)
    assert "FLOPs of all steps: blocks" in shown


def test_a_plan_for_nodes_that_are_not_here_says_which_of_them_holds_what(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    size = ["model.depth=3", "model.dim=16", "model.heads=2", "noise.ranges=paper", f"out={tmp_path}"]
    large = ["cluster.blocks.0.resources.large=1", "cluster.blocks.0.workers=2"]
    command = ["plan", str(CONFIGS / "vit_digits.yaml"), *size, *large, "--node", "2xCPU=4,GPU=1"]
    with pytest.raises(SystemExit) as ended:
        cli.app([*command, "--node", "CPU=8, GPU=2, large=2"])
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    where = [
        [cell.strip() for cell in line.split("│")][-2] for line in shown.splitlines() if "│" in line and "node " in line
    ]
    assert where == ["node 2, node 2", "node 0", "node 1"]
    for given, told in (
        ([], "fits on no empty cluster"),
        (["--node", "GPU"], "--node GPU is no node: write what it has"),
        (["--node", "99999999xCPU=1"], "more than 10,000 nodes cannot be planned"),
        (["--node", "cpu=4"], "Ray writes CPU in capitals"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.app([*command, *given])
        assert ended.value.code != 0
        assert told in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("option", [["--nodes", "2"], ["--gpus", "1"]])
def test_a_plan_for_a_cluster_is_refused_without_one(option):
    result = CliRunner().invoke(cli.app, ["doctor", *option])
    assert result.exit_code == 2 and "--address" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError("Unable to allocate 745. GiB"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 1),
        (RuntimeError("something else"), 70),
    ],
)
def test_memory_that_runs_out_is_no_bug(make_run, monkeypatch, error, code):
    def evaluate(*_):
        raise error

    monkeypatch.setattr(cli.results, "evaluate_and_say", evaluate)
    result = CliRunner().invoke(cli.app, ["eval", make_run()[1].url])
    said = " ".join(result.output.split())
    assert result.exit_code == code
    assert (f"the memory ran out ({error})" in said) == (code == 1) != ("this is a bug" in said)
