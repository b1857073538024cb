"""Masked diffusion language model: a bidirectional transformer that fills in masked tokens (MD4, MDLM)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, Example, NoiseProcess
from dbtrain.models.layers import AdaLNBlock, AdaLNHead, LevelEmbedding


class MaskedStem(nn.Module):
    """Tokens, the mask among them, as vectors (N, L, dim), and the masked share as a condition (N, dim)."""

    def __init__(self, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary + 1, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, dim))
        self.level = LevelEmbedding(dim)

    def forward(self, tokens: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (N, L) and c_noise (N,)."""
        embedded: Tensor = self.tokens(tokens)
        return embedded + self.positions[:, : tokens.shape[1]], self.level(c_noise)


class MaskedLM(nn.Module):
    """Noised are token ids, there is no context, and the output are logits under the SUBS parameterisation.

    # MDLM, section 3.2.3: the mask is never predicted (it has no logit at all), and a token that is seen stays.

    Args:
        noise: the noise process, which masks with the id `vocabulary`.
        vocabulary: tokens, the mask not counted.
        length: tokens of a sample.
        layers: numbers of the layers that this instance holds; all of them by default.
        depth: layers of the whole model.

    Raises:
        ConfigError: dim is not a multiple of heads.
    """

    def __init__(
        self,
        *,
        noise: NoiseProcess,
        vocabulary: int,
        length: int,
        depth: int,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        layers: range | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"model.dim={dim} is not a multiple of model.heads={heads}")
        self.num_layers = depth
        self.noise = noise
        self.vocabulary = vocabulary
        self.stem = MaskedStem(vocabulary, length, dim)
        held = range(depth) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): AdaLNBlock(dim, heads, mlp_ratio, dropout) for i in held})
        self.head = AdaLNHead(dim, vocabulary)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``tokens`` (N, L): clean and target alike; the context is empty."""
        tokens = batch["tokens"]
        return Example(clean=tokens, context=tokens[:, :0], target=tokens)

    def run(self, layers: range, noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """(N, L + 1, dim): the tokens after these layers, and the condition, which the head needs too."""
        hidden, condition = self.stem(noisy, self.noise.embed_level(level))
        for i in layers:
            hidden = self.layers[str(i)](hidden, condition)
        return torch.cat([hidden, condition[:, None].to(hidden.dtype)], dim=1)

    def readout(self, hidden: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """Logits (N, L, vocabulary); of a token that is seen, all but its own are -inf."""
        logits: Tensor = self.head(hidden[:, :-1], hidden[:, -1])
        others = noisy[..., None] != torch.arange(self.vocabulary, device=noisy.device)
        seen = (noisy < self.vocabulary)[..., None]
        return logits.masked_fill(seen & others, -torch.inf)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,) in nats a token, the mean over all tokens: those that are seen have none."""
        return functional.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(dim=1)

    def denoised(self, output: Tensor) -> Tensor:
        """Probabilities of the tokens, (N, L, vocabulary)."""
        return output.float().softmax(dim=-1)
