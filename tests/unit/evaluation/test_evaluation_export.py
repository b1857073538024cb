"""An exported folder gives the same bits as the merged model, in a process that cannot import this package."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.data.encoded import as_encoded
from dbtrain.errors import ConfigError
from dbtrain.evaluation.export.abilities import sample
from dbtrain.evaluation.export.bundle import bundle
from dbtrain.evaluation.export.card import _named
from dbtrain.evaluation.export.modeling import ABLE
from dbtrain.evaluation.export.routing import check_weights
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.merged_model import readouts
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.text.uncached import uncached
from dbtrain.evaluation.text.unmasking import unmasking
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.masked_context import with_mask
from dbtrain.method.sampler import spaced_levels
from dbtrain.models.registry import ARCHITECTURES, architecture
from dbtrain.run.merge import merge
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store
from tests.own_network import write_files
from tests.unit.evaluation.alone import run_alone
from tests.unit.models.originals import SETTINGS
from tests.unit.small_runs import BASE, commit, never

CPU = torch.device("cpu")
TEXT = {"source": "python_topics", "length": 24}
LLM = {"depth": 3, "dim": 16, "heads": 2}
CODES = {"dim": 32}
CASES = {
    "vit": {},
    "vit_alone": {"method": "end_to_end", "blocks": 1},
    "vit_joint": {"method": "joint"},
    "vit_frozen": {"init": {"stem": "frozen", "head": "frozen"}},
    "vit_loops": {"model": {**BASE["model"], "loops": [1, 2, 2]}},
    "dit": {"model": {**BASE["model"], "arch": "dit"}, "noise": {"ranges": "paper"}, "blocks": 3},
    "dit_flow": {"model": {**BASE["model"], "arch": "dit"}, "noise": {"process": "flow", "shift": 3.0}, "blocks": 3},
    "dit_latents": {
        "model": {**BASE["model"], "arch": "dit"},
        "data": {"source": "encoded", "path": "FILES", "classes": 10},
        "noise": {"process": "flow"},
    },
    "ar_lm": {"model": {**LLM, "arch": "ar_lm"}, "data": TEXT, "codebook": CODES, "blocks": 3},
    "ar_lm_concat": {
        "model": {**LLM, "arch": "ar_lm", "stream": "concat"},
        "data": TEXT,
        "codebook": CODES,
        "blocks": 3,
    },
    "recurrent": {"model": {**LLM, "arch": "recurrent"}, "data": TEXT, "codebook": CODES, "blocks": 1},
    "masked_lm": {"model": {**LLM, "arch": "masked_lm"}, "data": TEXT, "noise": {}, "blocks": 3},
    "hf_vit": {"model": {"arch": "hf_vit", "config": SETTINGS["hf_vit"]}},
    "hf_dit": {"model": {"arch": "hf_dit", "config": SETTINGS["hf_dit"]}, "noise": {}, "blocks": 3},
    "hf_wan": {"model": {"arch": "hf_wan", "config": SETTINGS["hf_wan"]}, "noise": {}, "blocks": 2},
    "hf_wan_text": {
        "model": {"arch": "hf_wan", "config": SETTINGS["hf_wan"]},
        "data": {"source": "encoded", "path": "FILES"},
        "noise": {},
    },
    "hf_llama": {"model": {"arch": "hf_llama", "config": SETTINGS["hf_llama"]}, "data": TEXT, "codebook": CODES},
    "hf_llama_tied": {
        "model": {"arch": "hf_llama", "config": SETTINGS["hf_llama_tied"]},
        "data": TEXT,
        "codebook": CODES,
        "blocks": 3,
    },
}
ALONE = """
import importlib.util, json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file

torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"modeling_{folder.name}", folder / "modeling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model = module.load(verify=True)
    asked = load_file(str(folder) + ".safetensors")
    facts = json.loads(Path(str(folder) + ".json").read_text())
    wrong = []
    with torch.no_grad():
        for number, (text, owner) in enumerate(facts["levels"]):
            level = float.fromhex(text)
            if int(model.block_of(level)) != owner:
                wrong.append(f"level {level} to block {int(model.block_of(level))}, not {owner}")
            given = asked["noisy"], level, asked["context"]
            for name, made in (("output", model(*given)), ("estimate", model.denoise(*given))):
                if not torch.equal(made, asked[f"{name}.{number}"]):
                    wrong.append(f"{name} at {level}")
        for call, arguments in facts["calls"].items():
            if not torch.equal(getattr(module, call)(model, asked[f"{call}.given"], *arguments), asked[call]):
                wrong.append(call)
    found[folder.name] = wrong
