"""A short soak in one command; `dbtrain punish` does longer ones."""

import re
from collections.abc import Callable

import pytest

from tests.conftest import CONFIG, TINY, Command

pytestmark = [pytest.mark.fault, pytest.mark.cluster]


def test_random_faults_for_a_while(dbtrain: Callable[..., Command]) -> None:
    small = ["blocks=1", *TINY, "training.steps=200"]
    command = dbtrain("punish", CONFIG, *small, "--mtbf", "2", "--runs", "1", "--seed", "7")
    assert command.wait() == 0, command.output()
    assert "the same bits as the undisturbed run" in command.output()
    made = re.search(r"all\W+(\d+)", command.output())
    assert made and int(made[1]) >= 1, command.output()
