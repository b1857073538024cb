"""Text from a merged autoregressive model, token by token, with one cache of keys and values for each evaluation."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.tokenizers import load_tokenizer
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import MergedModel, chain_levels, readouts
from dbtrain.evaluation.text.uncached import uncached
from dbtrain.evaluation.text.unmasking import unmasking
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import BlockModel, CachedModel, Continuation, NoiseProcess
from dbtrain.method.sampler import Evaluation, chain
from dbtrain.models.registry import architecture
from dbtrain.shards.storage.store import Store

TOKEN_STREAM = 0
MOST = 128
"""Tokens that are added where the user says no number."""


class Generator:
    """Continues texts; what a step needs of the past is in its caches.

    Args:
        model: all blocks.
        section: how the blocks are read out.
        seed: of the noise that the chain starts from (under ``evaluation.start=noise``) and of the tokens drawn.
        first: number of the first text, from which its draws follow.
    """

    def __init__(self, model: MergedModel, section: EvaluationConfig, seed: int, first: int = 0) -> None:
        self.model = model
        self.section = section
        self.seed = seed
        self.first = first
        self.blocks = [_with_cache(block) for block in model.blocks]
        self.noise: NoiseProcess = model.run_plan.noise()
        self.levels = chain_levels(model.run_plan, section.steps_per_block)
        # a level of the chain is seen with its own codes, so each has its own cache: one a block with one step a block
        self.caches = [self.blocks[0].new_cache() for _ in self.levels]

    def probabilities(self, context: Tensor) -> Tensor:
        """p(next token) (N, V) after these T more tokens of context (N, T), by the readout of the section."""
        found: Tensor = readouts(list(self._walk(context)))[self.section.readout][:, -1]
        return found

    def _walk(self, context: Tensor) -> Iterator[Evaluation]:
        caches = iter(self.caches)

        def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            own = self.blocks[block]
            output = own.predict(self.model.run_plan.runs(block), noisy, level, context, next(caches))
            return output, own.denoised(output)

        start = self._start(context)
        shape = (context.shape[1],)
        return chain(denoise, self.noise, self.model.run_plan.ranges, self.levels, start, level_shape=shape)

    def _start(self, context: Tensor) -> Tensor:
        count, new = context.shape
        dim = self.model.blocks[0].get_buffer("codebook").shape[1]
        if self.section.start == "zero":
            return torch.zeros(count, new, dim, device=context.device)
        first = self.caches[0].length
        noise = [self.noise.prior((dim,), self._draws("noise", first + i, count)) for i in range(new)]
        return torch.stack(noise, dim=1)

    def _draws(self, what: str, position: int, count: int) -> Draws:
        device = self.model.device
        key = torch.tensor(derive_seed(self.seed, "generate", what, position), device=device)
        return Draws(key, self.first + torch.arange(count, device=device))

    @torch.no_grad()
    def continue_from(self, prompt: Tensor, length: int, temperature: float) -> Tensor:
        """`length` more tokens (N, length) after prompts (N, P), P >= 0; at temperature 0 the likeliest each time."""
        start = torch.full((len(prompt), 1), self.blocks[0].start_token, device=prompt.device)
        context = torch.cat([start, prompt], dim=1)
        drawn: list[Tensor] = []
        for _ in range(length):
            probabilities = self.probabilities(context)
            position = self.caches[0].length
            context = self._draw(probabilities, temperature, position)[:, None]
            drawn.append(context)
        return torch.cat(drawn, dim=1) if drawn else prompt[:, :0]

    def _draw(self, probabilities: Tensor, temperature: float, position: int) -> Tensor:
        if temperature == 0:
            return probabilities.argmax(dim=-1)
        sharp = (probabilities.double().log() / temperature).softmax(dim=-1)
        point = self._draws("token", position, len(sharp)).uniform((), TOKEN_STREAM).double()
        # the last number that has any probability, in case rounding leaves the sum below the point
        return (sharp.cumsum(dim=-1) < point[:, None]).sum(dim=-1).clamp(max=sharp.shape[1] - 1)


def _with_cache(model: BlockModel) -> CachedModel:
    if not isinstance(model, CachedModel):
        raise ConfigError(f"{type(model).__name__} has no cache to continue a text with")
    return model


def cached(model: MergedModel, prompt: Tensor, length: int, temperature: float, seed: int, first: int = 0) -> Tensor:
    """`length` more tokens (N, length), one after the other; each costs one pass of one slot."""
    return Generator(model, model.run_plan.config.evaluation, seed, first).continue_from(prompt, length, temperature)


Generate = Callable[[MergedModel, Tensor, int, float, int, int], Tensor]
"""(model, prompts (N, P), length, temperature, seed, number of the first) -> tokens after the prompts (N, length)."""

GENERATORS: Mapping[Continuation, Generate] = {"cached": cached, "uncached": uncached, "unmasking": unmasking}
"""By what an architecture says of itself."""


def continue_text(model: MergedModel, prompt: str, length: int | None, temperature: float, seed: int) -> str:
    """`length` tokens of text after a prompt; by default what the window has room for, at most `MOST`.

    Raises:
        ConfigError: the prompt and the length do not fit the window that the model was trained on, or its architecture
            continues no text.
    """
    config = model.run_plan.located()
    name = architecture(config.model.arch).continues
    if name is None:
        raise ConfigError(f"model.arch={config.model.arch} continues no text")
    tokenizer = load_tokenizer(config.data.model_dump()["tokenizer"])
    start = tokenizer.encode(prompt).tolist()
    window = int(model.run_plan.shape["length"])
    room = window - len(start)
    length = min(MOST, room) if length is None else length
    if not 0 < length <= room:
        raise ConfigError(
            f"a prompt of {len(start)} tokens and --length {max(1, length)} exceed the {window} tokens "
            "(data.length) that the model was trained on: shorten one of them"
        )
    tokens = torch.tensor([start], dtype=torch.int64, device=model.device)
    return tokenizer.decode(GENERATORS[name](model, tokens, length, temperature, seed, 0)[0].tolist())


def generate_text(run: Store, prompt: str, length: int | None, temperature: float, seed: int) -> str:
    """The text after a prompt, by the merged model of a run.

    Raises:
        ConfigError: its architecture continues no text, or the prompt does not fit.
        ShardError: the run is not merged, or its files are damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return continue_text(MergedModel.of_run(run, device), prompt, length, temperature, seed)