print(json.dumps(found))
"""


def settled(out, name, cache):
    changes = {"evaluation": {"start": "noise", "readout": "chain"}, **CASES[name], "name": name}
    data = changes.get("data", BASE["data"])
    cached = [f"data.cache={cache}"] if data["source"] != "digits" else []
    if data["source"] == "encoded":
        draws, file = torch.Generator().manual_seed(9), cache / f"{name}.safetensors"
        latents, text = 3 + 2 * torch.randn(40, 1, 8, 8, generator=draws), torch.randn(40, 5, 8, generator=draws)
        captions = {"text": text, "mask": torch.rand(40, 5, generator=draws) < 0.7}
        save_file({"latent": latents, **({"label": torch.arange(40) % 10} if "classes" in data else captions)}, file)
        changes["data"] = {**data, "path": str(file)}
    if "init" in changes:
        changes["init"] = {**changes["init"], "from": f"{out}/vit_alone", "layers": "slice"}
    config = load_config(None, [f"out={out}", *cached], base={**BASE, **changes})
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    commit(run, blocks=range(read_manifest(run).blocks))
    merge(Run(run))
    return Run(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out, cache = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("tokens")
    return {name: settled(out, name, cache) for name in CASES}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Folders by case, written by the command."""
    to = tmp_path_factory.mktemp("exported")
    for name, run in runs.items():
        result = CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(to / name)])
        assert result.exit_code == 0, result.output
    return to


def levels_of(edges):
    """Every edge, its neighbours among float64, and levels between and outside."""
    around = [near for edge in edges for near in (edge, math.nextafter(edge, math.inf), math.nextafter(edge, 0.0))]
    between = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return [level for level in (*around, *between) if level > 0]


def calls(model, name):
    """What the functions of the exported file are given, and what this package has them give."""
    config, labels = model.run_plan.config, torch.arange(5)
    if "text" in model.run_plan.shape:
        draws = torch.Generator().manual_seed(5)
        labels = with_mask(torch.randn(5, 5, 8, generator=draws), torch.rand(5, 5, generator=draws) < 0.7)
    images = 2 * torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)) - 1
    if name == "classify":
        batch = {"image": images, "label": torch.zeros(5, dtype=torch.int64)}
        made = readouts(model.evaluations(batch, model.draws(labels)))[config.evaluation.readout]
        return images, [], made
    if name == "sample":
        levels = spaced_levels(model.run_plan.noise(), model.run_plan.ranges, 6, "karras")
        sampling = Sampling(levels, "heun", 1.5, 7)
        shape = model.run_plan.shape["image"]
        samples = draw(model.run_plan, lambda b: model.blocks[b], labels, shape, sampling, 5)
        return labels, [6, "heun", "karras", 1.5, 7], as_encoded(samples, model.run_plan.shape)
    prompt = torch.randint(0, 27, (3, 4), generator=torch.Generator().manual_seed(4))
    continues = uncached if name == "generate" else unmasking
    return prompt, [5, 0.8, 2], continues(model, prompt, 5, 0.8, 2)


def asked(run):
    """Tensors and facts with which an exported folder is compared: what the merged model answers."""
    model, kind = open_run(run, CPU), architecture(run.config.model.arch)
    noise, positions = model.run_plan.noise(), torch.arange(2)
    tokens = torch.randint(0, 27, (2, 24), generator=torch.Generator().manual_seed(1))
    image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    text = {"text": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(6)), "mask": torch.ones(2, 5).bool()}
    example = model.example({"tokens": tokens, "image": image, "label": positions, **text})
    draws = Draws(torch.tensor(derive_seed(0)), positions)
    noisy = noise.prior(tuple(example.clean.shape[1:]), draws)
    if kind.noised == "tokens":
        noisy = torch.where(tokens % 2 == 0, noisy, tokens)
    tensors, facts = {"noisy": noisy, "context": example.context}, {"levels": [], "calls": {}}
    for number, level in enumerate(levels_of(model.run_plan.ranges.edges)):
        owner = model.run_plan.ranges.owner(level)
        given = torch.full((2, *noise.level_shape(example)), level, dtype=torch.float64).float()
        output, estimate = model.denoiser(example.context)(owner, noisy, given)
        tensors |= {f"output.{number}": output, f"estimate.{number}": estimate}
        facts["levels"].append([level.hex(), owner])
    for name in [name for name, fits in ABLE.items() if fits(kind)]:
        given, arguments, made = calls(model, name)
        tensors |= {f"{name}.given": given, name: made}
        facts["calls"][name] = arguments
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, facts


