"""Every key of the configuration, misspelt and mis-set: the message says what, the value, and what to write."""

import re

import pytest
from pydantic import BaseModel

from dbtrain.config import Config, load_config
from dbtrain.config.known_keys import sections_of, tag_of
from dbtrain.coordinator.train import train
from dbtrain.errors import ConfigError, PlacementError
from dbtrain.evaluation.metrics import METRICS, metric_of
from dbtrain.models.registry import ARCHITECTURES, architecture
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.trackers import check_installed
from tests.unit.conftest import SMALL

NEEDED = {
    "encoded": {"path": "x"},
    "idx": {"path": "x"},
    "hf": {"path": "x", "classes": 3},
    "text": {"path": "x"},
    "hf_text": {"path": "x"},
    "latents": {"path": "x", "classes": 3},
    "images": {"path": "pictures"},
    "jsonl": {"path": "texts.jsonl"},
}
"""What a source of data must be told."""
FOREIGN = ("valid ", "Input", "parse", "[key]", "instance of", "discriminator", "tag")
"""Words of pydantic's that say nothing to a user, but where they are ours."""


def refused(override, base=SMALL):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override], base=base)
    message = str(caught.value).removeprefix("the configuration: ")
    assert "\n" not in message
    return message


def every_key():
    """(key, the section's base configuration), for every member of each union."""
    for name, field in Config.model_fields.items():
        for member in sections_of(field.annotation) or [None]:
            base = {**SMALL}
            if member is not None and name in ("model", "data"):
                tag = tag_of(member)
                base[name] = {"arch": tag} if name == "model" else {"source": tag, **NEEDED.get(tag, {})}
            yield from ((key, base) for key in below(member, name))


def below(member, name):
    if member is None:
        return [name]
    keys = []
    for key, field in member.model_fields.items():
        inner = sections_of(field.annotation)
        middle = f"{name}.{key}.0" if "dict" in str(field.annotation) else f"{name}.{key}"
        keys += below(inner[0], middle) if inner else [f"{name}.{key}"]
    return keys


KEYS = list({(key, str(base)): (key, base) for key, base in every_key()}.values())
IDS = [f"{base['model']['arch']}-{base['data']['source']}-{key}" for key, base in KEYS]


def test_the_walk_reaches_every_kind_of_key():
    names = {key for key, _ in KEYS}
    wanted = {"seed", "model.stream", "data.labels", "training.blocks.0.lr", "training.optimizer.betas", "out"}
    assert wanted <= names and len(KEYS) > 120 and issubclass(Config, BaseModel)


@pytest.mark.parametrize(("key", "base"), KEYS, ids=IDS)
def test_a_misspelt_key_is_told_by_the_one_that_was_meant(key, base):
    section, dot, last = key.rpartition(".")
    swapped = f"{section}{dot}{last}e" if len(last) < 4 else f"{section}{dot}{last[:-2]}{last[-1]}{last[-2]}"
    if last[-2:] == last[-1:] * 2:
        swapped = key + "x"
    message = refused(f"{swapped}=1", base)
    assert f"unknown key {swapped}; did you mean " in message and key in message.split("did you mean")[1]


