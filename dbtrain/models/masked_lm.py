"""Masked diffusion language model: a bidirectional transformer that fills in masked tokens (MD4, MDLM)."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.bounds import Count, FromRun, Positive
from dbtrain.models.chunked_loss import CrossEntropy
from dbtrain.models.layers import LevelEmbedding, check_heads
from dbtrain.models.llama import ALIGNED, LlamaBlock, LlamaHead, View, hidden_width
from dbtrain.models.lookup import Embedding


class MaskedStem(nn.Module):
    """Tokens, the mask among them, as vectors (N, L, dim),
    and the masked share as a condition (N, 1, level_dim)."""

    def __init__(self, vocabulary: int, dim: int, level_dim: int) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary + 1, dim)
        self.level = LevelEmbedding(level_dim)

    def forward(self, tokens: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (N, L) and c_noise (N,)."""
        return self.tokens(tokens), self.level(c_noise[:, None])


class MaskedLM(BlockModel):
    """Masked diffusion language model.

    Noised are token ids, there is no context, and the outputs are logits under the SUBS parameterisation.

    # MDLM, section 3.2.3: the mask is never predicted (it has no logit), and a token that is seen stays.

    Args:
        noise: the noise process, which masks with the id `vocabulary`.
        parametrisation: parametrisation of the network's input, output and time.
        vocabulary: tokens, the mask not counted.
        depth: layers of the whole model.
        dim: width of the hidden states.
        heads: attention heads of a layer.
        mlp_ratio: hidden width of SwiGLU as a multiple of dim; a new run rounds it up to a multiple of 64.
        level_dim: width of the level's embedding.
        layers: numbers of the layers that this instance holds; all of them by default.
        hidden_multiple: number that the hidden width of SwiGLU is a multiple of.

    Raises:
        ConfigError: dim is not an even multiple of heads.
    """

    takes = ("vocabulary",)
    noised = "tokens"
    natural_noise = "masking"
    natural_parametrisation = "tokens"
    likelihood = "elbo"
    continues = "unmasking"
    settled = ALIGNED

    noise_defaults = MappingProxyType({"ranges": "alpha", "overlap": 0.0})
    """The ELBO splits exactly at the edges of the blocks."""

    def __init__(
        self,
        *,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        vocabulary: int,
        depth: Count = 6,
        dim: Count = 128,
        heads: Count = 4,
        mlp_ratio: Positive = 8 / 3,
        level_dim: Count = 64,
        layers: range | None = None,
        hidden_multiple: Annotated[int, FromRun()] = 1,
    ) -> None:
        super().__init__()
        self.num_layers = depth
        self.noise = noise
        self.parametrisation = parametrisation
        self.vocabulary = vocabulary
        self.stem = MaskedStem(vocabulary, dim, level_dim)
        numbers = range(depth) if layers is None else layers
        hidden = hidden_width(dim, mlp_ratio, hidden_multiple)
        self.layers = nn.ModuleDict({str(i): LlamaBlock(dim, heads, hidden, level_dim) for i in numbers})
        self.head = LlamaHead(dim, level_dim, vocabulary)
        self.cross_entropy = CrossEntropy()

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Heads share the width."""
        check_heads(keys["dim"], keys["heads"], rotary=True)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``tokens`` (N, L): clean and target alike; the context is empty."""
        tokens = batch["tokens"]
        return Example(clean=tokens, context=tokens[:, :0], target=tokens)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, L, vocabulary); of a token that is seen, all but its own are -inf."""
        logits: Tensor = self.head(*self._read(layers, noisy, level))
        others = noisy[..., None] != torch.arange(self.vocabulary, device=noisy.device)
        seen = (noisy < self.vocabulary)[..., None]
        return logits.masked_fill(seen & others, -torch.inf)

    def _read(self, layers: Sequence[int], noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """What the head takes: hidden states (N, L, dim) and conditions (N, L, level_dim)."""
        hidden, condition = self.stem(noisy, self.parametrisation.time(level))
        length = noisy.shape[1]
        everyone = View(torch.arange(length, device=noisy.device), mask=None, causal=False, kept=length)
        for i in layers:
            hidden = self.layers[str(i)](hidden, condition, everyone)
        return hidden, condition.expand(-1, length, -1).to(hidden.dtype)

    def predict_loss(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, target: Tensor
    ) -> Tensor:
        """Cross-entropy (N,) as of `loss`; in chunks where the logits of all positions are too many."""
        if not self.cross_entropy.wants_chunks(target.numel(), self.vocabulary):
            return super().predict_loss(layers, noisy, level, context, target)
        losses = self.cross_entropy(self.head, *self._read(layers, noisy, level), target, self.vocabulary)
        # a token that is seen stays, whatever the logits are
        return losses.masked_fill(noisy < self.vocabulary, 0.0).mean(dim=1)

    def compile_parts(self) -> None:
        """The chunks of the loss."""
        self.cross_entropy.compile()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,) in nats a token, the mean over all tokens: those that are seen have none."""
        return functional.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(dim=1)

    def denoised(self, output: Tensor) -> Tensor:
        """Probabilities of the tokens, (N, L, vocabulary)."""
        return output.float().softmax(dim=-1)
