"""What the methods of benchmarks/parallel compute, without their processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks.parallel.job import Job
from benchmarks.parallel.launch import together
from benchmarks.parallel.pipelines import Part, _Draws
from benchmarks.parallel.setting import Setting
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store

TINY = Job(
    method="1f1b",
    gpus=2,
    micro_batch=2,
    checkpointing=False,
    batch=4,
    layers=4,
    dim=16,
    tokens=4,
    device="cpu",
    precision="fp32",
    compile=False,
    warmup=1,
    steps=1,
    rounds=1,
    folder="",
)


def test_the_parts_of_a_pipeline_compute_the_loss_of_the_whole(tmp_path: Path) -> None:
    job = replace(TINY, folder=str(tmp_path))
    job.prepare()
    setting = Setting(job, Run(Store(job.config().run_url)).plan, 0, torch.device("cpu"))
    whole: Any = setting.plan.objective(0)
    model = whole.model
    for parameter in model.parameters():  # what starts at zero would hide a part that is left out
        torch.nn.init.normal_(parameter, std=0.05)
    noisy, target, said = _Draws(setting, whole)()
    output = model.predict(range(4), noisy, said["level"], said["label"])
    clean = target / model.noise.weight(said["level"]).sqrt()[:, None, None, None]
    wanted = (model.noise.weight(said["level"]) * model.loss(output, clean)).mean()
    parts = [Part(model, range(2), half=False), Part(model, range(2, 4), half=False)]
    found = functional.mse_loss(parts[1](*parts[0](noisy, **said), **said), target)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"method": "ddp", "micro_batch": 3}, "no multiple of 6"),
        ({"method": "interleaved", "layers": 6}, "do not divide by 4"),
        ({"micro_batch": 4}, "as many micro-batches"),
    ],
)
def test_sizes_that_do_not_fit_are_a_row_that_says_so(given: dict[str, Any], word: str) -> None:
    assert word in (replace(TINY, **given).misfit() or "")
    assert TINY.misfit() is None


def test_a_step_takes_as_long_as_that_of_the_slowest_process() -> None:
    fast = {"seconds": [1.0, 2.0, 1.0], "peak_bytes": 5, "sent_bytes": 1.0, "idle": 0.1}
    slow = {"seconds": [2.0, 1.0, 2.0], "peak_bytes": 4, "sent_bytes": 2.0, "idle": 0.2}
    row = together(TINY, [fast, slow])
    assert row["seconds_each"] == [2.0, 2.0, 2.0]
    assert (row["samples_per_s"], row["peak_bytes"], row["sent_bytes"], row["idle"]) == (2.0, 5, 2.0, 0.2)


def test_memory_that_runs_out_in_one_process_is_what_the_row_says() -> None:
    errors = [{"error": "RuntimeError: connection closed by peer"}, {"error": "out of memory"}]
    assert together(TINY, errors) == {"error": "out of memory"}
