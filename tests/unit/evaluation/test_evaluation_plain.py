"""Blocks of networks of diffusers as folders of their own class: the same bits by the library alone."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.evaluation.export.plain import boundary_ratio
from dbtrain.evaluation.export.routing import check_weights
from dbtrain.evaluation.opening import open_run
from dbtrain.method.ranges import Ranges
from dbtrain.run.merge import merge
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from tests.unit.evaluation.alone import run_alone
from tests.unit.models.originals import SETTINGS, arch_of, original
from tests.unit.small_runs import BASE, commit, never

FLOW = {"noise": {"process": "flow", "shift": 3.0}}
CASES = {
    "dit_alone": ("hf_dit", {"blocks": 1, "noise": {}}),
    "dit_repeat": ("hf_dit", {"blocks": 2, "noise": {}, "init": {"layers": "repeat"}, "model": {"depth": 6}}),
    "dit_slice": ("hf_dit", {"blocks": 3, "noise": {}, "init": {"layers": "slice"}}),
    "dit_frozen": ("hf_dit", {"blocks": 2, "noise": {}, "init": {"layers": "slice", "stem": "frozen"}}),
    "wan_repeat": ("hf_wan", {"blocks": 2, **FLOW, "init": {"layers": "repeat"}, "model": {"depth": 6}}),
}
ALONE = """
import json, os, sys
import diffusers, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    config = json.loads((folder / "config.json").read_text())
    kind, asked, made = getattr(diffusers, config["network"]["class"]), load_file(f"{folder}.safetensors"), {}
    for block, row in enumerate(config["blocks"]):
        model = kind.from_pretrained(folder / row["file"], local_files_only=True).eval()
        given, time, labels = (asked[f"{name}.{block}"] for name in ("given", "time", "labels"))
        with torch.no_grad():
            if hasattr(model.config, "text_dim"):
                table = load_file(folder / row["file"] / "inputs.safetensors")["classes.weight"]
                text = table[labels].reshape(len(labels), 2, -1)
                made[str(block)] = model(given[:, :, None], time, text).sample[:, :, 0].contiguous()
            else:
                made[str(block)] = model(given, timestep=time, class_labels=labels).sample
    save_file(made, f"{folder}.made.safetensors")
    code = (folder / "README.md").read_text().split("```python\\n")[1].split("```")[0]
    os.chdir(folder)  # all folders are given as absolute paths
    found = {}
    exec(code, found)  # of the card
    loaded = sorted(name for name, value in found.items() if isinstance(value, torch.nn.Module))
    assert loaded == sorted(row["file"].replace("-", "_") for row in config["blocks"]), loaded
"""


def settled(out, name, case, changes):
    model = {"arch": arch_of(case), "config": SETTINGS[case], **changes.get("model", {})} if case else BASE["model"]
    init = {"init": {"from": str(out / case), **changes["init"]}} if "init" in changes else {}
    if init and not (out / case).exists():
        original(case, out / case)
    config = load_config(None, [f"out={out}"], base={**BASE, **changes, "model": model, **init, "name": name})
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    commit(run, blocks=range(read_manifest(run).blocks))
    merge(Run(run))
    return Run(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return {name: settled(out, name, *case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    to = tmp_path_factory.mktemp("plain")
    for name, run in runs.items():
        result = CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(to / name), "--plain"])
        assert result.exit_code == 0, result.output
        assert "README.md says how to load it" in " ".join(result.output.split())
    return to


def asked(run):
    """What each block's network is given at a level of its own, and what the block makes of it."""
    model, labels = open_run(run, torch.device("cpu")), torch.tensor([3, 10])
    tensors, answers = {}, {}
    for block, network in enumerate(model.blocks):
        level = torch.full((2,), sum(model.run_plan.ranges.of(block)) / 2)
        noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(block))
        given = network.parametrisation.scale_input(noisy, level)
        time = network.cut_as.time(level, network.parametrisation)
        tensors |= {f"given.{block}": given, f"time.{block}": time, f"labels.{block}": labels.clone()}
        answers[block] = network, noisy, level, network.predict(model.run_plan.runs(block), noisy, level, labels)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, answers