@torch.no_grad()
def test_it_gives_the_bits_of_the_merged_model_where_this_package_cannot_be_imported(runs, exported):
    for name, run in runs.items():
        tensors, facts = asked(run)
        save_file(tensors, exported / f"{name}.safetensors")
        (exported / f"{name}.json").write_text(json.dumps(facts))
    assert json.loads(run_alone(ALONE, [exported / name for name in runs])) == {name: [] for name in runs}


def test_every_architecture_of_the_package_is_tried():
    tried = {case.get("model", BASE["model"])["arch"] for case in CASES.values()}
    assert tried == set(ARCHITECTURES)


def refused(run, to, *options):
    result = CliRunner().invoke(cli.app, ["export", run, "--to", str(to), *options])
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    return " ".join(result.output.split())


def test_the_folder_holds_nothing_else_and_no_place_of_this_machine(runs, exported, tmp_path_factory):
    folder = exported / "dit"
    weights = {f"block-{block}.safetensors" for block in range(3)}
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "modeling.py", *weights}
    names = {path.name for path in (exported / "vit_frozen").iterdir()}
    assert "common.safetensors" in names and "blocks.safetensors" in {
        p.name for p in (exported / "vit_joint").iterdir()
    }
    base = str(tmp_path_factory.getbasetemp()).encode()
    for name in runs:
        assert [path for path in (exported / name).iterdir() if base in path.read_bytes()] == []


def test_a_bit_that_was_flipped_on_the_way_is_found_when_asked_for(exported, tmp_path):
    copy = shutil.copytree(exported / "vit_frozen", tmp_path / "copy")
    hashes = json.loads((copy / "config.json").read_text())["sha256"]
    assert set(hashes) == {path.name for path in copy.glob("*.safetensors")} and len(hashes) == 3
    check_weights(copy, hashes)
    for name in hashes:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} has the SHA-256 .*fetch it anew"):
            check_weights(copy, hashes)
        (copy / name).write_bytes(whole)


def test_classes_that_would_apply_all_layers_in_a_chain_refuse_the_folder(exported):
    import diffusers
    import transformers

    classes = {
        "hf_dit": diffusers.DiTTransformer2DModel,
        "hf_wan": diffusers.WanTransformer3DModel,
        "hf_vit": transformers.ViTForImageClassification,
        "hf_llama": transformers.LlamaForCausalLM,
    }
    for name, kind in classes.items():
        assert json.loads((exported / name / "config.json").read_text())["_class_name"] == "RoutedBlocks"
        with pytest.raises(OSError, match="no file named"):
            kind.from_pretrained(exported / name, local_files_only=True)
    with pytest.raises(ValueError, match="dbtrain_routed"):
        transformers.AutoModel.from_pretrained(exported / "hf_llama", local_files_only=True)
    text = (exported / "hf_wan" / "README.md").read_text()
    assert f"It needs PyTorch and diffusers (it was exported with {diffusers.__version__}) and safetensors" in text


def test_the_card_says_what_was_trained_on_what_and_who_answers_where(runs, tmp_path):
    run = runs["dit"]
    run.store.write_json("evaluation.json", {"metric": "accuracy", "scores": {"test": {"chain": 0.25}}})
    assert CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(tmp_path / "to")]).exit_code == 0
    text, edges = (tmp_path / "to" / "README.md").read_text(), run.plan.ranges.edges
    assert f"| 1 | 1 | {edges[2]:.6g} | {edges[1]:.6g} | 2 | block-1.safetensors |" in text
    assert "source `digits`" in text and run.manifest.data_hash in text and "| chain | 0.2500 |" in text
    assert "from modeling import load, sample" in text and "not finished" not in text


