"""Settings of all unit tests, and small settled runs."""

import pytest
import torch
from hypothesis import settings

from dbtrain.config import load_config
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store

settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Many small operations on a machine that others use too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = {
    "name": "toy",
    "model": {"arch": "vit", "depth": 6, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
    "codebook": {"dim": 16},
    "noise": {"ranges": "uniform", "sigma_min": 0.1, "sigma_max": 10.0},
    "training": {"steps": 4, "batch_size": 8, "ema": 0.0},
    "cluster": {"backoff_s": 0.0},
}


@pytest.fixture(autouse=True)
def deterministic_mode_as_it_was():
    """Workers switch it on for their whole process, which here is that of other tests too."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    if torch.are_deterministic_algorithms_enabled() != before:
        torch.use_deterministic_algorithms(before)


def never(*_):
    raise AssertionError("nothing here needs a calibration")


@pytest.fixture
def make_config(tmp_path):
    return lambda *overrides: load_config(None, [f"out={tmp_path}", *overrides], base=SMALL)


@pytest.fixture
def make_run(make_config):
    """(config, store) of a run that is settled."""

    def make(*overrides):
        config = make_config(*overrides)
        run = Store(config.run_url)
        run.makedirs()
        prepare(config, Run(run), never)
        return config, run

    return make


@pytest.fixture(scope="session")
def digits():
    return load_data(load_config(None, base=SMALL))
