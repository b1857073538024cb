"""Text from a merged autoregressive model, token by token,
with one cache of keys and values for each evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.tokenizers import load_tokenizer
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import MergedModel, chain_levels, readouts
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.overrides import overridden
from dbtrain.evaluation.pipeline.places import OpenHosts
from dbtrain.evaluation.text.uncached import uncached
from dbtrain.evaluation.text.unmasking import unmasking
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import BlockModel, CachedModel, Continuation, NoiseProcess
from dbtrain.method.sampler import Evaluation, chain
from dbtrain.models.registry import architecture
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory

TOKEN_STREAM = 0
MOST = 128
"""The most tokens that are added if the user gives no number."""


class Generator:
    """Continues texts; its caches hold what a step needs of the tokens before.

    Args:
        model: all blocks.
        section: how the blocks are read out.
        seed: seed of the noise that the chain starts from (under ``evaluation.start=noise``) and of the
            tokens drawn.
        first: number of the first text, from which its draws follow.
    """

    def __init__(self, model: MergedModel, section: EvaluationConfig, seed: int, first: int = 0) -> None:
        self.model = model
        self.section = section
        self.seed = seed
        self.first = first
        self.noise: NoiseProcess = model.run_plan.noise()
        self.levels = chain_levels(model.run_plan, section.steps_per_block)
        # codes differ from level to level, so each level of the chain has its own cache; with one step a
        # block, that is one cache a block
        self.caches = [_with_cache(model.blocks.shells[0]).new_cache() for _ in self.levels]

    def probabilities(self, context: Tensor) -> Tensor:
        """p(next token) (N, V) after these T more tokens of context (N, T), by the readout of the section."""
        by_readout = readouts(list(self._evaluations(context)))
        probabilities: Tensor = by_readout[self.section.readout][:, -1]
        return probabilities

    def _evaluations(self, context: Tensor) -> Iterator[Evaluation]:
        """The blocks in a chain, on these tokens alone: those before are in the caches, one a level."""
        caches = iter(self.caches)

        def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            model, layers = _with_cache(self.model.blocks[block]), self.model.run_plan.runs(block)
            output = model.predict(layers, noisy, level, context, next(caches))
            return output, model.denoised(output)

        start, length = self._prior(context), context.shape[1]
        return chain(denoise, self.noise, self.model.run_plan.ranges, self.levels, start, level_shape=(length,))

    def _prior(self, context: Tensor) -> Tensor:
        """Codes (N, T, D) that the chain starts from; a position's noise follows from its number."""
        count, length = context.shape
        dim = self.model.blocks.shells[0].get_buffer("codebook").shape[1]
        if self.section.start == "zero":
            return torch.zeros(count, length, dim, device=context.device)
        positions = range(self.caches[0].length, self.caches[0].length + length)
        return torch.stack([self.noise.prior((dim,), self._draws("noise", p, count)) for p in positions], dim=1)

    def _draws(self, purpose: str, position: int, count: int) -> Draws:
        """The randomness of `count` texts at one position."""
        device = self.model.device
        key = torch.tensor(derive_seed(self.seed, "generate", purpose, position), device=device)
        return Draws(key, self.first + torch.arange(count, device=device))

    @torch.no_grad()
    def continue_from(self, prompt: Tensor, length: int, temperature: float) -> Tensor:
        """`length` more tokens (N, length) after prompts (N,
        P), P >= 0; at temperature 0 the likeliest each time."""
        start_token = _with_cache(self.model.blocks.shells[0]).start_token
        start = torch.full((len(prompt), 1), start_token, device=prompt.device)
        context = torch.cat([start, prompt], dim=1)
        drawn: list[Tensor] = []
        for _ in range(length):
            probabilities = self.probabilities(context)
            # the caches hold the context now, so their length is the number of the token that comes next
            context = self._draw(probabilities, temperature, position=self.caches[0].length)[:, None]
            drawn.append(context)
        return torch.cat(drawn, dim=1) if drawn else prompt[:, :0]

    def _draw(self, probabilities: Tensor, temperature: float, position: int) -> Tensor:
        """One token (N,) of each distribution (N, V), by the inverse of its distribution function."""
        if temperature == 0:
            return probabilities.argmax(dim=-1)
        sharp = (probabilities.double().log() / temperature).softmax(dim=-1)
        point = self._draws("token", position, len(sharp)).uniform((), TOKEN_STREAM).double()
        # rounding may leave the whole sum below the point: then the last token is taken
        return (sharp.cumsum(dim=-1) < point[:, None]).sum(dim=-1).clamp(max=sharp.shape[1] - 1)


