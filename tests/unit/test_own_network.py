"""A network of the user's by its import path: found, checked, bound to its run, and refused by name."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.config import load_config, parse_config
from dbtrain.coordinator.ray.shipping import runtime_env
from dbtrain.errors import ConfigError
from dbtrain.evaluation import merged_model
from dbtrain.evaluation.report import evaluate_run
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.models.import_path import own_class
from dbtrain.models.registry import architecture, checked, own_architecture
from dbtrain.run.make_plan import design
from dbtrain.run.merge import merge
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.own_network import fenced, write_files
from tests.unit import small_runs
from tests.unit.evaluation.test_evaluation_pipeline import ThreadHosts

NET = "my_net:MyModel"
BASE = {
    "name": "run",
    "blocks": 3,
    "model": {"arch": NET, "width": 16},
    "data": {"source": "digits"},
    "codebook": {"dim": 16},
    "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    "training": {"steps": 4, "batch_size": 64},
}


def never(*_):
    raise AssertionError("nothing here needs a calibration")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Current directory with the document's files; what is imported from it is forgotten after the test."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_files(tmp_path)
    forget()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    forget()


def forget():
    """As a new process."""
    sys.modules.pop("my_net", None)
    own_class.cache_clear()
    checked.cache_clear()
    importlib.invalidate_caches()


def config(*overrides, arch=NET):
    return load_config(None, [*overrides, f"model.arch={arch}"], base=BASE)


def change(folder, old, new):
    text = (folder / "my_net.py").read_text()
    assert old in text
    (folder / "my_net.py").write_text(text.replace(old, new))


def settled(folder):
    chosen = config(f"out={folder}/runs")
    store = Store(chosen.run_url)
    store.makedirs()
    prepare(chosen, Run(store), never)
    return chosen.run_url


def test_the_keys_of_the_section_are_the_arguments_of_the_class(folder):
    given = config("model.depth=9")
    assert given.model.model_dump() == {"arch": NET, "depth": 9, "loops": None, "width": 16}
    assert parse_config(given.model_dump(mode="json"), "run.json") == given


def test_the_example_of_the_document_is_split_and_starts_as_if_it_were_told_no_level(folder):
    run_plan = Run(Store(settled(folder))).plan
    models = [run_plan.model(block) for block in range(3)]
    assert [set(model.layers) for model in models] == [{"0", "1"}, {"2", "3"}, {"4", "5"}]
    code, image = torch.randn(5, 16), torch.randn(5, 1, 8, 8)
    for model in models:
        layer = next(iter(model.layers.values()))
        hidden, level = torch.randn(5, 16), torch.randn(5, 16)
        assert torch.equal(layer(hidden, level), layer(hidden, torch.zeros(5, 16)))
        numbers = [int(number) for number in model.layers]
        assert model.predict(numbers, code, torch.full((5,), 2.0), image).shape == (5, 10)
    assert len([line for line in fenced("python").splitlines() if line]) <= 40


def test_what_is_imported_is_named_before_it_is(folder, monkeypatch):
    (folder / "my_net.py").write_text("print('the code ran')\n" + fenced("python"))
    done = CliRunner().invoke(app, ["plan", "my_net.yaml", "noise.ranges=explicit", "noise.edges=[9,3,1,0.1]"])
    assert done.exit_code == 0, done.output
    told = f"model.arch={NET}: importing my_net from {folder}/my_net.py"
    assert done.output.count(told) == 1 and done.output.index(told) < done.output.index("the code ran")


def test_it_is_found_in_the_current_directory_by_the_installed_command_too(folder):
    """Whose own directory, not the current one, is the first on Python's path."""
    code = "import sys; sys.path.pop(0); from dbtrain.models.registry import architecture as a; a('my_net:MyModel')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.widht=8"], "unknown key model.widht; did you mean model.width?"),
        (["model.heads=2"], "unknown key model.heads; it is for model.arch=.*vit.*, and this is my_net:MyModel.*width"),
        (["model.width=wide"], "model.width=wide: it must be an int"),
        (["model.depth=0"], "model.depth=0: .*greater than or equal to 1"),
    ],
    ids=str,
)
def test_keys_are_refused_as_those_of_the_package_are(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("my_nt:MyModel", r"no module my_nt in .* or on PYTHONPATH: give the command where my_nt.py"),
        ("my_net.part:MyModel", r"there is no module my_net.part: check"),
        ("my_net:MyModle", r"my_net.py has no class MyModle; its classes are Layer, MyModel; did you mean MyModel"),
        ("my_net:Layer", "is no BlockModel: inherit"),
        ("my_net:functional", "has no class functional"),
        ("my_net.py:MyModel", "there is no module my_net.py: check"),
        ("./my_net.py:MyModel", "is no import path: write MODULE:CLASS"),
        ("my_net:", "is no import path"),
        ("__main__:MyModel", "there is no module __main__ in|has no class MyModel"),
        ("sys:MyModel", "there is no module sys in"),
        ("my_net", "model.arch=my_net is none of vit, .*; a class of your own is my_file:MyModel"),
    ],
    ids=str,
)
def test_what_is_no_class_of_a_network_is_refused_by_name(arch, message):
    with pytest.raises(ConfigError, match=message):
        config(arch=arch)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "import torch\n",
            "import torch, not_there\n",
            "fails with ModuleNotFoundError.*not_there.*line 1.*a package",
        ),
        (
            "import torch\n",
            "1 / 0\n",
            "importing my_net fails with ZeroDivisionError: division by zero .*my_net.py, line 1",
        ),
        ("import torch\n", "import (\n", "fails with SyntaxError.*my_net.py, line 1"),
        ("import torch\n", "raise SystemExit(0)\n", "fails with SystemExit"),
        ("def denoised", "def denoise", "lacks denoised: write what BlockModel says"),
        ("depth: int = 6, ", "", "constructor lacks depth, which the run gives"),
        (", codebook, image,", ", image,", "constructor lacks codebook"),
        (", image, depth", ", depth", "constructor lacks image"),
        ("layers=None)", "layers=None, **more)", "must name each of its arguments"),
        ("width: int = 64", "width=64", "its argument width has no type"),
        ("width: int = 64", "width: 'Widht' = 64", "types of its constructor cannot be read: .*Widht"),
        ("width: int = 64", "width: torch.Tensor = 64", "cannot be keys of a configuration"),
        ("width: int = 64", "loops: int = 64, width: int = 64", "its argument loops has the name of a key"),
        ('("image",), True', "'image', True", r"takes='image': write a tuple of names"),
        ('= "classes", ("', '= True, ("', "codes=True: name the entry of the data"),
        ("codes, takes", "samples = True\n    codes, takes", "samples=True: name the entry of the data .*takes="),
        (
            "codes, takes",
            "likelihood = 'next'\n    codes, takes",
            "likelihood='next', which is none of next_token, elbo",
        ),
        ("codes, takes", "natural_parametrisation = 'epsilon'\n    codes, takes", "natural_parametrisation='epsilon'"),
    ],
    ids=str,
)
def test_a_class_that_is_no_architecture_is_refused_with_what_it_lacks(folder, old, new, message):
    change(folder, old, new)
    with pytest.raises(ConfigError, match=message):
        config()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "range(depth) if layers is None else layers",
            "range(depth)",
            "made the layers 0, 1, .* where 0, 1 were",
        ),
        ("self.layers =", "self.parts =", "made the layers none where 0, 1 were"),
        ("self.head =", "self.tail = nn.Linear(1, 1); self.head =", "has the parameter tail.weight"),
        (", persistent=False", "", "has the buffer codebook.*persistent=False"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_split_is_refused_before_the_run_is_sealed(folder, old, new, message):
    change(folder, old, new)
    with pytest.raises(ConfigError, match=message):
        settled(folder)
    assert not (folder / "runs/run/run.json").exists()


def test_the_painter_of_the_document_learns_and_draws(folder):
    (folder / "my_net.py").write_text(fenced("python") + "\n\n" + fenced("py", "class Painter"))
    wide = ["model.width=8", "blocks=2", "layers_per_block=[4,2]", "training.steps=2", "out=runs"]
    noise = {"ranges": "paper", "weighting": "edm"}
    base = {key: value for key, value in BASE.items() if key != "codebook"}
    chosen = load_config(None, wide, base={**base, "model": {"arch": "my_net:Painter"}, "noise": noise})
    run = Run(Store(chosen.run_url))
    run.store.makedirs()
    prepare(chosen, run, never)
    data = load_data(chosen).train.batch(torch.arange(16), torch.device("cpu"))
    for block in range(2):
        objective = run.plan.objective(block)
        objective(data, torch.tensor(1), torch.arange(16)).backward()
        found = {name: parameter.grad for name, parameter in objective.named_parameters()}
        assert all(grad is not None and grad.isfinite().all() for grad in found.values()), found
    small_runs.commit(run.store)
    merge(Run(run.store))
    done = CliRunner().invoke(app, ["sample", "runs/run", "--count", "4", "--steps", "4", "--out", "a.npy"])
    assert done.exit_code == 0, done.output
    assert np.load("a.npy").shape == (4, 1, 8, 8)


def test_a_class_of_the_package_may_be_built_upon(folder):
    (folder / "my_vit.py").write_text(
        "from dbtrain.models.vit import ViT\n\n\nclass Mine(ViT):\n"
        "    def loss(self, output, target):\n        return 2 * super().loss(output, target)\n"
    )

    def loss(arch):
        chosen = load_config(None, ["model.heads=2", "model.dim=16"], base={**BASE, "model": {"arch": arch}})
        data, positions = load_data(chosen), torch.arange(8)
        batch = data.train.batch(positions, torch.device("cpu"))
        return design(chosen, data, never).objective(0)(batch, torch.tensor(1), positions)

    assert torch.allclose(loss("my_vit:Mine"), 2 * loss("vit"))


def test_a_run_is_bound_to_the_content_of_the_file(folder):
    url = settled(folder)
    assert Run(Store(url)).manifest.model_hash == own_architecture(NET).content_hash
    forget()
    assert Run(Store(url)).plan.model(1).layers.keys() == {"2", "3"}
    change(folder, "functional.gelu", "functional.relu")
    forget()
    with pytest.raises(ConfigError, match=r"my_net.py \(model.arch=my_net:MyModel\) is not what run run was"):
        _ = Run(Store(url)).plan
    (folder / "my_net.py").unlink()
    forget()
    with pytest.raises(ConfigError, match="no module my_net in"):
        _ = Run(Store(url)).plan


def test_shards_of_a_changed_network_are_of_another_architecture(folder):
    """Places that prepared the same run from files that differ do not mix their blocks."""
    one = Run(Store(settled(folder))).manifest
    change(folder, "functional.gelu", "functional.relu")
    forget()
    other = settled(folder / "elsewhere")
    assert Run(Store(other)).manifest.config_hash == one.config_hash
    assert Run(Store(other)).manifest.architecture_hash != one.architecture_hash


def test_an_error_of_the_network_itself_shows_where_it_arose_and_is_no_bug_of_ours(folder):
    change(folder, "hidden = self.layers[str(i)]", "hidden = 1 / 0 + self.layers[str(i)]")
    done = CliRunner().invoke(app, ["plan", "my_net.yaml", "noise.ranges=explicit", "noise.edges=[9,3,1,0.1]"])
    assert done.exit_code == 1 and "ZeroDivisionError" in done.output and "Traceback" in done.output
    assert f"this arose in your own {folder}/my_net.py, line " in done.output and "bug in dbtrain" not in done.output


def test_no_code_is_imported_from_a_run_directory(folder, monkeypatch):
    url = settled(folder)
    (Path(url) / "other_net.py").write_text("print('it ran')\n" + fenced("python"))
    monkeypatch.chdir(url)
    with pytest.raises(ConfigError, match="lies in the run directory .*/runs/run, and no code is imported from one"):
        config(arch="other_net:MyModel")
    assert "other_net" not in sys.modules


def test_a_package_is_shipped_whole_and_a_file_by_itself(folder):
    (folder / "nets/deep").mkdir(parents=True)
    for name in ("nets/__init__.py", "nets/deep/__init__.py"):
        (folder / name).touch()
    (folder / "nets/deep/mlp.py").write_text(fenced("python"))
    assert own_architecture(NET).shipped == folder / "my_net.py"
    package = own_architecture("nets.deep.mlp:MyModel")
    assert package.shipped == folder / "nets"
    assert runtime_env("auto", [package.shipped])["py_modules"][1:] == [str(folder / "nets")]
    assert own_architecture("vit") is None


def test_an_installed_package_may_give_a_short_name(folder, monkeypatch):
    (folder / "nets-1.0.dist-info").mkdir()
    (folder / "nets-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: nets\nVersion: 1.0\n")
    (folder / "nets-1.0.dist-info/entry_points.txt").write_text(f"[dbtrain.architectures]\nresidual = {NET}\n")
    monkeypatch.syspath_prepend(str(folder))
    assert architecture("residual").__name__ == "MyModel"
    assert config(arch="residual").model.width == 16
    with pytest.raises(ConfigError, match="unknown key model.widht; did you mean model.width?"):
        config("model.widht=8", arch="residual")


def test_a_class_with_random_constants_that_reads_by_its_weights_is_used_block_after_block(folder, monkeypatch):
    code = fenced("python")
    for old, new in (
        ("self.head =", 'self.register_buffer("shift", torch.randn(width), persistent=False)\n        self.head ='),
        ("return self.head(hidden)", "return self.head(hidden + self.shift)"),
        ("clean=self.codebook[", "clean=0 * self.head.weight[0, 0] + self.codebook["),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (folder / "my_net.py").write_text(code)
    model, training = {"arch": NET, "width": 16, "depth": 3}, {"steps": 2, "batch_size": 64, "ema": 0.0}
    base = {**BASE, "blocks": 2, "model": model, "training": training}
    store = small_runs.settled(folder / "runs", **base)
    small_runs.commit(store)
    merge_and_verify(Run(store))
    monkeypatch.setattr(merged_model, "WAITING", 1)  # a batch at a time
    one, every = ["evaluation.batch_size=90", "evaluation.resident=one"], ["evaluation.batch_size=90"]
    here = evaluate_run(Run(store), every)[1]
    assert evaluate_run(Run(store), one)[1] == here
    pipeline = [*every, "evaluation.resident=pipeline"]
    assert evaluate_run(Run(store), pipeline, hosts=lambda config: ThreadHosts(3, mortal=2, last=2))[1] == here
