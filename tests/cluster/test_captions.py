"""docs/captions.md as it stands there: captioned pictures, encoded, blocks, samples, a pipeline of diffusers."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.encoding.encoders import TextEncoder
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.opening import merged_of
from dbtrain.evaluation.residency import ResidentBlocks
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.masked_context import with_mask
from dbtrain.run.run import Run
from tests.conftest import ROOT, Command

pytestmark = pytest.mark.cluster
PAGE = (ROOT / "docs" / "captions.md").read_text()
LINES = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("dbtrain")
]
CAPTIONS = ["a red disc", "a green square"]
CPU = torch.device("cpu")


def fenced(language: str) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]


def here(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_page_runs_and_the_pipeline_draws_what_dbtrain_draws(
    dbtrain: Callable[..., Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.tiny_pipeline import main  # diffusers: seconds, in every process that only looks for its tests

    encode, train, sample, export = LINES
    assert [line[0] for line in LINES] == ["encode", "train", "sample", "export"]
    monkeypatch.chdir(tmp_path)
    main(Path("."))
    scale = re.findall(r"data\.(?:mean|std)=\[[^\]]*\]", here(*encode).replace("\n", ""))
    assert len(scale) == 2 == len([word for word in train if word.startswith("data.")])
    Path("wan.yaml").write_text(fenced("yaml").replace("steps: 300", "steps: 40"))
    command = dbtrain(*train[:2], *scale)
    assert command.wait() == 0, command.output()
    assert "equals the blocks bit for bit" in command.output()
    here(*sample)
    assert Image.open("grid.png").height == 2 * (64 + 2)  # a row for each caption
    here(*export)
    found: dict[str, object] = {}
    exec(fenced("python"), found)
    assert Image.open("red-disc.png").size == (64, 64)
    compare(found["pipeline"], Run.at("runs/wan"), guidance=1.0)
    compare(found["pipeline"], Run.at("runs/wan"), guidance=2.5)


def compare(pipeline, run, guidance):
    """The pipeline, from the noise that a run's samples start from, ends where they do."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(12)
    levels = tuple(pipeline.scheduler.sigmas[:-1].tolist())
    edge, merged = run.plan.ranges.edges[1], merged_of(run)
    assert levels[0] == 1 and levels[1] > edge > levels[-1]  # both networks are asked
    told = with_mask(*TextEncoder("pipeline", 8, CPU, torch.float32)(CAPTIONS))
    blocks = ResidentBlocks(run.plan, merged.block, CPU)
    wanted = draw(run.plan, blocks.__getitem__, told, (4, 1, 8, 8), Sampling(levels, "euler", guidance), 2)
    start = run.plan.noise().prior((4, 1, 8, 8), Draws(torch.tensor(derive_seed(0, "sample")), torch.arange(2)))
    hidden = torch.zeros(2, 8, 32) if guidance > 1 else None
    made = pipeline(
        CAPTIONS, height=64, width=64, num_frames=1, num_inference_steps=12, guidance_scale=guidance, latents=start,
        negative_prompt_embeds=hidden, max_sequence_length=8, output_type="latent",
    ).frames  # fmt: skip
    assert json.loads(Path("exported/config.json").read_text())["shape"]["text"] == [8, 32]
    assert torch.allclose(made, wanted, atol=1e-5) and not torch.allclose(wanted[0], wanted[1], atol=1e-2)
