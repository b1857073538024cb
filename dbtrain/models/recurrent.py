"""Recurrent-depth language model (Huginn, Geiping et al.
2025): prelude, a core applied again and again, coda."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.errors import ConfigError
from dbtrain.method.codebook import expected_code
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.bounds import Count, FromRun, Number, Positive
from dbtrain.models.chunked_loss import CrossEntropy
from dbtrain.models.layers import LevelEmbedding, check_heads
from dbtrain.models.llama import ALIGNED, LlamaBlock, LlamaHead, View, hidden_width
from dbtrain.models.lookup import Embedding


class RecurrentStem(nn.Module):
    """The prelude, which reads the tokens; and what brings a state,
    the prelude's output and the level to the core."""

    def __init__(self, vocabulary: int, dim: int, level_dim: int, prelude: nn.ModuleList, start: nn.Module) -> None:
        super().__init__()
        # one more than the vocabulary: the last stands before the first token
        self.tokens = Embedding(vocabulary + 1, dim)
        self.prelude = prelude
        self.start = start
        self.adapter = nn.Linear(2 * dim, dim, bias=False)
        self.level = LevelEmbedding(level_dim)

    def read(self, tokens: Tensor, condition: Tensor, view: View) -> Tensor:
        """The prelude's output (N, L, dim) of token ids (N, L)."""
        hidden: Tensor = self.tokens(tokens)
        for layer in self.prelude:
            hidden = layer(hidden, condition, view)
        return hidden

    def enter(self, state: Tensor, read: Tensor) -> Tensor:
        """What the core takes, from its state and the prelude's output  # Huginn, section 3.2."""
        entered: Tensor = self.adapter(torch.cat([state, read], dim=-1))
        # under autocast a linear layer's output is bfloat16;
        # what layers add up in stays as fine as the prelude's
        return entered.to(read.dtype)


class NoiseStart(nn.Module):
    """The state from noise itself, without weights: a truncated recurrence would give them no gradient."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, noise: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, dim), cut or filled with zeros."""
        return functional.pad(noise, (0, self.dim - noise.shape[-1]))


class RecurrentHead(nn.Module):
    """The coda and the readout."""

    def __init__(self, dim: int, level_dim: int, vocabulary: int, coda: nn.ModuleList) -> None:
        super().__init__()
        self.coda = coda
        self.linear = LlamaHead(dim, level_dim, vocabulary)

    def forward(self, state: Tensor, condition: Tensor, view: View) -> Tensor:
        """Logits (N, L, vocabulary)."""
        logits: Tensor = self.linear(self.finish(state, condition, view), condition)
        return logits

    def finish(self, state: Tensor, condition: Tensor, view: View) -> Tensor:
        """The coda's output (N, L, dim), which is read out."""
        for layer in self.coda:
            state = layer(state, condition, view)
        return state


