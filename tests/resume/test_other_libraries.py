"""Every class of another library by what a user does: plan, train, die, resume bitwise, merge, use, export, load.

By two workers, under ZeRO 2 and 3. Layers do not divide evenly over the blocks, nor most widths over the workers. What
a kill leaves is a run whose newest commits are missing: other processes train it on.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.models.adapters.names import is_added, our_name
from dbtrain.run.merge import merge
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.conftest import ROOT
from tests.unit.evaluation.alone import run_alone

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

DEPTH, STEPS, CUT = 3, 4, 2
WAN = {"num_layers": DEPTH, "num_attention_heads": 1, "attention_head_dim": 14, "ffn_dim": 25, "freq_dim": 16}
VIT = {"num_hidden_layers": DEPTH, "hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 25}
LLAMA = {"num_hidden_layers": DEPTH, "hidden_size": 15, "num_attention_heads": 1, "num_key_value_heads": 1}
RANGE = {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0}
CASES: dict[str, dict[str, Any]] = {
    "hf_vit": {"model": {"config": {**VIT, "patch_size": 4}}, "codebook": {"dim": 11}, "noise": RANGE},
    "hf_llama": {
        "model": {"config": {**LLAMA, "head_dim": 6, "intermediate_size": 25}},
        "data": {"source": "python_topics", "length": 13},
        "codebook": {"dim": 11, "source": "random"},
        "noise": RANGE,
    },
    "hf_dit": {"model": {"config": {"num_layers": DEPTH, "num_attention_heads": 2, "attention_head_dim": 8}}},
    "hf_wan": {"model": {"config": {**WAN, "text_dim": 7}}},
    "hf_wan_captions": {"model": {"config": WAN}},
}
WORKERS = 2
SHARING = {"zero2": (2, "fp32"), "zero3": (3, "bf16")}
"""ZeRO stage and precision; of the runs under ZeRO 2 only block 0 is trained."""
CLASSES = {
    "hf_vit": "ViTForImageClassification",
    "hf_llama": "LlamaForCausalLM",
    "hf_dit": "DiTTransformer2DModel",
    "hf_wan": "WanTransformer3DModel",
}
ALONE = """
import importlib.util, json, sys
import torch
from pathlib import Path

for folder in map(Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"modeling_{folder.name}", folder / "modeling.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load()
    if hasattr(module, "classify"):
        made = module.classify(model, torch.zeros(2, 1, 8, 8))
    elif hasattr(module, "generate"):
        made = module.generate(model, torch.zeros(2, 3, dtype=torch.int64), 2).float()
    elif "text" in model.config["shape"]:
        made = module.sample(model, module.with_mask(torch.ones(2, 4, 7), torch.ones(2, 4).bool()), steps=2)
    else:
        made = module.sample(model, torch.arange(2), steps=2)
    assert made.isfinite().all() and len(made) == 2, folder
print("all loaded")
"""


def arch_of(case: str) -> str:
    return case.removesuffix("_captions")


def configuration(case: str, sharing: str, folder: Path) -> dict[str, Any]:
    stage, precision = SHARING[sharing]
    changes = {"data": {"source": "digits"}, **CASES[case]}
    if case == "hf_wan_captions":
        changes["data"] = {"source": "encoded", "path": str(folder / "captions.safetensors")}
    if changes["data"]["source"] != "digits":
        changes["data"]["cache"] = str(folder / "cache")
    training = {"steps": STEPS, "batch_size": 18, "checkpoint_every": CUT, "zero_stage": stage, "precision": precision}
    common = {"name": f"{case}-{sharing}", "blocks": 2, "out": str(folder), "cluster": {"workers": WORKERS}}
    return {**common, "training": training, **changes, "model": {"arch": arch_of(case), **changes["model"]}}


def torchrun(attempt: int, jobs: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/resume/several_runs.py"), str(attempt), *jobs],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def cut(run: Path) -> Path:
    """The run as a kill of block 0 after its first commit leaves it."""
    copy = Path(shutil.copytree(run, run.with_name(f"{run.name}-killed")))
    shutil.rmtree(copy / f"blocks/00/step_{STEPS:08d}")
    return copy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Directories of runs by sharing and case, merged if all is trained; beside each lies the one that was killed and
    resumed."""
    folder = tmp_path_factory.mktemp("runs")
    draws = torch.Generator().manual_seed(0)
    text, mask = torch.randn(60, 4, 7, generator=draws), torch.rand(60, 4, generator=draws) < 0.7
    latent = torch.randn(60, 3, 1, 8, 8, generator=draws)
    save_file({"latent": latent, "text": text, "mask": mask}, folder / "captions.safetensors")
    found = {sharing: {case: prepared(case, sharing, folder) for case in CASES} for sharing in SHARING}
    shared = [run for cases in found.values() for run in cases.values()]
    torchrun(1, [f"0:{run}" for run in shared] + [f"1:{run}" for run in found["zero3"].values()])
    torchrun(2, [f"0:{cut(run)}" for run in shared])
    for run in found["zero3"].values():
        merge(Run(Store(str(run))))
    return found


def prepared(case: str, sharing: str, folder: Path) -> Path:
    config = load_config(None, [], base=configuration(case, sharing, folder))
    store = Store(config.run_url)
    store.makedirs()
    prepare(config, Run(store), never)
    return Path(store.path)


def never(*_: object) -> Any:
    raise AssertionError("nothing here needs a calibration")


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob(f"blocks/00/step_{STEPS:08d}/*.safetensors")}


