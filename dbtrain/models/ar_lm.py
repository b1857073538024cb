"""Autoregressive language model as a denoiser of the next token's code, seeing the clean tokens before it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.method.codebook import expected_code
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.bounds import Count, FromRun, Positive
from dbtrain.models.chunked_loss import CrossEntropy, token_cross_entropy
from dbtrain.models.layers import check_heads
from dbtrain.models.llama import ALIGNED, KVCache, LlamaBlock, LlamaHead, TokenStem, View, hidden_width

StreamName = Literal["single", "concat"]


class Stream(Protocol):
    """How T clean tokens and T noisy codes become the slots of a sequence."""

    def join(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """(N, T, dim) twice -> slots (N, S, dim)."""

    def conditions(self, condition: Tensor) -> Tensor:
        """Level embeddings (N, T, level_dim) -> those of the slots (N, S, level_dim)."""

    def view(self, past: int, new: int, device: torch.device) -> View:
        """Who sees whom when `new` positions follow `past`."""


class SingleStream:
    """Slot i holds token i-1 plus its own noisy code of token i; plain causal attention over T slots."""

    def join(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """Their sum."""
        return tokens + codes

    def conditions(self, condition: Tensor) -> Tensor:
        """Unchanged."""
        return condition

    def view(self, past: int, new: int, device: torch.device) -> View:
        """Slot i sees slots up to i; without a past, or for one slot, attention needs no mask."""
        positions = torch.arange(past, past + new, device=device)
        if past == 0 or new == 1:
            return View(positions, None, causal=past == 0 and new > 1, kept=new)
        return View(positions, _no_later(past, new, device), causal=False, kept=new)


class ConcatStream:
    """T slots of clean tokens, then T of noisy codes  # paper, section 4, appendix (autoregressive models).

    A clean slot sees the clean ones up to its own; a noisy slot i sees the clean ones up to i,
    which end with token i-1, and itself. Only clean slots are kept, and they carry no level.
    """

    def join(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """One after the other."""
        return torch.cat([tokens, codes], dim=1)

    def conditions(self, condition: Tensor) -> Tensor:
        """Zeros for the clean slots."""
        return torch.cat([torch.zeros_like(condition), condition], dim=1)

    def view(self, past: int, new: int, device: torch.device) -> View:
        """A mask of the kind above."""
        positions = torch.arange(past, past + new, device=device).repeat(2)
        clean = _no_later(past, new, device)
        same = torch.eye(new, dtype=torch.bool, device=device)
        mask = torch.cat([clean.repeat(2, 1), torch.cat([torch.zeros_like(same), same])], dim=1)
        return View(positions, mask, causal=False, kept=new)


def _no_later(past: int, new: int, device: torch.device) -> Tensor:
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)


STREAMS: Mapping[str, type[SingleStream] | type[ConcatStream]] = {"single": SingleStream, "concat": ConcatStream}


class ARLM(BlockModel):
    """Autoregressive language model (Llama-style) that denoises the next token's code.

    Each code has a level of its own, and the context is the clean prefix.

    Args:
        codebook: (V, D) frozen unit-norm codes, common to all blocks.
        noise: the noise process, with one level for each position.
        parametrisation: parametrisation of the network's input, output and time.
        depth: layers of the whole model.
        dim: width of the hidden states.
        heads: attention heads of a layer.
        mlp_ratio: hidden width of SwiGLU as a multiple of dim; a new run rounds it up to a multiple of 64.
        level_dim: width of the level's embedding, from which every layer is modulated at every position.
        stream: `single`: a slot holds a token and the noisy code of the next;
            `concat`: 2L slots, as in the paper.
        layers: numbers of the layers that this instance holds; all of them by default.
        hidden_multiple: number that the hidden width of SwiGLU is a multiple of.

    Raises:
        ConfigError: dim is not an even multiple of heads.
    """

    codes = "vocabulary"
    per_position = True
    likelihood = "next_token"
    continues = "cached"
    hides_target = True
    settled = ALIGNED

    noise_defaults = MappingProxyType({"input_scaling": "signal", "overlap": 0.1})
    """Pure noise of unit variance in the stream keeps the top block from learning;
    the paper's overlap for text."""

    def __init__(
        self,
        *,
        codebook: Tensor,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        depth: Count = 6,
        dim: Count = 128,
        heads: Count = 4,
        mlp_ratio: Positive = 8 / 3,
        level_dim: Count = 64,
        stream: StreamName = "single",
        layers: range | None = None,
        hidden_multiple: Annotated[int, FromRun()] = 1,
    ) -> None:
        super().__init__()
        self.num_layers = depth
        self.noise = noise
        self.parametrisation = parametrisation
        self.stream: Stream = STREAMS[stream]()
        # not persistent: the codebook is stored once for all blocks, never in a shard
        self.register_buffer("codebook", codebook, persistent=False)
        vocabulary, code_dim = codebook.shape
        self.start_token = vocabulary
        # one more than there are tokens: the last stands before the first of a sample
        self.stem = TokenStem(vocabulary + 1, code_dim, dim, level_dim)
        numbers = range(depth) if layers is None else layers
        hidden = hidden_width(dim, mlp_ratio, hidden_multiple)
        self.layers = nn.ModuleDict({str(i): LlamaBlock(dim, heads, hidden, level_dim) for i in numbers})
        self.head = LlamaHead(dim, level_dim, vocabulary)
        self.cross_entropy = CrossEntropy()

    @classmethod
    def baseline(cls, **arguments: Any) -> "ARLM":
        """The baseline of either stream: with no codes to show, T slots that hold none would only cost
        FLOPs."""
        return cls(**{**arguments, "stream": "single"})

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Heads share the width."""
        check_heads(keys["dim"], keys["heads"], rotary=True)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``tokens`` (N, L): clean are their codes (N, L, D), context (N, L) is the token before each."""
        tokens = batch["tokens"]
        return Example(clean=self.get_buffer("codebook")[tokens], context=self.before(tokens), target=tokens)

    def before(self, tokens: Tensor) -> Tensor:
        """The token before each (N, L); before the first, the start token."""
        return functional.pad(tokens[:, :-1], (1, 0), value=self.start_token)

    def new_cache(self) -> KVCache:
        """An empty cache of keys and values."""
        return KVCache()

    def predict(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (N, T, V).

        Args:
            layers: numbers of the layers to apply, in this order.
            noisy: (N, T, D) codes.
            level: (N, T).
            context: (N, T) the token before each.
            cache: cache of the positions before these T, to which they are added; None if there are none.
        """
        logits: Tensor = self.head(*self._read(layers, noisy, level, context, cache))
        return logits

    def _read(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the head takes: hidden states (N, T, dim) and conditions (N, T, level_dim)."""
        new, past = context.shape[1], 0 if cache is None else cache.length
        token, code, code_level = self.stem(
            context, self.parametrisation.scale_input(noisy, level), self.parametrisation.time(level)
        )
        hidden, condition = self.stream.join(token, code), self.stream.conditions(code_level)
        view = self.stream.view(past, new, context.device)
        for depth, i in enumerate(layers):
            hidden = self.layers[str(i)](hidden, condition, view, cache, depth)
        if cache is not None:
            cache.length += new
        # the last slots are those of the noisy codes
        return hidden[:, -new:], code_level.to(hidden.dtype)

    def predict_loss(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, target: Tensor
    ) -> Tensor:
        """Cross-entropy (N, T); in chunks where the logits of all positions are too many."""
        vocabulary = self.start_token
        if not self.cross_entropy.wants_chunks(target.numel(), vocabulary):
            return super().predict_loss(layers, noisy, level, context, target)
        hidden, condition = self._read(layers, noisy, level, context)
        return self.cross_entropy(self.head, hidden, condition, target, vocabulary)

    def compile_parts(self) -> None:
        """The chunks of the loss."""
        self.cross_entropy.compile()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N, T), in nats."""
        return token_cross_entropy(output, target)

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, T, D)."""
        return expected_code(output, self.get_buffer("codebook"))