def _with_cache(model: BlockModel) -> CachedModel:
    if not isinstance(model, CachedModel):
        raise ConfigError(f"{type(model).__name__} has no cache to continue a text with")
    return model


def cached(model: MergedModel, prompt: Tensor, length: int, temperature: float, seed: int, first: int = 0) -> Tensor:
    """`length` more tokens (N, length), one after the other; each costs one pass of one position."""
    return Generator(model, model.run_plan.config.evaluation, seed, first).continue_from(prompt, length, temperature)


Generate = Callable[[MergedModel, Tensor, int, float, int, int], Tensor]
"""(model, prompts (N, P), length, temperature, seed, number of the first) -> tokens after the prompts (N,
length)."""

GENERATORS: Mapping[Continuation, Generate] = {"cached": cached, "uncached": uncached, "unmasking": unmasking}
"""Generator for each way in which an architecture says that it continues a text (`BlockModel.continues`)."""


def continue_text(model: MergedModel, prompt: str, length: int | None, temperature: float, seed: int) -> str:
    """`length` tokens of text after a prompt; by default what the window has room for, at most `MOST`.

    Raises:
        ConfigError: the prompt and the length do not fit the window that the model was trained on,
            or its architecture continues no text.
    """
    config = model.run_plan.located()
    kind = architecture(config.model.arch).continues
    if kind is None:
        raise ConfigError(f"model.arch={config.model.arch} continues no text")
    tokenizer = load_tokenizer(config.data.model_dump()["tokenizer"])
    start = tokenizer.encode(prompt).tolist()
    length = _fitting(length, len(start), window=int(model.run_plan.shape["length"]))
    tokens = torch.tensor([start], dtype=torch.int64, device=model.device)
    return tokenizer.decode(GENERATORS[kind](model, tokens, length, temperature, seed, 0)[0].tolist())


def _fitting(length: int | None, prompt: int, window: int) -> int:
    """The number of tokens to add to a prompt of so many; ConfigError if both do not fit the window."""
    room = window - prompt
    length = min(MOST, max(1, room)) if length is None else length
    if length < 1:
        raise ConfigError(f"length={length} adds nothing to the prompt: give at least 1 token")
    if length > room:
        raise ConfigError(
            f"a prompt of {prompt} tokens and --length {length} exceed the {window} tokens (data.length) that "
            "the model was trained on: shorten one of them"
        )
    return length


def generate_text(
    run: Run,
    prompt: str,
    length: int | None,
    temperature: float,
    seed: int,
    merged: MergedDirectory | None = None,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
    hosts: OpenHosts | None = None,
) -> str:
    """The text after a prompt, by the merged model of a run, or by one of its blocks that lies elsewhere.

    Args:
        overrides: overrides of the section `evaluation`.
        tell: gets a line on which blocks were in memory, if not all were.
        hosts: connects to the cluster that a pipeline is in.

    Raises:
        ConfigError: its architecture continues no text, the prompt does not fit, or an override is wrong.
        ShardError: the run is not merged, or its files are damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open_run(run, device, merged, partial(overridden, overrides=overrides), hosts) as model:
        text = continue_text(model, prompt, length, temperature, seed)
        if not model.blocks.all_here:
            tell(model.blocks.told())
    return text
