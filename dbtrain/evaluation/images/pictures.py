"""The sample command: draw from a merged model and write a grid of pictures, or the samples themselves."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbtrain.config import Config
from dbtrain.data.encoded import as_encoded
from dbtrain.errors import ConfigError, DbtrainError, ShardError
from dbtrain.evaluation.images.asked import check_asked, sample_shape
from dbtrain.evaluation.images.captioned import captioned_grid
from dbtrain.evaluation.images.drawn import Drawn, as_text
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.loading import merged_plan
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.opening import merged_of, open_merged_model
from dbtrain.evaluation.overrides import overridden
from dbtrain.evaluation.pipeline.places import OpenHosts
from dbtrain.evaluation.speed import Speed, Stopwatch
from dbtrain.run.plan import RunPlan
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, silent

Decode = Callable[[Tensor], Tensor]
"""Pictures (N, C, H, W) in [-1, 1] of latents (N, ...) in the scale of the data."""


@dataclass(frozen=True)
class Captions:
    """What samples are to show."""

    texts: Sequence[str]
    encode: Callable[[int], tuple[Tensor, Tensor]]
    """Embeddings (n, L, D) of the texts and their mask (n, L), for a length L in tokens."""


PICTURE = "samples.png"
"""File in a run's directory that takes samples which are sent nowhere else."""
ROUTING = "-routing.svg"
"""End of the name of the picture that shows which block did which step; the beginning is the samples'."""
GAP = 2
"""Pixels between the pictures of a grid."""
SIDE = 64
"""Pixels that the shorter side of a picture in a grid has at least."""


def sample_run(
    run: Run,
    out: Path | None,
    count: int,
    seed: int,
    overrides: Sequence[str] = (),
    count_levels: Count = silent,
    tell: Callable[[str], None] = lambda line: None,
    merged: MergedDirectory | None = None,
    captions: Captions | None = None,
    decoder: Callable[[], Decode] | None = None,
    hosts: OpenHosts | None = None,
) -> tuple[str, str]:
    """Draw `count` samples, and write them to `out`, or into the run. Returns where they are, and where the
    picture of their routing is, beside them; '' with one block.

    The samples get the classes in turn, or the given captions. Where the data has captions and none are
    given, they get those of the first samples of the test split.

    A ``.png`` is a grid of pictures; a ``.npy`` holds the samples (count, C, H, W) float32 as the data has
    them: pixels in [-1, 1], or latents.

    Args:
        run, out: a run that is merged, and a file for the samples; None for `PICTURE` in the run.
        count, seed: how many samples, and the seed of their noise.
        overrides: overrides of the section `evaluation`, which says how samples are drawn here as it does for
            their score: by its steps, solver, spacing and guidance, and with which blocks in memory.
        count_levels: is told how many levels are done.
        tell: gets a line with how long the parts took.
        merged: a model of the run's blocks that lies elsewhere; by default that of the run is drawn from.
        captions: what the samples are to show, in turn; a grid has a row for each.
        decoder: loads what makes pictures (N, C, H, W) in [-1, 1] of latents, as an autoencoder does.
        hosts: connects to the cluster that a pipeline is in.

    Raises:
        ConfigError: `check_asked` refuses what is asked, or the text encoder is not that of the data.
        DataError: the decoder is not that of the data.
        ShardError: the run is not merged, or its files are damaged.
    """
    watch, merged = Stopwatch(), merged or merged_of(run)
    run_plan = merged_plan(merged)
    config = overridden(run_plan.config, overrides)
    check_asked(run_plan, config, out or Path(PICTURE), decoder is not None, captions is not None)
    decode = decoder and _loaded(decoder, run_plan)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = _contexts(run, run_plan, config, count, device, captions)
    sampling = Sampling.of(run_plan, config.evaluation, seed)
    size, levels_done = config.evaluation.batch_size, partial(count_levels, f"levels of {count:,} samples")
    walk: list[tuple[float, int]] = []
    with _opened(merged, device, replace(run_plan, config=config), hosts) as model:
        speed = _fast(model, count)
        watch.lap("starting")
        samples = draw(
            run_plan, model.blocks.__getitem__, told, sample_shape(run_plan), sampling, size, levels_done,
            lambda evaluation: walk.append((evaluation.level, evaluation.block)), model.blocks.walks,
        ).cpu()  # fmt: skip
        tell(_told(model, watch, speed))
    drawn = _record(merged, run_plan, sampling, tuple(walk))
    where = _keep(*_shown(samples, run_plan.shape, decode, size), run, out, drawn, captions.texts if captions else ())
    return where, _keep_routing(run, out, drawn) if run_plan.ranges.blocks > 1 else ""