@pytest.mark.parametrize("sharing", SHARING)
def test_what_was_killed_and_resumed_has_the_bits_of_what_was_not(
    trained: dict[str, dict[str, Path]], sharing: str
) -> None:
    for case, run in trained[sharing].items():
        again = run.with_name(f"{run.name}-killed")
        whole, killed = shards(run), shards(again)
        assert len(whole) == 3 and whole == killed, case
        seen = [json.loads(line) for line in (again / "blocks/00/attempts/2/events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in seen if event["event"] == "resumed"] == [CUT], case
        ready = next(event for event in seen if event["event"] == "ready")
        assert (ready["world_size"], ready["zero_stage"]) == (WORKERS, SHARING[sharing][0]), case


@pytest.mark.parametrize("case", CASES)
def test_the_shards_have_the_originals_keys_and_are_trained(trained: dict[str, dict[str, Path]], case: str) -> None:
    run = trained["zero3"][case]
    model = Run(Store(str(run))).plan.model(0, "meta")
    stack, original = model.stack, model.cut_as.build(range(DEPTH))  # type: ignore[operator, union-attr]
    assert type(original).__name__ == CLASSES[arch_of(case)]
    wanted = {our_name(stack, name): tuple(value.shape) for name, value in original.named_parameters()}
    for block, layers in enumerate(([0, 1], [2])):
        files = [run / f"blocks/{block:02d}/step_{step:08d}/model.safetensors" for step in (CUT, STEPS)]
        before, after = (load_file(file) for file in files)
        own = {name.removeprefix(f"blocks.{block}."): value for name, value in after.items()}
        held = {n for n in wanted if not n.startswith("layers.") or int(n.split(".")[1]) in layers}
        assert {name for name in own if not is_added(name)} == held
        assert all(tuple(own[name].shape) == wanted[name] for name in held)
        assert all(not torch.equal(before[name], after[name]) for name in after if after[name].any())


def command(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, (arguments, result.output)
    return " ".join(result.output.split())


@pytest.mark.parametrize("case", CASES)
def test_each_is_planned_and_used(trained: dict[str, dict[str, Path]], case: str, tmp_path: Path) -> None:
    run = trained["zero3"][case]
    (tmp_path / "run.yaml").write_text(json.dumps(configuration(case, "zero3", run.parent)))
    arch = arch_of(case)
    assert f"{CLASSES[arch]}: its layers are" in command("plan", tmp_path / "run.yaml", f"out={tmp_path}")
    few = ["evaluation.samples=8", "evaluation.steps=2", "evaluation.steps_per_block=1"]
    if arch in ("hf_vit", "hf_llama"):
        command("eval", run, *few)
        return
    told = command("sample", run, "--count", 3, "--steps", 4, "--guidance", 2, "--out", tmp_path / "made.npy")
    assert "3 samples" in told


def test_exports_load_where_dbtrain_cannot_be_imported(trained: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    for case, run in trained["zero3"].items():
        command("export", run, "--to", tmp_path / case)
    assert "all loaded" in run_alone(ALONE, [tmp_path / case for case in CASES])