@pytest.mark.parametrize(("key", "base"), KEYS, ids=IDS)
@pytest.mark.parametrize("value", ["{a: {b: c}}", "[[x], {y: z}]", "-1.5e400"])
def test_a_value_of_another_kind_is_told_with_its_key_and_what_to_write(key, base, value):
    try:
        load_config(None, [f"{key}={value}"], base=base)
    except ConfigError as error:
        message = str(error).removeprefix("the configuration: ")
    else:
        return  # text may be anything
    assert key.split(".")[0] in message and key.rpartition(".")[2] in message, message
    assert "\n" not in message and not any(word in message for word in ("Input", "[key]", "discriminator", "union"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.arch=vti",
            "model.arch=vti is none of vit, dit, .*, hf_vit, .*; did you mean vit?",
        ),
        ("model.arch=", "model.arch is empty: give one of vit, dit, masked_lm, recurrent, ar_lm"),
        ("data.source=digit", "data.source=digit is none of digits, .*; did you mean digits?"),
        ("model=vit", "model=vit is no section of keys: write model.arch=vit"),
        ("telemetry.trackers=tensorboard", "is no list: write 'telemetry.trackers=\\[tensorboard\\]'"),
        ("telemetry.trackers=[tensorbord]", "trackers.0=tensorbord is none of .*; did you mean tensorboard?"),
        ("layers_per_block=2", "layers_per_block=2 is no list: write 'layers_per_block=\\[2\\]'"),
        ("training.lr=1", "did you mean training.optimizer.lr or training.blocks.NUMBER.lr?"),
        ("lr=1", "did you mean training.optimizer.lr or training.blocks.NUMBER.lr?"),
        ("steps=1", "did you mean training.steps or init.branch.steps or evaluation.steps?"),
        ("data.batch_size=1", "did you mean training.batch_size or evaluation.batch_size?"),
        ("training.learning_rate=1", "did you mean training.optimizer.lr?"),
        ("model.width=1", "did you mean model.dim?"),
        ("depth=1", "unknown key depth; did you mean model.depth?"),
        ("optimizer.lr=1", "unknown key optimizer; did you mean training.optimizer.lr?"),
        ("optimizer.warmupp=1", "unknown key optimizer; did you mean training.optimizer.warmup?"),
        ("training.optimiser.lr=1", "unknown key training.optimiser; did you mean training.optimizer.lr?"),
        ("traininng.stps=1", "unknown key traininng; did you mean training.steps?"),
        ("train.steps=1", "unknown key train; did you mean training.steps?"),
        ("train.zzz=1", "unknown key train; did you mean training?"),
        ("branch.steps=1", "unknown key branch; did you mean init.branch.steps?"),
        ("gpus=1", "did you mean cluster.gpus_per_worker?"),
        ("model.stream=concat", "it is for model.arch=ar_lm, and this is vit, where these are known: arch, depth"),
        ("training.optimizer=adam", "write training.optimizer.KEY=VALUE with one of name, lr, "),
        ("training.blocks.x.lr=1", "training.blocks.x: a block is named by its number"),
        ("training.optimizer.lr=inf", "training.optimizer.lr=inf: it must be a finite number"),
        (
            "model.heads=5",
            "model.dim=16 is not a multiple of model.heads=5: set model.heads=2 or 4 or 8, or model.dim=20",
        ),
        ("noise.sigma_min=90", "noise.sigma_min=90 is not below noise.sigma_max=10"),
        ("name=a b", "name=a b must be made of letters"),
        ("seed=", "seed is empty: give an integer"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_write(override, message):
    told = refused(override)
    assert re.search(message.rstrip("?"), told), told
    assert not any(word in told for word in FOREIGN), told


@pytest.mark.parametrize("arch", ["ar_lm", "masked_lm", "recurrent"])
def test_rotary_positions_need_an_even_head(arch):
    base = {**SMALL, "model": {"arch": arch, "dim": 18, "heads": 3}, "data": {"source": "python_topics"}}
    assert load_config(None, base=base).model.heads == 3
    assert "model.dim=18 is not an even multiple of model.heads=2: set" in refused("model.heads=2", base)
    assert "model.heads=2: set model.dim" not in refused("model.heads=2", base)


def test_what_the_message_proposes_is_accepted():
    for dim in (7, 12, 60, 97):
        for heads in range(1, 10):
            base = {**SMALL, "model": {**SMALL["model"], "dim": dim, "heads": heads}}
            if dim % heads:
                told = refused("seed=0", base).split(": set ")[1]
                proposed, width = re.fullmatch(r"(?:model\.heads=([0-9or ]+), or )?model\.dim=(\d+)", told).groups()
                for number in (proposed or "").split(" or "):
                    assert number and load_config(None, [f"model.heads={number}"], base=base)
                assert load_config(None, [f"model.dim={width}"], base=base).model.dim > dim


def test_every_metric_that_does_not_fit_names_those_that_do():
    for arch in ARCHITECTURES:
        data = {"source": "digits"} if "image" in architecture(arch).takes else {"source": "python_topics"}
        for metric in METRICS:
            blocks = 1 if arch == "recurrent" else 3
            base = {**SMALL, "blocks": blocks, "model": {"arch": arch}, "data": data}
            config = load_config(None, [f"evaluation.metric={metric}"], base=base)
            if METRICS[metric].fits(architecture(arch)):
                continue
            with pytest.raises(ConfigError) as caught:
                metric_of(config)
            named = str(caught.value).split("set it to ")[1].split(", ")
            assert named and all(METRICS[name].fits(architecture(arch)) for name in named)
    with pytest.raises(ConfigError, match="fit model.arch=vit: accuracy, or leave it out"):
        metric_of(load_config(None, ["evaluation.metric=fid"], base=SMALL))


class Silent:
    """A view that nobody looks at."""

    def tell(self, line):
        pass

    show = table = tell


def pilot(*_):
    raise AssertionError("a pilot was trained")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["cluster.gpus_per_worker=2"], ConfigError, "gpus_per_worker=2, and a worker computes on one GPU"),
        (["cluster.device=cuda"], PlacementError, "cluster.device=cuda, but none of the 1 nodes has a GPU"),
        (["cluster.cpus_per_worker=999"], PlacementError, "wants 1 worker.s. of 999 CPU and fits on no empty cluster"),
        (["telemetry.trackers=[mlflow]"], ConfigError, "mlflow, which is not installed: pip install mlflow"),
        (["model.patch=3"], ConfigError, "model.patch=3 does not divide the 8x8 image"),
        (["codebook.dim=9"], ConfigError, "no room for 10 orthogonal codes"),
        (["training.batch_size=7", "cluster.workers=2"], ConfigError, "batch_size=7 cannot be shared by 2 workers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_it_is_told_before_a_pilot_is_trained(make_config, tmp_path, monkeypatch, overrides, error, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("dbtrain.coordinator.train.connect", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setattr("dbtrain.telemetry.trackers.find_spec", lambda name: name if name == "tensorboard" else None)
    config = make_config("noise.ranges=calibrated", *overrides)
    with pytest.raises(error, match=message):
        train(config, Silent(), pilot)
    assert not (tmp_path / "toy").exists()


def test_a_tracker_that_is_installed_is_not_refused(monkeypatch):
    monkeypatch.setattr("dbtrain.telemetry.trackers.find_spec", lambda name: name if name == "tensorboard" else None)
    check_installed(["tensorboard"])
    check_installed([])


def test_a_run_that_exists_is_continued_where_only_what_is_left_of_it_fits(make_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = make_config("cluster.cpus_per_worker=999")
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), pilot)

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr("dbtrain.coordinator.train.connect", reached)
    with pytest.raises(Reached):
        train(config, Silent(), pilot)


@pytest.mark.parametrize("given", ["blocks=true", "training.steps=yes", "training.ema=no", "model.dim=true"])
def test_a_truth_value_is_no_number(given):
    with pytest.raises(ConfigError) as caught:
        load_config("vit_digits", [given])
    key = given.partition("=")[0]
    assert f"{key}=" in str(caught.value) and "are no values of this key" in str(caught.value)
    assert load_config("vit_digits", ["training.compile=yes", "cluster.cpus_per_worker=1"]).training.compile