def _told(model: MergedModel, watch: Stopwatch, speed: Speed) -> str:
    resident = model.blocks.told()  # first, as a pipeline tells here how long it compiled
    return f"{watch.line('drawing', speed)}, {resident}"


def _record(
    merged: MergedDirectory, run_plan: RunPlan, sampling: Sampling, walk: tuple[tuple[float, int], ...]
) -> Drawn:
    """What the samples' file says of how they were drawn."""
    how = (sampling.solver, sampling.guidance, sampling.seed, run_plan.level_name, run_plan.ranges.edges)
    return Drawn(merged.weights_hash, *how, walk)


def _opened(merged: MergedDirectory, device: torch.device, run_plan: RunPlan, hosts: OpenHosts | None) -> MergedModel:
    """The blocks, one at a time unless all are wanted, as each is asked for once."""
    resident = run_plan.config.evaluation.resident
    return open_merged_model(merged, device, run_plan, "one" if resident == "auto" else resident, hosts)


def _fast(model: MergedModel, count: int) -> Speed:
    """Make the blocks ready to draw so many samples."""
    config = model.run_plan.config
    speed = Speed.of(config, model.blocks.computes_on, count)
    model.blocks.apply(speed)
    model.blocks.expect(min(count, config.evaluation.batch_size))
    return speed


def _loaded(decoder: Callable[[], Decode], run_plan: RunPlan) -> Decode:
    """A decoder that was tried on a sample of zeros: else one that does not fit would be told only once the
    samples are drawn."""
    decode = decoder()
    decode(as_encoded(torch.zeros(1, *sample_shape(run_plan)), run_plan.shape))
    return decode


def _shown(
    samples: Tensor, shape: Mapping[str, Any], decode: Decode | None, size: int
) -> tuple[Tensor, Mapping[str, Any]]:
    """The samples as they are written, decoded `size` at a time if there is a decoder,
    and the shape that says their scale.

    Raises:
        ConfigError: some are NaN or infinite.
    """
    wrong = int((~samples.flatten(1).isfinite().all(1)).sum())
    if wrong:
        raise ConfigError(
            f"{wrong} of {len(samples)} samples have values that are NaN or infinite: lower evaluation.guidance, or "
            "look at the model's weights (dbtrain inspect)"
        )
    if decode is None:
        return samples, shape
    latents = as_encoded(samples, shape)
    return torch.cat([decode(latents[at : at + size]) for at in range(0, len(latents), size)]), {}


def _contexts(
    run: Run, run_plan: RunPlan, config: Config, count: int, device: torch.device, captions: Captions | None
) -> Tensor:
    """What the samples are told, (count, ...): the classes or captions in turn, or what the test split's
    samples have.

    Raises:
        DataError: there are no classes and no captions, and the data is not here.
    """
    if captions is not None:
        return _captioned(run_plan, captions, count, device)
    if "classes" in run_plan.shape:
        return torch.arange(count, device=device) % int(str(run_plan.shape["classes"]))
    paths = run.plan.paths if run.exists else {}
    located = run.config if run.exists else config
    split = replace(run_plan, config=located, paths=paths).data().test
    batch = split.batch(torch.arange(count) % len(split), device)
    return run_plan.model(0).to(device).example(batch).context