def test_the_card_has_no_scores_of_an_older_model(runs, tmp_path):
    run, to = runs["dit"], tmp_path / "to"
    for weights, shown in ((run_weights(run), True), ("0" * 64, False)):
        record = {"metric": "accuracy", "scores": {"test": {"chain": 0.25}}, "weights": weights}
        run.store.write_json("evaluation.json", record)
        assert CliRunner().invoke(cli.app, ["export", run.store.url, "--to", str(to)]).exit_code == 0
        assert ("0.2500" in (to / "README.md").read_text()) is shown


@pytest.mark.parametrize("given", [{"solver": "DPMSolverMultistepScheduler"}, {"steps": 0}])
def test_samples_are_drawn_by_no_other_solver_than_asked_for(given):
    with pytest.raises(ConfigError, match=str(next(iter(given.values())))):
        sample(None, torch.arange(2), **given)


def test_an_exported_model_refuses_levels_classes_and_captions_that_it_never_saw(exported):
    loaded = {}
    for name in ("dit", "hf_dit", "hf_wan_text"):
        spec = importlib.util.spec_from_file_location(f"modeling_{name}", exported / name / "modeling.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded[name] = module, module.load()
    module, model = loaded["hf_dit"]
    noisy, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 9])
    high, low = model.ranges.edges[0], model.ranges.edges[-1]
    for level in (2 * high, low / 2, -1.0, math.nan, torch.tensor([high, 2 * high])):
        with pytest.raises(ValueError, match=f"outside of the range that this model was trained on, {low:g} to"):
            model.denoise(noisy, level, labels)
    for level in (high, low):
        assert model.denoise(noisy, torch.tensor(level, dtype=torch.float32), labels).shape == noisy.shape
    for name in ("dit", "hf_dit"):
        module, model = loaded[name]
        for wrong in (torch.tensor([10]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([[1]])):
            with pytest.raises(module.ConfigError, match="whole numbers .* from 0 to 9"):
                module.sample(model, wrong)
    module, model = loaded["hf_wan_text"]
    text, mask = torch.zeros(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    for wrong in (text, module.with_mask(text[:, :4], mask[:, :4]), torch.tensor([3])):
        with pytest.raises(module.ConfigError, match="embeddings with their mask"):
            module.sample(model, wrong)
    assert "sample(model, with_mask(text, mask))" in (exported / "hf_wan_text" / "README.md").read_text()


def run_weights(run):
    return MergedDirectory(run.merged).weights_hash


def test_nothing_that_somebody_added_is_lost(runs, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir(), (tmp_path / "link").symlink_to(tmp_path / "real")
    for added in ("__pycache__", "LICENSE"):  # the first is Python's, and made anew
        done = CliRunner().invoke(cli.app, ["export", runs["dit"].store.url, "--to", str(tmp_path / "link")])
        assert done.exit_code == 0 and (tmp_path / "link").is_symlink(), done.output
        (tmp_path / "real" / added).mkdir()
    done = CliRunner().invoke(cli.app, ["export", runs["dit"].store.url, "--to", str(tmp_path / "link")])
    assert done.exit_code == 2 and "(LICENSE)" in done.output and (tmp_path / "real" / "LICENSE").exists()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["export", runs["dit"].store.url, "--to", "."])
    assert done.exit_code == 2 and "runs in" in done.output


def test_the_card_names_data_without_its_folders():
    assert _named({"source": "text", "path": "../home/me/texts"}) == ", `texts`"
    assert _named({"source": "hf", "path": "someone/pictures"}) == ", `someone/pictures`"
    assert _named({"source": "digits"}) == ""


def test_the_code_of_the_card_runs(exported):
    text = (exported / "vit" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    given = "images = torch.zeros(2, 1, 8, 8)\nnoisy, level, context = torch.zeros(2, 11), 1.0, images\nprobabilities"
    code = code.replace("probabilities", given, 1) + "print(tuple(probabilities.shape), tuple(estimate.shape))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=exported / "vit", capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "(2, 10) (2, 11)\n", done.stderr


def test_the_generated_file_is_clean(exported, runs):
    """No name is missing, unused or defined twice."""
    files = [str(exported / name / "modeling.py") for name in runs]
    options = ["check", "--isolated", "--select", "F", "--no-cache"]
    done = subprocess.run([sys.executable, "-m", "ruff", *options, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_folder_with_something_else_is_refused_and_an_older_export_replaced(runs, tmp_path):
    run, to = runs["vit"].store.url, tmp_path / "to"
    to.mkdir()
    (to / "thesis.tex").write_text("years of work")
    assert f"--to {to} exists and is no export: remove it" in refused(run, to)
    assert [path.name for path in to.iterdir()] == ["thesis.tex"]
    assert "is a file" in refused(run, to / "thesis.tex") and "no directory" in refused(run, to / "a" / "b")
    assert "is a URL" in refused(run, "s3://bucket/x")
    other = tmp_path / "other"
    for _ in range(2):
        assert CliRunner().invoke(cli.app, ["export", run, "--to", str(other)]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "to"]


def test_a_run_that_is_not_merged_is_exported_only_when_asked_for_and_marked(tmp_path):
    config = load_config(None, [f"out={tmp_path}", "training.steps=5"], base=BASE)
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    commit(run)  # at step 2
    assert "holds no merged model" in refused(run.url, tmp_path / "to") and not (tmp_path / "to").exists()
    result = CliRunner().invoke(cli.app, ["export", run.url, "--to", str(tmp_path / "to"), "--now"])
    assert result.exit_code == 0 and "its blocks are not done: steps 2 of 5, 2 of 5" in " ".join(result.output.split())
    assert "**The training is not finished: steps 2 of 5, 2 of 5.**" in (tmp_path / "to" / "README.md").read_text()


def test_what_needs_this_package_to_run_is_refused_by_name(tmp_path, monkeypatch):
    forward = settled_alone(tmp_path, {"method": "forward_forward"})
    assert "method=forward_forward cannot be exported" in refused(forward, tmp_path / "to")
    write_files(tmp_path)
    (tmp_path / "my_net.py").rename(tmp_path / "my_exported_net.py")
    monkeypatch.chdir(tmp_path)
    own = {"arch": "my_exported_net:MyModel"}
    assert "is a class of your own" in refused(settled_alone(tmp_path, {"model": own}), tmp_path / "to")


def settled_alone(out, changes):
    config = load_config(None, [f"out={out}"], base={**BASE, "name": f"own{len(list(out.iterdir()))}", **changes})
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    commit(run, blocks=range(read_manifest(run).blocks))
    merge(Run(run))
    return run.url


def test_what_the_bundler_does_not_understand_is_refused():
    with pytest.raises(ValueError, match=r"dbtrain.method.ranges has no nothing"):
        bundle([("dbtrain.method.ranges", "nothing")], "title", "")
    clash = [("dbtrain.data.latents", "PIECE"), ("dbtrain.data.packed", "PIECE")]
    with pytest.raises(ValueError, match="PIECE is defined by dbtrain.data.(latents|packed) and by"):
        bundle(clash, "title", "")


def test_a_tokenizer_of_hugging_face_goes_along(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["a", "b", "c", "d"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text(" ".join(words * 400))
    data = {
        "source": "text",
        "path": str(tmp_path / "text.txt"),
        "tokenizer": str(tmp_path / "words.json"),
        "length": 8,
    }
    data["cache"] = str(tmp_path / "cache")
    url = settled_alone(tmp_path, {"model": {**LLM, "arch": "masked_lm"}, "data": data, "noise": {}})
    assert CliRunner().invoke(cli.app, ["export", url, "--to", str(tmp_path / "to")]).exit_code == 0
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    assert json.loads((tmp_path / "to" / "config.json").read_text())["tokenizer"] == "words.json"
    assert "Tokenizer.from_file('tokenizer.json')" in (tmp_path / "to" / "README.md").read_text()
    (tmp_path / "words.json").unlink()
    assert CliRunner().invoke(cli.app, ["export", url, "--to", str(tmp_path / "to")]).exit_code == 0
    assert "`words.json`, which was not at hand" in (tmp_path / "to" / "README.md").read_text()
