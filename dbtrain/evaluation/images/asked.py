"""What is asked of the sample command: refused before weights are read or copied, and encoders loaded."""

from pathlib import Path

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.errors import ConfigError
from dbtrain.evaluation.images.sampling import Sampling
from dbtrain.models.registry import ARCHITECTURES, architecture
from dbtrain.run.plan import RunPlan
from dbtrain.shards.storage.output import check_output


def check_asked(run_plan: RunPlan, config: Config, out: Path, decoded: bool, captioned: bool) -> None:
    """Everything about the options that can be told without the weights.

    Args:
        run_plan: plan of the run.
        config: its configuration, with what was asked in its section `evaluation`.
        out: file for the samples.
        decoded: whether an autoencoder makes pictures of them.
        captioned: whether captions are given.

    Raises:
        ConfigError: the architecture draws nothing, has learned no captions or no guidance, the solver does
            not fit, the steps cannot be shared, or the file cannot hold samples.
    """
    section = config.evaluation
    _check_file(out, sample_shape(run_plan), decoded)
    Sampling.of(run_plan, section, seed=0)
    if captioned and "text" not in run_plan.shape:
        raise ConfigError(
            f"--caption is for runs whose data has captions, and {run_plan.config.name} is trained on data.source="
            f"{run_plan.config.data.source} with {', '.join(run_plan.shape)}: leave it out"
        )
    if section.guidance != 1:
        run_plan.model(0).unconditional(_some_context(run_plan))


def _some_context(run_plan: RunPlan) -> Tensor:
    """A context (1, ...) as the architecture reads it, of no particular class or caption."""
    if "text" not in run_plan.shape:
        return torch.zeros(1, dtype=torch.int64)
    length, width = run_plan.shape["text"]
    batch = {"text": torch.zeros(1, length, width), "mask": torch.ones(1, length, dtype=torch.bool)}
    return run_plan.model(0).example({**batch, "image": torch.zeros(1, *sample_shape(run_plan))}).context


def sample_shape(run_plan: RunPlan) -> tuple[int, ...]:
    """Shape of one sample of a run.

    Raises:
        ConfigError: its architecture draws no samples.
    """
    name = run_plan.config.model.arch
    entry = architecture(name).samples
    if entry is None:
        able = ", ".join(n for n in ARCHITECTURES if architecture(n).samples)
        raise ConfigError(f"model.arch={name} draws no samples from noise; these do: {able}")
    return tuple(run_plan.shape[entry])


def _check_file(out: Path, shape: tuple[int, ...], decoded: bool) -> None:
    if out.suffix not in (".png", ".npy"):
        raise ConfigError(f"--out {out} must end in .png (a grid of pictures) or .npy (the samples themselves)")
    check_output("--out", out, lambda name: name.endswith((".png", ".npy")))
    if out.suffix == ".png" and not decoded and (len(shape) != 3 or shape[0] not in (1, 3)):
        kind = f"{shape[0]} channels" if len(shape) == 3 else f"shape {'x'.join(map(str, shape))}"
        raise ConfigError(
            f"samples of {kind} are no pictures: decode them with --vae FOLDER, the autoencoder that made the latents, "
            "or write them to a file with --out samples.npy"
        )
    if out.is_dir():
        raise ConfigError(f"--out {out} cannot be written (Is a directory): give a file in it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}")
