"""Thousands of damaged configurations: a one-line error, or a configuration that says what the file says."""

import copy
import random

import pytest
import yaml

from dbtrain.config import Config, load_config, parse_config
from dbtrain.errors import ConfigError
from tests.conftest import CONFIG, ROOT
from tests.resume.test_shards_fuzz import mutate

pytestmark = pytest.mark.fault

TRIALS = 1500
VALUES = [
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1.5,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "s3://",
    [],
    [1],
    {},
    {"a": 1},
    "1e999",
]


def accepted(load):
    """The configuration, or None when it was refused with one line."""
    try:
        return load()
    except ConfigError as err:
        assert "\n" not in str(err) and 10 < len(str(err)) < 6000
        return None


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_mutated_files(tmp_path, name):
    configs = list((ROOT / "configs").glob("*.yaml"))
    data, path, dice = (ROOT / "configs" / name).read_bytes(), tmp_path / "config.yaml", random.Random(name)
    refused, trials = 0, TRIALS // len(configs) + 1
    for _ in range(trials):
        path.write_bytes(mutate(data, dice))
        found = accepted(lambda: load_config(path))
        refused += found is None
        if found is not None:
            # what was accepted is what a plain reader of YAML sees, and comes back from its own words
            assert set(yaml.safe_load(path.read_bytes())) <= set(Config.model_fields)
            assert parse_config(found.model_dump(mode="json"), "again") == found
    assert 0.2 * trials < refused < trials


def test_random_values_and_keys():
    dice, refused = random.Random(3), 0
    base = load_config(CONFIG).model_dump(mode="json")
    for _ in range(TRIALS):
        content = copy.deepcopy(base)
        for _ in range(dice.randint(1, 3)):
            target = dice.choice([content, *(part for part in content.values() if isinstance(part, dict))])
            key = dice.choice([*target, "unknwon"]) if target else "unknwon"
            target[key] = dice.choice(VALUES)
        refused += accepted(lambda content=content: parse_config(content, "fuzz")) is None
    assert 0.5 * TRIALS < refused < TRIALS


def test_random_overrides():
    dice, refused = random.Random(4), 0
    words = [
        "model.depth",
        "blocks",
        "=",
        "==",
        "[",
        "]",
        "{",
        "1e9",
        "-3",
        "nan",
        "null",
        ".",
        "x",
        " ",
        "training.steps",
    ]
    for _ in range(TRIALS):
        override = "".join(dice.choice(words) for _ in range(dice.randint(1, 5)))
        refused += accepted(lambda override=override: load_config(CONFIG, [override])) is None
    assert refused > 0.5 * TRIALS