def test_every_file_of_weights_has_its_hash_beside_the_folders(exported):
    folder = exported / "wan_repeat"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    hashes = json.loads((folder / "config.json").read_text())["sha256"]
    assert set(hashes) == files and {"transformer/inputs.safetensors", "transformer_2/inputs.safetensors"} < files
    check_weights(folder, hashes)


@torch.no_grad()
def test_the_library_alone_computes_what_each_block_computes_bit_for_bit(runs, exported):
    answers = {}
    for name, run in runs.items():
        tensors, answers[name] = asked(run)
        save_file(tensors, exported / f"{name}.safetensors")
    run_alone(ALONE, [exported / name for name in runs])
    for name in runs:
        made = load_file(exported / f"{name}.made.safetensors")
        for block, (network, noisy, level, estimate) in answers[name].items():
            own = network.parametrisation.estimate(made[str(block)][:, :1], noisy, level)
            assert torch.equal(own, estimate), (name, block)
            assert made[str(block)].abs().max() > 0.01


def test_the_folders_are_those_of_the_library_under_the_names_of_its_pipeline(exported, tmp_path_factory):
    own = {"README.md", "config.json"}
    names = {name: {path.name for path in (exported / name).iterdir()} - own for name in CASES}
    assert names["dit_alone"] == {"transformer"} and names["wan_repeat"] == {"transformer", "transformer_2"}
    assert names["dit_repeat"] == {"block-0", "block-1"} and len(names["dit_slice"]) == 3
    folder = exported / "wan_repeat" / "transformer_2"
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 3
    files = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*files, "inputs.safetensors"}
    assert {path.name for path in (exported / "dit_slice" / "block-2").iterdir()} == files
    base = str(tmp_path_factory.getbasetemp()).encode()
    assert [p for name in CASES for p in (exported / name).rglob("*") if p.is_file() and base in p.read_bytes()] == []


def test_what_started_from_a_folder_has_the_keys_of_that_folder(exported, runs):
    source = runs["dit_repeat"].store.url.rsplit("/", 1)[0] + "/hf_dit/diffusion_pytorch_model.safetensors"
    given = {name: tensor.shape for name, tensor in load_file(source).items()}
    for block in ("block-0", "block-1"):
        file = exported / "dit_repeat" / block / "diffusion_pytorch_model.safetensors"
        assert {name: tensor.shape for name, tensor in load_file(file).items()} == given


def test_the_class_refuses_what_lies_above_the_folders(exported):
    import diffusers

    for name, kind in (("dit_slice", "DiTTransformer2DModel"), ("wan_repeat", "WanTransformer3DModel")):
        with pytest.raises(OSError, match="no file named"):
            getattr(diffusers, kind).from_pretrained(exported / name, local_files_only=True)


def test_the_card_says_what_a_pipeline_needs(exported):
    text = (exported / "wan_repeat" / "README.md").read_text()
    ratio = json.loads((exported / "wan_repeat" / "config.json").read_text())["boundary_ratio"]
    assert f"`boundary_ratio={ratio}`" in text and "(1 - t) y + t eps" in text and "`transformer_2`" in text
    assert "boundary_ratio" not in json.loads((exported / "dit_repeat" / "config.json").read_text())


EDGES = (0.875, 0.9, 0.3, 0.7500000000000001, 0.8221743, 2 / 3, 1 / 3, 0.001, 0.9999)


@pytest.mark.parametrize("edge", EDGES)
def test_the_boundary_divides_the_timesteps_of_schedulers_as_the_edge_divides_the_levels(edge):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    ratio, ranges = boundary_ratio(edge, 1000), Ranges((1.0, edge, 0.0))
    near = torch.tensor(1000 * edge, dtype=torch.float32)
    around = [near]
    for _ in range(3):
        ends = around[0], around[-1]
        around = [torch.nextafter(ends[0], -near), *around, torch.nextafter(ends[1], 2 * near)]
    steps = [torch.stack(around), torch.arange(1001), torch.arange(1001).float()]
    for shift in (1.0, 3.0, 5.0):
        euler = FlowMatchEulerDiscreteScheduler(shift=shift)
        unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        for count in (4, 40, 50):
            for scheduler in (euler, unipc):
                scheduler.set_timesteps(count)
                steps.append(scheduler.timesteps)
    boundary = ratio * 1000  # as WanPipeline has it
    noisier = [bool(t >= boundary) for row in steps for t in row]
    assert noisier == [ranges.owner(float(t) / 1000) == 0 for row in steps for t in row]
    assert noisier == [float(t) >= boundary for row in steps for t in row]
    assert True in noisier and False in noisier


