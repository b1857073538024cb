"""Encoded samples in several files: rows from memory maps, normalised by channel, with classes or with text."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.config import load_config
from dbtrain.data import encoded_facts
from dbtrain.data.batching import blank
from dbtrain.data.encoded import as_encoded
from dbtrain.data.splits import mixed
from dbtrain.errors import ConfigError, DataError
from dbtrain.method.interface import BlockModel, Example
from dbtrain.method.masked_context import with_mask, without_mask
from dbtrain.models.registry import ARCHITECTURES
from dbtrain.run.cost import Estimates
from dbtrain.run.merge import merge
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.foreign_tensors import map_tensors
from dbtrain.shards.storage.store import Store
from tests.unit.small_runs import BASE, commit, never

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
MEANS, STDS = torch.tensor([1.0, -3.0, 0.2]), torch.tensor([4.0, 0.5, 1.0])
LATENTS = torch.randn(50, 3, 4, 4, generator=GENERATOR) * STDS[:, None, None] + MEANS[:, None, None]
LABELS = torch.arange(50) % 5
TEXT = torch.randn(50, 6, 8, generator=GENERATOR).bfloat16()
MASK = torch.arange(6) < (1 + torch.arange(50) % 6)[:, None]
CUTS = (20, 27, 50)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "encoded"
    made.mkdir()
    write(made)
    return made


def write(folder, latents=LATENTS, **more):
    tensors = {"latent": latents, "label": LABELS, "text": TEXT, "mask": MASK, **more}
    for number, (start, end) in enumerate(zip((0, *CUTS), CUTS, strict=False)):
        part = {name: tensor[start:end].clone() for name, tensor in tensors.items()}
        save_file(part, folder / f"part-{number}.safetensors")


def load(path, **changes):
    data = {"source": "encoded", "path": str(path), "cache": str(path.parent / "cache"), **changes}
    return load_data(load_config(None, base={"name": "z", "model": {"arch": "dit"}, "data": data}))


def whole(data):
    parts = [split.batch(torch.arange(len(split)), CPU) for split in (data.train, data.validation, data.test)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_rows_of_several_files_are_those_of_one_and_come_at_unit_scale(folder):
    data, order = load(folder, classes=5), mixed(50)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [41, 4, 5]
    batch = whole(data)
    assert torch.equal(batch["label"], LABELS[order]) and set(batch) == {"image", "label"}
    image = batch["image"].transpose(0, 1).flatten(1)
    assert torch.allclose(image.mean(1), torch.zeros(3), atol=1e-4) and torch.allclose(
        image.std(1), torch.ones(3), rtol=1e-2
    )
    assert torch.allclose(as_encoded(batch["image"], data.shape), LATENTS[order], atol=1e-5)
    one = data.train.batch(torch.tensor([7, 0, 7]), CPU)
    assert torch.equal(one["image"], batch["image"][[7, 0, 7]])
    assert data.shape["image"] == (3, 4, 4) and data.shape["classes"] == 5 and "text" not in data.shape


def test_text_comes_with_its_mask_and_without_classes(folder):
    data, order = load(folder), mixed(50)
    batch = whole(data)
    assert torch.equal(batch["text"], TEXT[order].float()) and torch.equal(batch["mask"], MASK[order])
    assert batch["mask"].dtype == torch.bool and data.shape["text"] == (6, 8) and "classes" not in data.shape
    text, mask = without_mask(with_mask(batch["text"], batch["mask"]))
    assert torch.equal(text, batch["text"]) and torch.equal(mask, batch["mask"])


def test_mean_deviation_and_scale_are_taken_as_given(folder):
    given = {"mean": (1.0, -3.0, 0.0), "std": (4.0, 0.5, 1.0)}
    data, order = load(folder, classes=5, scale=0.5, **given), mixed(50)
    wanted = (LATENTS - torch.tensor(given["mean"])[:, None, None]) / torch.tensor(given["std"])[:, None, None] * 0.5
    assert torch.allclose(whole(data)["image"], wanted[order], atol=1e-6)
    assert torch.allclose(as_encoded(whole(data)["image"], data.shape), LATENTS[order], atol=1e-5)
    assert len(data.notes) == 1 and data.notes[0] == "41 training, 4 validation, 5 test samples"
    plain = load(folder, classes=5, mean=None, std=None)
    assert torch.equal(whole(plain)["image"], LATENTS[order])
    assert "channels are far from unit scale: 0 (mean" in plain.notes[1] and "1 (mean -3" in plain.notes[1]


def test_a_file_larger_than_the_memory_is_mapped_and_not_read(tmp_path):
    """256 GiB, nearly all of them a hole in the file."""
    path, count = tmp_path / "big.safetensors", 1 << 20
    entry = {"dtype": "F32", "shape": [count, 256, 256], "data_offsets": [0, count << 18]}
    header = json.dumps({"latent": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (count << 18))
        file.seek(8 + len(header) + (777_777 << 18) + 4)
        file.write(np.float32(2.5).tobytes())
    tensor = map_tensors(path)["latent"]
    assert tensor.nbytes == 1 << 38 and tensor[777_777, 0, :3].tolist() == [0.0, 2.5, 0.0]


def test_an_empty_batch_has_the_tensors_of_a_real_one(folder):
    for changes in ({}, {"classes": 5}):
        data = load(folder, **changes)
        real, made = data.train.batch(torch.arange(3), CPU), blank(data.shape, 3)
        assert {n: (t.shape, t.dtype) for n, t in real.items()} == {n: (t.shape, t.dtype) for n, t in made.items()}


def test_what_was_measured_is_kept_until_a_file_changes(folder, monkeypatch):
    first, measured = load(folder, classes=5), []
    real = encoded_facts._measured
    monkeypatch.setattr(
        encoded_facts, "_measured", lambda file, tensors: measured.append(file.name) or real(file, tensors)
    )
    assert load(folder, classes=5).content == first.content and not measured
    part = {"latent": LATENTS[20:27] + 1, "label": LABELS[20:27]}
    save_file(part, folder / "part-1.safetensors")
    other = load(folder, classes=5)
    assert measured == ["part-1.safetensors"] and other.content != first.content
    assert other.shape["latent_mean"] != first.shape["latent_mean"]


def refused(message, path, **changes):
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load(path, **changes)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_by_file_and_name(folder, tmp_path):
    refused("data.std has 2 numbers, and the latents of .*encoded have 3 channels", folder, std=(1.0, 2.0))
    refused("must be above 0 in every channel", folder, std=(1.0, 0.0, 1.0))
    refused("neither a folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("has no .safetensors file", tmp_path / "empty")
    refused("part-0.safetensors: label 4 of sample 4 is out of range", folder, classes=4)
    for name, tensors, message in (
        ("a", {"latent": LATENTS}, "holds latent, and needed are latent, text, mask: set data.classes for labels"),
        (
            "b",
            {"latent": LATENTS, "text": TEXT, "mask": MASK[:, :5].clone()},
            r"mask has the shape \(50, 5\)",
        ),
        ("c", {"latent": LATENTS, "text": TEXT[1:].clone(), "mask": MASK}, "50 latents and 49 of text"),
        ("d", {"latent": LATENTS.long(), "text": TEXT, "mask": MASK}, "latent is torch.int64 .* should be floats"),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "x.safetensors")
        refused(f"x.safetensors.*{message}", tmp_path / name)
    broken = LATENTS.clone()
    broken[30, 1, 2, 3] = math.nan
    write(folder, broken)
    refused(r"part-2.safetensors: latent 3 \(the first is 0\) is nan in float32 at \(1, 2, 3\)", folder)
    still = LATENTS.clone()
    still[:, 1] = 0.25
    write(folder, still)
    refused("channel 1 of the latents has a deviation of 0", folder)
    save_file({"latent": LATENTS[:, :2].clone(), "text": TEXT, "mask": MASK}, folder / "part-1.safetensors")
    refused(r"part-1.safetensors: latent is torch.float32 of \(2, 4, 4\) a sample, and in .*part-0", folder)
    (folder / "part-1.safetensors").write_bytes(b"\x80\x04hello world")
    refused("part-1.safetensors cannot be read as a .safetensors file", folder)


class Captioned(BlockModel):
    """Latents given a caption: the mean of its embeddings is added to every pixel."""

    takes = ("image", "text")
    natural_parametrisation = "edm"
    samples = "image"
    noise_defaults = {"ranges": "paper", "weighting": "edm"}

    def __init__(self, *, noise, parametrisation, image, text, depth: int = 2, width: int = 8, layers=None):
        super().__init__()
        self.num_layers, self.noise, self.parametrisation = depth, noise, parametrisation
        self.stem = nn.ModuleDict({"image": nn.Linear(image[0], width), "text": nn.Linear(text[1], width)})
        numbers = range(depth) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): nn.Linear(width, width) for i in numbers})
        self.head = nn.Linear(width, image[0])

    def example(self, batch, draws=None):
        return Example(batch["image"], with_mask(batch["text"], batch["mask"]), batch["image"])

    def predict(self, layers, noisy, level, context):
        text, mask = without_mask(context)
        told = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        pixels = self.parametrisation.scale_input(noisy, level).movedim(1, -1)
        hidden = self.stem["image"](pixels) + self.stem["text"](told)[:, None, None]
        for i in layers:
            hidden = hidden + torch.tanh(self.layers[str(i)](hidden))
        return self.parametrisation.estimate(self.head(hidden).movedim(-1, 1), noisy, level)

    def loss(self, output, target):
        return (output - target).square().flatten(1).mean(1)

    def denoised(self, output):
        return output


def test_a_model_of_captions_is_trained_and_draws_in_the_scale_of_the_data(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "captioned", Captioned)
    data = {"source": "encoded", "path": str(folder), "cache": str(tmp_path / "cache")}
    base = {**BASE, "model": {"arch": "captioned", "depth": 2}, "data": data, "noise": {"sigma_data": 1.0}}
    config = load_config(None, [f"out={tmp_path}"], base=base)
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    batch = Run(run).plan.data().train.batch(torch.arange(8), CPU)
    loss = Run(run).plan.objective(0)(batch, torch.tensor(1), torch.arange(8))
    assert loss.isfinite() and loss.requires_grad
    assert Estimates(Run(run).plan).of(0, 4, 1).flops > 0
    commit(run)
    merge(Run(run))
    result = CliRunner().invoke(cli.app, ["eval", run.url])
    assert result.exit_code == 2 and "this data has no classes" in " ".join(result.output.split())
    result = CliRunner().invoke(cli.app, ["losses", run.url])
    assert result.exit_code == 0, result.output
    out = tmp_path / "samples.npy"
    result = CliRunner().invoke(cli.app, ["sample", run.url, "--count", "6", "--steps", "8", "--out", str(out)])
    assert result.exit_code == 0, result.output
    samples = torch.from_numpy(np.load(out))
    # untrained it denoises little: what is left is noise of about unit scale, brought back by channel
    plain = (samples - MEANS[:, None, None]) / STDS[:, None, None]
    spread = plain.transpose(0, 1).flatten(1).std(dim=1)
    assert samples.shape == (6, 3, 4, 4) and float(spread.max() / spread.min()) < 6
    assert json.loads((tmp_path / "toy" / "run.json").read_text())["shape"]["text"] == [6, 8]
