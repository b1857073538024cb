from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from dbtrain.config import Config, load_config, parse_config
from dbtrain.config.overrides import read_override, write_override
from dbtrain.config.section import sections_of
from dbtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = {"name": "one", "model": {"arch": "vit"}, "data": {"source": "digits"}}


def config(*overrides, **content):
    return load_config(None, overrides, base={**SMALL, **content})


def refused(*overrides, **content):
    with pytest.raises(ConfigError) as caught:
        config(*overrides, **content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_there_are_shipped_configurations():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_says_how_to_run_it(path):
    loaded = load_config(path)
    assert loaded.blocks <= loaded.model.depth
    assert path.read_text().startswith("#")


def test_defaults():
    small = config()
    assert (small.blocks, small.method, small.seed, small.noise.ranges) == (3, "diffusion_blocks", 0, "calibrated")
    assert (small.training.steps, small.training.batch_size, small.training.keep) == (600, 128, 2)
    assert (small.noise.p_mean, small.noise.p_std, small.noise.sigma_min, small.noise.sigma_max) == (
        -1.2,
        1.2,
        0.002,
        80,
    )
    assert small.noise.weighting == "none" and small.noise.overlap == 0.05
    assert small.run_url == "runs/one" and config("out=s3://bucket/x/").run_url == "s3://bucket/x/one"


def test_a_file_and_the_overrides_after_it(tmp_path):
    path = write(tmp_path, "name: a\nseed: 3\nmodel: {arch: vit, depth: 4}\ndata: {source: digits}\n")
    loaded = load_config(path, ["model.depth=12", "seed=7", "seed=8"])
    assert (loaded.name, loaded.model.depth, loaded.seed, loaded.model.dim) == ("a", 12, 8, 64)
    assert load_config(path).seed == 3


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("training.optimizer.lr=3e-4", lambda c: c.training.optimizer.lr, 3e-4),
        ("training.compile=true", lambda c: c.training.compile, True),
        ("training.micro_batch=null", lambda c: c.training.micro_batch, None),
        ("layers_per_block=[1,2,3]", lambda c: c.layers_per_block, (1, 2, 3)),
        ("training.optimizer.betas=[0.8,0.9]", lambda c: c.training.optimizer.betas, (0.8, 0.9)),
        ("cluster.blocks.1.workers=2", lambda c: c.cluster.blocks[1].workers, 2),
        ("training.blocks.1.lr=3e-4", lambda c: c.training.of_block(1).optimizer.lr, 3e-4),
        ("training.blocks.1.lr=3e-4", lambda c: c.training.of_block(0).optimizer.lr, 1e-3),
        ("training.blocks.1.batch_size=5", lambda c: c.training.of_block(1).batch_size, 5),
        ("training.blocks.1.batch_size=5", lambda c: c.training.of_block(2).batch_size, 128),
        ("training.blocks.1.ema=0", lambda c: c.training.of_block(1).ema, 0.0),
        ("training.blocks.1.steps=150", lambda c: c.training.of_block(1).steps, 150),
        ("training.blocks.1.steps=150", lambda c: c.training.of_block(0).steps, 600),
        ("cluster.resources={a b: 1}", lambda c: c.cluster.resources, {"a b": 1.0}),
        ("cluster.resources.fast_disk=1", lambda c: c.cluster.resources, {"fast_disk": 1.0}),
        ("telemetry.trackers=[tensorboard]", lambda c: c.telemetry.trackers, ("tensorboard",)),
        ("cluster.address=head:6379", lambda c: c.cluster.address, "head:6379"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides_take_the_type_of_their_key(override, read, value):
    got = read(config(override))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainin.steps=4", ["unknown key trainin", "did you mean training.steps?"]),
        ("training.step=4", ["unknown key training.step", "did you mean training.steps?"]),
        ("training.optimizer.warmupp=4", ["training.optimizer.warmupp", "did you mean training.optimizer.warmup?"]),
        ("model.dept=3", ["model.dept", "did you mean model.depth?"]),
        ("data.validaton=0.2", ["validaton", "did you mean data.validation?"]),
        ("cluster.blocks.1.wrkers=2", ["cluster.blocks.1.wrkers", "did you mean cluster.blocks.1.workers?"]),
        ("noise.zzzzz=2", ["noise.zzzzz", "known here: ", "sigma_min"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override, words):
    message = refused(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.depth=2.5", ["model.depth=2.5", "integer"]),
        ("model.depth=many", ["model.depth=many", "integer"]),
        ("blocks=0", ["blocks=0", "greater than or equal to 1"]),
        ("data.validation=1", ["data.validation=1", "less than 1"]),
        ("training.precision=fp8", ["training.precision=fp8", "'fp32' or 'bf16'"]),
        ("training.keep=1", ["training.keep=1"]),
        ("noise.sigma_max=nan", ["noise.sigma_max=nan"]),
        ("data.source=imagenet", ["imagenet", "digits"]),
        ("name=../elsewhere", ["name=../elsewhere"]),
        ("name=", ["name"]),
        ("model.depth=2 #3", ["model.depth=2 #3", "integer"]),
        ("layers_per_block=[1, 2 #, 3]", ["layers_per_block=[1, 2 #, 3]", "no list"]),
        ("data.path=???", ["data.path=??? gives no value"]),
        ("training.steps=*all", ["training.steps=*all", "integer"]),
        ("seed=${nothing}", ["nothing"]),
        ("training.offload=all", ["training.offload needs training.zero_stage"]),
        ("method=end_to_end", ["method=end_to_end trains one block, not blocks=3"]),
        ("cluster.blocks.1.gpus_per_worker=0", ["gpus_per_worker=0", "greater than 0"]),
        ("cluster.blocks.3.workers=1", ["cluster.blocks names block 3; the last is 2"]),
        ("training.blocks.3.lr=0.1", ["training.blocks names block 3; the last is 2"]),
        ("noise.process=maskin", ["noise.process='maskin' is none of gaussian, flow, masking; did you mean masking?"]),
        ("noise.process=masking", ["makes tokens noisy, and model.arch=vit denoises vectors", "then gaussian"]),
        (
            "model.heads=5",
            ["model.dim=64 is not a multiple of model.heads=5: set model.heads=", "model.dim=65"],
        ),
        ("noise.ranges=papr", ["noise.ranges=papr", "is none of calibrated, ", "paper"]),
        ("training.blocks.1.lr=-1", ["training.blocks.1.lr=-1", "greater than 0"]),
        ("training.blocks.1.steps=0", ["training.blocks.1.steps=0", "greater than or equal to 1"]),
        ("training.blocks.1.batch_size=2.5", ["training.blocks.1.batch_size=2.5", "integer"]),
        ("training.blocks.1.ema=1", ["training.blocks.1.ema=1", "less than 1"]),
        ("training.blocks.1.checkpoint_every=5", ["unknown key training.blocks.1.checkpoint_every"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(override, words):
    message = refused(override)
    assert all(word in message for word in words), message


PLAIN_TEXT = {
    "out": lambda c: c.out,
    "data.path": lambda c: c.data.path,
    "data.cache": lambda c: c.data.cache,
    "evaluation.judge": lambda c: c.evaluation.judge,
    "telemetry.project": lambda c: c.telemetry.project,
}
TEXTS = {"source": "text", "path": "x"}
ODD = [
    "/data/runs #1",
    "#1",
    "a: b",
    "C:",
    "@home",
    "*",
    "*.txt",
    "&a b",
    "!x",
    "%TMP%",
    "`x`",
    "|",
    "> x",
    "- x",
    "? x",
    "[a",
    "[a]",
    "{a: 1}",
    "off",
    "yes",
    "true",
    "~",
    "2024",
    "007",
    "1e-3",
    ".5",
    "2024-01-01",
    "12:30",
    "nan",
    "a=b",
    " x ",
    "it's",
    'a "b" c',
    "'a' or 'b'",
    "\\\\server\\new",
    "caf\u00e9 \U0001f600",
    "a\tb\nc",
]


@pytest.mark.parametrize("text", ODD)
def test_text_is_taken_as_it_stands(text):
    loaded = config(*(f"{key}={text}" for key in PLAIN_TEXT), data=TEXTS)
    assert [read(loaded) for read in PLAIN_TEXT.values()] == [text] * len(PLAIN_TEXT)


def test_a_run_keeps_its_name_whatever_yaml_makes_of_it():
    for name in ("off", "2024", "1e-3", "007", "2024-01-01"):
        assert config(f"name={name}").name == name


@given(st.sampled_from(sorted(PLAIN_TEXT)), st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_can_be_written_as_an_override_and_nearly_every_one_as_it_stands(key, text):
    assume(text != "???")
    assert PLAIN_TEXT[key](config(write_override(key, text), data=TEXTS)) == text
    assume(text not in ("", "null") and text[0] not in "\"'" and "${" not in text)
    assert PLAIN_TEXT[key](config(f"{key}={text}", data=TEXTS)) == text


@pytest.mark.parametrize(
    ("value", "read"),
    [("null", None), ("", None), ("'null'", "null"), ('"a # b"', "a # b"), ("'it''s'", "it's"), ('""', "")],
)
def test_null_is_no_text_and_quotes_are_taken_off(value, read):
    assert config(f"evaluation.judge={value}").evaluation.judge == read


NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.recursive(NUMBERS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text("ab", min_size=1), part))
)
def test_numbers_lists_and_mappings_are_read_as_before(value):
    assert read_override(write_override("cluster.resources", value)) == {"cluster": {"resources": value}}


def test_no_key_is_text_in_one_section_and_something_else_in_another():
    """An override is read before it is known which of them the run has."""
    for key in ("model", "data"):
        sections = sections_of(Config.model_fields[key].annotation)
        for name in {name for section in sections for name in section.model_fields}:
            alone = [takes_text_in(section, name) for section in sections if name in section.model_fields]
            assert len(set(alone)) == 1, name


def takes_text_in(section, name):
    try:
        section.__pydantic_validator__.validate_assignment(section.model_construct(), name, 5)
    except ValidationError as error:
        return error.errors()[0]["type"] in ("string_type", "literal_error")
    return False


def test_a_reference_is_followed_once(tmp_path):
    assert config("seed=7", "out=runs-${seed}").out == "runs-7"
    path = write(tmp_path, "name: a\nseed: 3\nout: x${seed}\nmodel: {arch: vit}\ndata: {source: digits}\n")
    assert load_config(path).out == "x3"
    # what a run has kept is not read as a reference again
    kept = config(write_override("out", "a\\${seed}")).model_dump(mode="json")
    assert load_config(None, ["evaluation.steps=3"], base=kept).out == "a\\${seed}"


@pytest.mark.parametrize("value", ["off", "2024", "0.5"])
def test_a_file_that_has_a_number_or_a_truth_for_a_name_is_told_to_quote_it(tmp_path, value):
    path = write(tmp_path, f"name: {value}\nmodel: {{arch: vit}}\ndata: {{source: digits}}\n")
    with pytest.raises(ConfigError, match="name=.* in quotes"):
        load_config(path)


def test_null_takes_back_the_exceptions_of_a_file(tmp_path):
    path = write(tmp_path, "name: a\nmodel: {arch: vit}\ndata: {source: digits}\ntraining: {blocks: {2: {lr: 0.5}}}\n")
    with pytest.raises(ConfigError, match="training.blocks=null"):
        load_config(path, ["blocks=2"])
    assert load_config(path, ["blocks=2", "training.blocks=null"]).training.blocks == {}
    assert list(load_config(path, ["training.blocks=null", "training.blocks.1.lr=0.1"]).training.blocks) == [1]


def test_all_that_is_wrong_is_said_at_once():
    message = refused("model.depth=0", "sed=1", "training.steps=x")
    assert all(word in message for word in ("model.depth=0", "unknown key sed", "training.steps=x"))


@pytest.mark.parametrize("override", ["depth", "--depth=3", "-x", ""])
def test_what_is_no_override_is_refused(override):
    assert "key=value" in refused(override)


def test_edges_and_the_explicit_policy_go_together():
    loaded = config("noise.ranges=explicit", "noise.edges=[5,1,0.5,0.1]")
    assert loaded.noise.edges == (5.0, 1.0, 0.5, 0.1)
    assert "go together" in refused("noise.ranges=explicit")
    assert "go together" in refused("noise.edges=[5,1,0.5,0.1]")


def test_the_configuration_is_immutable():
    loaded = config()
    for section, key in ((loaded, "seed"), (loaded.training, "steps"), (loaded.training.optimizer, "lr")):
        with pytest.raises(ValidationError):
            setattr(section, key, 1)


def test_a_missing_file_names_where_the_shipped_ones_are(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file .*absent.yaml.*called by its name.*dbtrain configs"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["a: [1,\n", "name:\ta\n\tb: 1\n", "name: a\nname: b\n"])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(ConfigError, match="is no YAML") as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_override_reaches_a_block_that_the_file_names(tmp_path):
    path = tmp_path / "config.yaml"
    text = "name: x\nmodel: {arch: vit}\ndata: {source: digits}\n"
    path.write_text(text + "cluster: {blocks: {2: {workers: 2, micro_batch: 4}}}\n")
    blocks = load_config(path, ["cluster.blocks.2.micro_batch=8", "cluster.blocks.0.workers=3"]).cluster.blocks
    assert (blocks[2].workers, blocks[2].micro_batch, blocks[0].workers) == (2, 8, 3)


def test_an_empty_file_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="name is missing; model is missing; data is missing"):
        load_config(write(tmp_path, ""))


def test_a_stored_configuration_reads_back_equal():
    loaded = config("noise.ranges=explicit", "noise.edges=[5,1,0.5,0.1]", "cluster.blocks.1.workers=2")
    again = parse_config(loaded.model_dump(mode="json"), "run.json")
    assert again == loaded and again.content_hash() == loaded.content_hash()


def test_the_noise_process_is_the_architectures_own_unless_chosen():
    assert config().noise.process == config("noise.process=null").noise.process == "gaussian"
    text = {"model": {"arch": "masked_lm"}, "data": {"source": "python_topics"}}
    assert config(**text).noise.process == "masking"
    # chosen or not, and as a run of before stored it, it is the same run
    stored = config().model_dump(mode="json")
    del stored["noise"]["process"]
    hashes = {c.content_hash() for c in (config(), config("noise.process=gaussian"), parse_config(stored, "run.json"))}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "override",
    [
        "out=elsewhere",
        "cluster.workers=2",
        "cluster.address=auto",
        "telemetry.trackers=[wandb]",
        "evaluation.readout=chain",
        "training.zero_stage=2",
        "training.micro_batch=4",
        "training.checkpoint_every=7",
        "training.log_every=7",
        "training.deterministic=false",
    ],
)
def test_where_a_run_runs_does_not_change_its_hash(override):
    assert config(override).content_hash() == config().content_hash()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "blocks=2",
        "model.depth=8",
        "model.dropout=0.1",
        "data.validation=0.2",
        "codebook.dim=32",
        "noise.overlap=0.1",
        "training.steps=601",
        "training.batch_size=64",
        "training.optimizer.lr=0.1",
        "training.blocks.1.lr=0.1",
        "training.blocks.1.steps=600",
        "training.blocks.1.batch_size=5",
        "training.blocks.1.ema=0",
        "training.precision=bf16",
        "training.ema=0.9",
    ],
)
def test_what_determines_the_weights_changes_the_hash(override):
    assert config(override).content_hash() != config().content_hash()


def test_a_run_with_exceptions_from_before_blocks_had_steps_of_their_own_has_the_same_hash():
    assert load_config(None, ["training.blocks.1.lr=0.1"], base=SMALL).content_hash() == "ca70deca9ea2706b"


@pytest.mark.parametrize(("steps", "warmup"), [(1200, 200), (600, 100), (150, 25), (1, 0)])
def test_a_warm_up_takes_the_same_share_of_a_blocks_own_steps(steps, warmup):
    training = config(f"training.blocks.2.steps={steps}", "training.blocks.2.lr=0.5").training
    own = training.of_block(2)
    assert (own.steps, own.optimizer.warmup, own.optimizer.lr) == (steps, warmup, 0.5)
    assert training.of_block(1).optimizer == training.optimizer


def test_workers_get_absolute_paths_of_what_is_here_and_the_run_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "tokens", "letters"):
        (tmp_path / name).mkdir()
    text = {"source": "text", "path": "corpus", "cache": "packed"}
    told = config(data={**text, "tokenizer": "tokens"}).for_workers().data
    assert (told.path, told.tokenizer, told.cache) == tuple(str(tmp_path / n) for n in ("corpus", "tokens", "packed"))
    loaded = config(data=text)
    assert loaded.for_workers().data.tokenizer == "letters" and loaded.data.path == "corpus"
    assert parse_config(loaded.for_workers().model_dump(mode="json"), "the assignment") == loaded.for_workers()
    hub = config(data={"source": "hf_text", "path": "someone/somewhere"}).for_workers().data
    assert (hub.path, hub.cache) == ("someone/somewhere", None)
    assert config().for_workers() == config()


def pictures(source="images", *overrides, **data):
    return load_config(None, overrides, base={**SMALL, "data": {"source": source, "path": "pets", **data}}).data


def test_a_size_is_one_number_or_height_and_width():
    assert pictures("images", "data.size=64").size == (64, 64)
    assert pictures("images", "data.size=[37,53]").size == pictures("images", size=[37, 53]).size == (37, 53)
    assert pictures("images", "data.size=64", "data.resize=pad").resize == "pad" and pictures().size is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resize=pad", ["data.resize=pad needs a size", "set data.size"]),
        ("data.size=0", ["data.size", "greater than or equal to 1"]),
        ("data.size=[37]", ["data.size"]),
        ("data.size=large", ["data.size=large"]),
        ("data.channels=4", ["data.channels=4", "1 or 3"]),
        ("data.resize=stretch", ["data.resize=stretch", "'crop', 'pad' or 'squash'"]),
        ("data.background=red", ["data.background=red", "'black' or 'white'"]),
        ("data.chanels=3", ["unknown key data.chanels", "did you mean data.channels?"]),
    ],
)
@pytest.mark.parametrize("source", ["images", "hf"])
def test_wrong_settings_of_pictures_are_told_in_one_line(source, override, words):
    with pytest.raises(ConfigError) as caught:
        pictures(source, override)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_a_run_of_hf_from_before_there_were_sizes_and_channels_has_the_same_hash():
    before = {"source": "hf", "path": "pets", "image": "image", "label": "label", "classes": 10, "validation": 0.1}
    found = load_config(None, base={**SMALL, "data": before})
    assert found.content()["data"] == before and found.content_hash() == "ba04ba2a7132b560"
    assert load_config(None, ["data.size=64"], base={**SMALL, "data": before}).content_hash() != found.content_hash()
