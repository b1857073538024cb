"""Vision transformer as a denoiser of the label's code, seeing the image's patches at every level."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.method.codebook import expected_code
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.bounds import Count, Positive, Share
from dbtrain.models.layers import AdaLNBlock, AdaLNHead, LevelEmbedding, check_heads, check_patches, draw_normal


class ViTStem(nn.Module):
    """Patches and the noisy code as tokens (N, 1 + T, dim), and the level as a condition (N, dim)."""

    def __init__(self, image: tuple[int, int, int], patch: int, dim: int, code_dim: int) -> None:
        super().__init__()
        channels, height, width = image
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.code = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(draw_normal(torch.empty(1, 1 + (height // patch) * (width // patch), dim)))
        self.level = LevelEmbedding(dim)

    def forward(self, image: Tensor, code: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), scaled codes (N, D), c_noise (N,)."""
        patches = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.code(code)[:, None], patches], dim=1) + self.positions
        return tokens, self.level(c_noise)


class ViT(BlockModel):
    """Vision transformer that denoises the label's code.

    The context is the image, and the outputs are logits.

    Args:
        codebook: (classes, D) frozen unit-norm codes, common to all blocks.
        noise: the noise process.
        parametrisation: parametrisation of the network's input, output and time.
        image: (channels, height, width).
        layers: numbers of the layers that this instance holds; all of them by default.
        depth: layers of the whole model.
        dim: width of the hidden states.
        heads: attention heads of a layer.
        patch: side of a patch, in pixels.
        mlp_ratio: hidden width of the feed-forward layers as a multiple of dim.
        dropout: share that is dropped in attention and feed-forward layers.

    Raises:
        ConfigError: the image is not a whole number of patches, or dim not a multiple of heads.
    """

    codes = "classes"
    takes = ("image",)
    classifies = True
    hides_target = True

    def __init__(
        self,
        *,
        codebook: Tensor,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        image: tuple[int, int, int],
        depth: Count = 6,
        dim: Count = 64,
        heads: Count = 4,
        patch: Count = 2,
        mlp_ratio: Positive = 4.0,
        dropout: Share = 0.0,
        layers: range | None = None,
    ) -> None:
        super().__init__()
        check_patches(image, patch)
        self.num_layers = depth
        self.noise = noise
        self.parametrisation = parametrisation
        self.image = image
        # not persistent: the codebook is stored once for all blocks, never in a shard
        self.register_buffer("codebook", codebook, persistent=False)
        self.stem = ViTStem(image, patch, dim, codebook.shape[1])
        numbers = range(depth) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): AdaLNBlock(dim, heads, mlp_ratio, dropout) for i in numbers})
        self.head = AdaLNHead(dim, len(codebook))

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Heads share the width."""
        check_heads(keys["dim"], keys["heads"])

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,): the clean target is the label's code (N, D)."""
        label = batch["label"]
        return Example(clean=self.get_buffer("codebook")[label], context=batch["image"], target=label)

    def open(self, noisy: Tensor, level: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, 1 + T, dim), the code's first, and the condition (N, dim)."""
        c_noise = self.parametrisation.time(level)
        hidden, condition = self.stem(context, self.parametrisation.scale_input(noisy, level), c_noise)
        return hidden, condition

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, classes), read from the code's token."""
        hidden, condition = self.open(noisy, level, context)
        for i in layers:
            hidden = self.layers[str(i)](hidden, condition)
        logits: Tensor = self.head(hidden[:, :1], condition.to(hidden.dtype))[:, 0]
        return logits

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,), in nats."""
        return functional.cross_entropy(output, target, reduction="none")

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, D)."""
        return expected_code(output, self.get_buffer("codebook"))
