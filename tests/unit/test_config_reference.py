"""The reference of the keys says what the classes take, and the document is the newest."""

import re

import pytest
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.config import load_config
from dbtrain.config.reference import groups, markdown
from dbtrain.errors import ConfigError
from tests.conftest import ROOT

KEYS = {key.name: key for group in groups() for key in group.keys}


def test_the_document_is_made_from_the_classes_as_they_are():
    assert (ROOT / "docs" / "keys.md").read_text() == markdown(), "python -m dbtrain keys --markdown > docs/keys.md"


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in KEYS:  # model.config is a class's own
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield re.sub(r"\.\d+\.", ".BLOCK.", f"{prefix}{key}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_key_of_a_configuration_is_in_it(path):
    config = load_config(path).model_dump(mode="json")
    sections = {group.section for group in groups()}
    missing = [key for key in leaves(config) if key not in KEYS and not {key, f"{key}.BLOCK"} & sections]
    assert not missing


@pytest.mark.parametrize(
    ("name", "kind", "default", "about"),
    [
        ("training.optimizer.lr", "number > 0", "0.001", ""),
        ("training.blocks.BLOCK.lr", "number > 0 or null", "null", ""),
        ("training.zero_stage", "0, 1, 2, 3", "0", ""),
        ("cluster.blocks.BLOCK.micro_batch", "whole number >= 1 or null", "null", ""),
        ("cluster.resources", "text to number", "{}", "Custom Ray resources"),
        ("noise.overlap", "number >= 0 <= 1", "0.05", "beyond both ends"),
        ("name", "text", "required", ""),
        ("model.stream", "single, concat", '"single"', "`concat`: 2L slots"),
        ("evaluation.solver", "euler, heun", '"euler"', ""),
    ],
)
def test_a_key_tells_what_it_takes(name, kind, default, about):
    assert (KEYS[name].kind, KEYS[name].default) == (kind, default) and about in KEYS[name].about


def test_one_section_or_one_key_is_shown_and_another_is_refused():
    sections = {"training", "training.augmentation", "training.optimizer", "training.blocks.BLOCK"}
    assert {group.section for group in groups("training")} == sections
    assert [group.title for group in groups("training.optimizer.clip")] == ["training.optimizer"]
    said = CliRunner().invoke(app, ["keys", "training.optimizer"])
    assert said.exit_code == 0 and "training.optimizer.warmup" in said.output and "cluster" not in said.output
    with pytest.raises(ConfigError, match="no section or key 'trainning'; the sections are model, data,"):
        groups("trainning")
