"""A merged model as one PyTorch module that is called with inputs alone, for programs of the user's."""

import math
from collections.abc import Callable
from functools import partial

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dbtrain.config import EvaluationConfig
from dbtrain.config.explain import explain
from dbtrain.errors import ArgumentError, ConfigError, refuse_argument
from dbtrain.evaluation.images.asked import sample_shape
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.images.told import check_pixels, check_told
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.evaluation.opening import open_run, read_merged_model
from dbtrain.evaluation.overrides import overridden
from dbtrain.evaluation.text.generate import continue_text
from dbtrain.evaluation.text.unmasking import unmask
from dbtrain.method.interface import Batch
from dbtrain.method.sampler import Solver, Spacing
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import CONFIG, MergedDirectory
from dbtrain.shards.storage.store import Store

STEPS = 50
"""Noise levels of a sample by default, as many as in `dbtrain sample`."""


class MergedNetwork(nn.Module):
    """All blocks of a run as one module: `.to`, `.parameters` and `.state_dict` work as of any other.

    What it is called with and what it returns follows from what the architecture can do:

    - a classifier takes images (N, C, H, W) of floats from -1 (black) to 1 (white), as the data has them in
      training, and returns probabilities (N, classes);
    - a model that draws samples takes classes (N,), or captions (N, L, D + 1) as `with_mask` of
      `dbtrain.method.masked_context` makes them, and returns a sample of each: pictures (N, C, H, W) in
      [-1, 1], or latents;
    - a causal language model takes tokens (N, T), and returns probabilities (N, T + 1, V): in place t of the
      token that comes after the first t, so that the last are those of the next token;
    - a masked language model takes tokens (N, L), where the number `vocabulary` is the mask, and returns
      probabilities (N, L, V) of the token in each place.

    The run's section `evaluation` says how the blocks are read out (`evaluation.readout`, `.steps_per_block`,
    `.start`). All that is random follows from the run's seed and the number of the input.

    Args:
        merged: the blocks, all in memory.
    """

    def __init__(self, merged: MergedModel) -> None:
        super().__init__()
        self._merged = merged
        self.blocks = nn.ModuleList(merged.blocks.shells)
        self.sampling: Sampling | None = None
        """How samples are drawn; None for a model that draws none."""
        if merged.blocks[0].samples:
            self.draw_with()

    def draw_with(
        self,
        steps: int = STEPS,
        solver: Solver = "heun",
        spacing: Spacing = "karras",
        guidance: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Choose how samples are drawn from now on; without this call the defaults hold.

        Args:
            steps: noise levels from the greatest to the least.
            solver: ``heun`` evaluates twice a step, ``euler`` once.
            spacing: ``karras`` for steps over the whole range, ``slices`` for the same number in every slice.
            guidance: scale of classifier-free guidance; 1 for none.
            seed: seed of the noise.

        Raises:
            ConfigError: the steps cannot be shared by the slices, or the solver does not fit the noise.
            ArgumentError: an argument is of another type, or none of the values that it may have.
        """
        asked = {"steps": steps, "solver": solver, "spacing": spacing, "guidance": guidance}
        try:
            section = EvaluationConfig.model_validate(asked, strict=True)
        except ValidationError as error:
            raise ArgumentError("; ".join(explain(each) for each in error.errors())) from None
        if type(seed) is not int:
            refuse_argument("seed", seed, "a whole number")
        self.sampling = Sampling.of(self._merged.run_plan, section, seed)

    @property
    def merged(self) -> MergedModel:
        """The blocks one by one, their plan, and each evaluation along their chain."""
        # `.to` moves only the parameters: inputs and noise are made on the device where those are
        self._merged.device = next(self.blocks.parameters()).device
        return self._merged

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; empty where the data has none."""
        return self._merged.run_plan.class_names

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens, which is also the number of the mask; None if the data is no text."""
        return self._merged.run_plan.shape.get("vocabulary")

    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        """Probabilities or samples, float32, as the class says.

        Args:
            inputs: N of them, on any device.
            first: number of the first one, from which its noise follows.

        Raises:
            ConfigError: the inputs do not fit, or the architecture does none of these.
        """
        merged = self.merged
        return _reader(merged)(self, merged, inputs.to(merged.device), first)

    @torch.no_grad()
    def answer(self, inputs: Tensor, first: int = 0) -> Tensor:
        """The likeliest class (N,) or next token (N,), tokens (N, L) without masks, or the samples.

        Arguments and errors are those of `forward`. Masks are filled in several steps, so that the tokens
        that are filled in see each other.
        """
        merged, inputs = self.merged, inputs.to(self.merged.device)
        if merged.blocks[0].likelihood == "elbo":
            _check_tokens(merged, inputs, longest=int(merged.run_plan.shape["length"]), masks=True)
            steps = math.ceil(inputs.shape[1] / merged.run_plan.split.blocks)
            return unmask(merged, inputs, steps, temperature=0.0, seed=0, first=first)
        found = self(inputs, first)
        if self.sampling is not None:
            return found
        return (found if found.ndim == 2 else found[:, -1]).argmax(dim=-1)

    def continue_text(self, prompt: str, length: int | None = None, temperature: float = 1.0, seed: int = 0) -> str:
        """The text after a prompt; by default as many tokens as the window has room for, at most 128.

        Raises:
            ConfigError: the architecture continues no text, or prompt and length do not fit the window.
        """
        return continue_text(self.merged, prompt, length, temperature, seed)


Reader = Callable[[MergedNetwork, MergedModel, Tensor, int], Tensor]


def _reader(merged: MergedModel) -> Reader:
    """The function that reads the answer of an architecture, chosen by what its class says that it can do."""
    kind = merged.blocks[0]
    if kind.classifies:
        return _classified
    if kind.samples:
        return _drawn
    readers: dict[str | None, Reader] = {"next_token": _next_tokens, "elbo": _masked_tokens}
    if kind.likelihood in readers:
        return readers[kind.likelihood]
    raise ConfigError(
        f"model.arch={merged.run_plan.config.model.arch} neither classifies nor draws samples nor models text, so that "
        "its merged model has no answer of its own: take what you need from `merged.evaluations`"
    )


def _read_out(merged: MergedModel, batch: Batch, count: int, first: int) -> Tensor:
    """Probabilities (N, ..., V) by the readout of the run."""
    section = merged.run_plan.config.evaluation
    draws = merged.draws(first + torch.arange(count))
    found: Tensor = readouts(merged.evaluations(batch, draws, section.steps_per_block))[section.readout]
    return found


def _classified(network: MergedNetwork, merged: MergedModel, images: Tensor, first: int) -> Tensor:
    shape = merged.run_plan.shape.get("image")
    if shape is not None and list(images.shape[1:]) != list(shape):
        raise ConfigError(
            f"images of shape {tuple(images.shape)} do not fit: this model takes (N, {', '.join(map(str, shape))})"
        )
    check_pixels(images, merged.run_plan.shape)
    images = images.float()
    # a label is needed only for the shape of the target; an evaluation does not see its value
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return _read_out(merged, {"image": images, "label": labels}, len(images), first)


def _drawn(network: MergedNetwork, merged: MergedModel, told: Tensor, first: int) -> Tensor:
    run_plan, sampling = merged.run_plan, network.sampling
    assert sampling is not None, "a model that draws has one"
    check_told(told, run_plan.shape)
    size = run_plan.config.evaluation.batch_size
    return draw(run_plan, merged.blocks.__getitem__, told, sample_shape(run_plan), sampling, size)


def _next_tokens(network: MergedNetwork, merged: MergedModel, tokens: Tensor, first: int) -> Tensor:
    _check_tokens(merged, tokens, longest=int(merged.run_plan.shape["length"]) - 1)
    # in the last place stands the token that is asked for; a causal model does not see what is put there
    batch = {"tokens": torch.cat([tokens, tokens.new_zeros(len(tokens), 1)], dim=1)}
    return _read_out(merged, batch, len(tokens), first)


def _masked_tokens(network: MergedNetwork, merged: MergedModel, tokens: Tensor, first: int) -> Tensor:
    """Probabilities of each text, from the block that owns the masked share of its tokens."""
    run_plan = merged.run_plan
    _check_tokens(merged, tokens, longest=int(run_plan.shape["length"]), masks=True)
    low, high = run_plan.ranges.of(run_plan.ranges.blocks - 1)[0], run_plan.ranges.of(0)[1]
    share = (tokens == int(run_plan.shape["vocabulary"])).float().mean(dim=1).clamp(low, high)
    owners = torch.tensor([run_plan.ranges.owner(level) for level in share.tolist()], device=tokens.device)
    parts = []
    for block in sorted(set(owners.tolist())):
        rows = owners == block
        output = merged.blocks[block].predict(run_plan.runs(block), tokens[rows], share[rows], tokens[rows][:, :0])
        parts.append((rows.nonzero()[:, 0], output.float().softmax(dim=-1)))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([probabilities for _, probabilities in parts])[order]


def _check_tokens(merged: MergedModel, tokens: Tensor, longest: int, masks: bool = False) -> None:
    """ConfigError unless these are token ids (N, T) that fit the window."""
    vocabulary = int(merged.run_plan.shape["vocabulary"])
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] > longest:
        raise ConfigError(
            f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype} do not fit: this model takes whole numbers "
            f"(N, T) with T up to {longest}"
        )
    if not ((tokens >= 0) & (tokens < vocabulary + masks)).all():
        raise ConfigError(f"a token is below 0 or above {vocabulary - 1 + masks}, the last that this model knows")


def load_merged(path: str, device: torch.device) -> MergedNetwork:
    """The merged model of a run, or one that lies or was carried somewhere by itself, verified.

    Args:
        path: directory or URL of the run (out/name), or of the merged model.
        device: where the blocks are put.

    Raises:
        ShardError: there is no merged model, or a file of it is damaged.
    """
    store = Store(path)
    if store.exists(CONFIG):
        return MergedNetwork(read_merged_model(MergedDirectory(store), device)).eval()
    changed = partial(overridden, overrides=["evaluation.resident=all"])
    return MergedNetwork(open_run(Run(store), device, changed=changed)).eval()