@pytest.mark.parametrize("edge", EDGES)
def test_no_smaller_ratio_divides_so(edge):
    smaller = math.nextafter(boundary_ratio(edge, 1000), 0.0)
    first = torch.tensor(1000 * edge, dtype=torch.float32)
    around = [first, torch.nextafter(first, -first), torch.nextafter(first, 2 * first)]
    wrong = [t for t in around if bool(t >= smaller * 1000) != (float(t) / 1000 > edge)]
    assert wrong or smaller <= edge


def test_the_pipeline_of_wan_asks_the_network_that_owns_the_level_with_its_own_embeddings(runs, exported):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    folder, asked_at = exported / "wan_repeat", []
    config = json.loads((folder / "config.json").read_text())
    names = ("transformer", "transformer_2")
    parts = {name: WanTransformer3DModel.from_pretrained(folder / name, local_files_only=True) for name in names}
    tables = [load_file(folder / name / "inputs.safetensors")["classes.weight"] for name in names]
    embeds = [table[torch.tensor([3])].reshape(1, 2, -1) for table in tables]
    for number, part in enumerate(parts.values()):

        def note(_, args, given, number=number):
            right = torch.equal(given["encoder_hidden_states"], embeds[number])
            asked_at.append((number, float(given["timestep"][0]), right))

        part.register_forward_pre_hook(note, with_kwargs=True)
    pipeline = WanPipeline(
        **parts, tokenizer=None, text_encoder=None, vae=None, boundary_ratio=config["boundary_ratio"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def change(of, step, t, given):
        after = of.scheduler.timesteps[step + 1 :]
        low = len(after) and float(after[0]) / 1000 <= runs["wan_repeat"].plan.ranges.edges[1]
        return {"prompt_embeds": embeds[1] if low else given["prompt_embeds"]}

    made = pipeline(
        prompt_embeds=embeds[0], height=64, width=64, num_frames=1, num_inference_steps=12, guidance_scale=1.0,
        output_type="latent", callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).frames  # fmt: skip
    assert made.shape == (1, 1, 1, 8, 8) and bool(made.isfinite().all())
    ranges = runs["wan_repeat"].plan.ranges
    assert [number for number, t, _ in asked_at] == [ranges.owner(t / 1000) for _, t, _ in asked_at]
    assert {number for number, _, _ in asked_at} == {0, 1} and all(right for *_, right in asked_at)


def test_a_stack_of_the_user_is_written_as_the_class_that_it_builds(tmp_path, monkeypatch):
    text = "from dbtrain.models.adapters.dit import DiTStack\n\n\nclass Mine(DiTStack):\n    original = 'Mine'\n"
    (tmp_path / "my_plain_stack.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    own = {"model": {"arch": "my_plain_stack:Mine"}, "noise": {}}
    run, to = settled(tmp_path, "mine", "hf_dit", own), tmp_path / "to"
    without = CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(to)])
    assert without.exit_code == 2 and "or try --plain" in " ".join(without.output.split())
    assert CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(to), "--plain"]).exit_code == 0
    assert "from diffusers import DiTTransformer2DModel\n" in (to / "README.md").read_text()


def refused(run, to):
    result = CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(to), "--plain"])
    assert result.exit_code == 2 and "Traceback" not in result.output and not to.exists()
    return " ".join(result.output.split())


def test_what_the_original_has_no_place_for_is_refused_by_name(tmp_path):
    codes = {"codebook": {"dim": 11}}
    told = refused(settled(tmp_path, "vit", "hf_vit", {"blocks": 3, **codes}), tmp_path / "to")
    assert "ViTForImageClassification has no place for what was added" in told and "stem.added.code.weight" in told
    joint = settled(tmp_path, "joint", "hf_dit", {"blocks": 3, "noise": {}, "method": "joint"})
    assert "this run is of method=joint" in refused(joint, tmp_path / "to")
    own = settled(tmp_path, "own", None, {})
    assert "model.arch=vit is no network of another library: leave out --plain" in refused(own, tmp_path / "to")