class Recurrent(BlockModel):
    """Recurrent-depth language model: its core is one denoiser, applied `evaluation.steps_per_block` times.

    Noised is the next token's code in every place, the context is the tokens before it,
    the outputs are logits.

    As a denoiser the core runs once for each level, and training is a single pass; along the chain the code
    takes the place of the state. Unrolled it is the model as published: `iterations` passes through the core
    on a hidden state that starts from noise, with gradients through the last `backprop` of them.

    Args:
        codebook: (vocabulary, D) frozen unit-norm codes.
        noise: the noise process.
        parametrisation: parametrisation of the network's input, output and time.
        depth: layers of the core: those that are numbered.
        prelude: layers before the core, in the group `stem`.
        coda: layers after it, in the group `head`.
        dim: width of the hidden states.
        heads: attention heads of a layer.
        iterations: number of iterations of the core, in the end-to-end baseline.
        backprop: the last iterations, through which the baseline's gradients go.
        mlp_ratio: hidden width of SwiGLU as a multiple of dim; a new run rounds it up to a multiple of 64.
        level_dim: width of the level's embedding.
        layers: numbers of the core's layers that this instance holds; all of them by default.
        unrolled: whether the core is iterated.
        hidden_multiple: number that the hidden width of SwiGLU is a multiple of.

    Raises:
        ConfigError: dim is not an even multiple of heads, or backprop is more than iterations.
    """

    codes = "vocabulary"
    most_blocks = 1
    likelihood = "next_token"
    continues = "uncached"
    hides_target = True
    baseline_spread = 1.0
    settled = ALIGNED

    noise_defaults = MappingProxyType({"input_scaling": "signal", "overlap": 0.0})

    def __init__(
        self,
        *,
        codebook: Tensor,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        depth: Count = 2,
        prelude: Number = 1,
        coda: Number = 1,
        dim: Count = 128,
        heads: Count = 4,
        iterations: Count = 8,
        backprop: Count = 4,
        mlp_ratio: Positive = 8 / 3,
        level_dim: Count = 64,
        layers: range | None = None,
        unrolled: Annotated[bool, FromRun()] = False,
        hidden_multiple: Annotated[int, FromRun()] = 1,
    ) -> None:
        super().__init__()
        _check_backprop(iterations, backprop)
        self.num_layers = depth
        self.noise = noise
        self.parametrisation = parametrisation
        self.iterations, self.backprop = (iterations, backprop) if unrolled else (1, 1)

        vocabulary, code_dim = codebook.shape
        self.start_token = vocabulary
        hidden = hidden_width(dim, mlp_ratio, hidden_multiple)

        def several(count: int) -> nn.ModuleList:
            return nn.ModuleList([LlamaBlock(dim, heads, hidden, level_dim) for _ in range(count)])

        # not persistent: the codebook is stored once for all blocks, never in a shard
        self.register_buffer("codebook", codebook, persistent=False)
        start = NoiseStart(dim) if unrolled else nn.Linear(code_dim, dim, bias=False)
        self.stem = RecurrentStem(vocabulary, dim, level_dim, several(prelude), start)
        numbers = range(depth) if layers is None else layers
        self.layers = nn.ModuleDict(dict(zip(map(str, numbers), several(len(numbers)), strict=True)))
        self.head = RecurrentHead(dim, level_dim, vocabulary, several(coda))
        self.cross_entropy = CrossEntropy()

    @classmethod
    def baseline(cls, **arguments: Any) -> "Recurrent":
        """The model as published."""
        return cls(**arguments, unrolled=True)

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Heads share the width, no more iterations have gradients than there are, and no layer loops.

        Raises:
            ConfigError: one of these is not so.
        """
        if keys["loops"]:
            raise ConfigError(
                "model.loops loops layers of a block, and model.arch=recurrent iterates its whole core: leave it out, "
                "and set evaluation.steps_per_block, or model.iterations of the baseline"
            )
        check_heads(keys["dim"], keys["heads"], rotary=True)
        _check_backprop(keys["iterations"], keys["backprop"])

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``tokens`` (N, L): clean are their codes (N, L, D), the context is the token before each (N, L)."""
        tokens = batch["tokens"]
        before = functional.pad(tokens[:, :-1], (1, 0), value=self.start_token)
        return Example(clean=self.get_buffer("codebook")[tokens], context=before, target=tokens)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, L, V) of the token in each place."""
        logits: Tensor = self.head(*self._read(layers, noisy, level, context), _causal(context))
        return logits

    def _read(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the head takes: the core's state (N, L, dim) and conditions (N, L, level_dim)."""
        state, condition = self.iterate(layers, noisy, level, context)
        return state, condition.expand(-1, context.shape[1], -1).to(state.dtype)

    def predict_loss(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, target: Tensor
    ) -> Tensor:
        """Cross-entropy (N,) as of `loss`; in chunks where the logits of all positions are too many."""
        vocabulary = self.start_token
        if not self.cross_entropy.wants_chunks(target.numel(), vocabulary):
            return super().predict_loss(layers, noisy, level, context, target)
        state, condition = self._read(layers, noisy, level, context)
        hidden = self.head.finish(state, condition, _causal(context))
        return self.cross_entropy(self.head.linear, hidden, condition, target, vocabulary).mean(dim=1)

    def compile_parts(self) -> None:
        """The chunks of the loss."""
        self.cross_entropy.compile()

    def iterate(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The core's state (N, L, dim) after its iterations, and the condition (N, 1, level_dim)."""
        view = _causal(context)
        condition = self.stem.level(self.parametrisation.time(level)[:, None])
        # the prelude knows no level: the same for the whole chain
        read = self.stem.read(context, self.stem.level(torch.zeros_like(level)[:, None]), view)
        state = self.stem.start(self.parametrisation.scale_input(noisy, level))
        with torch.no_grad():
            for _ in range(self.iterations - self.backprop):
                state = self._core(layers, state, read, condition, view)
        # truncated backpropagation: what came before is a constant  # Huginn, section 3.3
        for _ in range(self.backprop):
            state = self._core(layers, state, read, condition, view)
        return state, condition

    def _core(self, layers: Sequence[int], state: Tensor, read: Tensor, condition: Tensor, view: View) -> Tensor:
        hidden = self.stem.enter(state, read)
        for i in layers:
            hidden = self.layers[str(i)](hidden, condition, view)
        # without a norm a state that is iterated grows
        return functional.rms_norm(hidden, hidden.shape[-1:])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,) in nats a token, the mean over the places."""
        return functional.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(dim=1)

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, L, D)."""
        return expected_code(output, self.get_buffer("codebook"))


def _check_backprop(iterations: int, backprop: int) -> None:
    if backprop > iterations:
        raise ConfigError(
            f"model.backprop={backprop} is more than model.iterations={iterations}: set it to at most that"
        )


def _causal(sequence: Tensor) -> View:
    length = sequence.shape[1]
    return View(torch.arange(length, device=sequence.device), mask=None, causal=True, kept=length)