def _captioned(run_plan: RunPlan, captions: Captions, count: int, device: torch.device) -> Tensor:
    """The captions in turn, as the architecture reads them."""
    length, width = run_plan.shape["text"]
    text, mask = captions.encode(length)
    if text.shape[-1] != width:
        raise ConfigError(
            f"this text encoder makes embeddings of width {text.shape[-1]}, and {run_plan.config.name} is trained on "
            f"those of width {width}: give the one that the run's data was encoded with"
        )
    turn = torch.arange(count) % len(text)
    batch = {"text": text[turn].float().to(device), "mask": mask[turn].to(device)}
    batch["image"] = torch.zeros(count, *sample_shape(run_plan), device=device)
    return run_plan.model(0).to(device).example(batch).context


def _keep(
    samples: Tensor, shape: Mapping[str, Any], run: Run, out: Path | None, drawn: Drawn, captions: Sequence[str]
) -> str:
    suffix = ".png" if out is None else out.suffix
    content = BytesIO()
    _write(samples, suffix, shape, content, drawn, captions)
    try:
        if out is not None:
            out.write_bytes(content.getvalue())
            return str(out)
        run.store.write(PICTURE, content.getvalue())
        return run.store.where(PICTURE)
    except OSError as error:
        problem: DbtrainError = ConfigError(
            f"--out {out} cannot be written ({error.strerror}): choose another place{_saved(content, suffix)}"
        )
    except ShardError as error:
        problem = ShardError(f"{error}{_saved(content, suffix)}")
    raise problem


def _keep_routing(run: Run, out: Path | None, drawn: Drawn) -> str:
    """Write the picture of the routing beside the samples; returns where it is."""
    from dbtrain.evaluation.images import routing  # matplotlib, which most commands do without

    name = f"{(out or Path(PICTURE)).stem}{ROUTING}"
    store = run.store if out is None else Store(out.parent)
    try:
        store.write(name, routing.svg(drawn))
    except ShardError as error:
        raise ShardError(f"the samples are written, but not the picture of who denoised what: {error}") from error
    return store.where(name) if out is None else str(out.with_name(name))


def _saved(content: BytesIO, suffix: str) -> str:
    """Keep samples that took a while in the folder for temporary files;
    says where, as the end of a message."""
    try:
        with tempfile.NamedTemporaryFile(prefix="dbtrain-samples-", suffix=suffix, delete=False) as file:
            file.write(content.getvalue())
    except OSError as error:
        return f"; the samples are lost, as {tempfile.gettempdir()} does not take them either ({error.strerror})"
    return f"; the samples that were drawn are in {file.name}"


def _write(
    samples: Tensor,
    suffix: str,
    shape: Mapping[str, Any],
    file: BinaryIO,
    drawn: Drawn,
    captions: Sequence[str] = (),
) -> None:
    if suffix == ".npy":
        np.lib.format.write_array(file, as_encoded(samples, shape).numpy(), allow_pickle=False)
        return
    samples = enlarged(samples)
    sheet = captioned_grid(samples, captions) if captions else grid(samples)
    Image.fromarray(sheet).save(file, format="PNG", pnginfo=as_text(drawn))


def enlarged(samples: Tensor) -> Tensor:
    """Pictures (N, C, H, W), of which small ones are repeated pixel by pixel, a whole number of times, until
    their shorter side has `SIDE` pixels or more."""
    times = math.ceil(SIDE / min(samples.shape[-2:]))
    return samples.repeat_interleave(times, -2).repeat_interleave(times, -1) if times > 1 else samples


def grid(samples: Tensor) -> np.ndarray:
    """Pictures (N, C, H, W) in [-1, 1] side by side, row by row,
    as uint8 (height, width) or (height, width, 3)."""
    count, channels, height, width = samples.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.full((channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 255, dtype=torch.uint8)
    pixels = ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = picture
    return (sheet[0] if channels == 1 else sheet.permute(1, 2, 0)).contiguous().numpy()
