"""Diffusion transformer (Peebles & Xie 2023): denoises an image or latent, conditioned on level and class."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.bounds import Count, Positive, Share
from dbtrain.models.class_labels import ClassLabels
from dbtrain.models.layers import AdaLNBlock, AdaLNHead, LevelEmbedding, check_heads, check_patches, draw_normal
from dbtrain.models.lookup import Embedding


class DiTStem(nn.Module):
    """Patches as tokens (N, T, dim); level and class as one condition (N, dim)."""

    def __init__(self, image: tuple[int, int, int], patch: int, dim: int, classes: int) -> None:
        super().__init__()
        channels, height, width = image
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(draw_normal(torch.empty(1, (height // patch) * (width // patch), dim)))
        self.level = LevelEmbedding(dim)
        # one more than there are classes: the last stands for no class
        self.classes = Embedding(classes + 1, dim)
        draw_normal(self.classes.weight)

    def forward(self, image: Tensor, c_noise: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled noisy images (N, C, H, W), c_noise (N,), labels (N,)."""
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        return tokens, self.level(c_noise) + self.classes(label)


class DiT(BlockModel):
    """Diffusion transformer that denoises an image or latent, given its class.

    Args:
        noise: the noise process.
        parametrisation: wraps the network: of its input, output and time.
        image: (channels, height, width) of an image or latent.
        classes: number of classes.
        label_dropout: share of the training labels that are hidden, for classifier-free guidance.
        layers: numbers of the layers that this instance holds; all of them by default.
        depth: layers of the whole model.
        dim: width of the hidden states.
        heads: attention heads of a layer.
        patch: side of a patch, in pixels.
        mlp_ratio: hidden width of the feed-forward layers as a multiple of dim.

    Raises:
        ConfigError: the image is not a whole number of patches, or dim not a multiple of heads.
    """

    takes = ("image", "classes")
    natural_parametrisation = "edm"
    samples = "image"

    noise_defaults = MappingProxyType({"ranges": "paper", "weighting": "edm"})
    """An L2 loss takes EDM's weight, and there is no code to measure."""

    def __init__(
        self,
        *,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        image: tuple[int, int, int],
        classes: int,
        depth: Count = 6,
        dim: Count = 64,
        heads: Count = 4,
        patch: Count = 2,
        mlp_ratio: Positive = 4.0,
        label_dropout: Share = 0.1,
        layers: range | None = None,
    ) -> None:
        super().__init__()
        check_patches(image, patch)
        self.num_layers = depth
        self.noise = noise
        self.parametrisation = parametrisation
        self.image = image
        self.patch = patch
        self.labels = ClassLabels(classes, label_dropout)
        self.stem = DiTStem(image, patch, dim, classes)
        numbers = range(depth) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): AdaLNBlock(dim, heads, mlp_ratio) for i in numbers})
        self.head = AdaLNHead(dim, image[0] * patch * patch)

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Heads share the width."""
        check_heads(keys["dim"], keys["heads"])

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,); draws hide a share of the labels."""
        return self.labels.example(batch, draws)

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells no class, (N,).

        Raises:
            ConfigError: no label was hidden in training, so that the network knows no such context.
        """
        return self.labels.unconditional(context)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Denoised images (N, C, H, W), float32, from the network's output as its parametrisation has it."""
        c_noise = self.parametrisation.time(level)
        hidden, condition = self.stem(self.parametrisation.scale_input(noisy, level), c_noise, context)
        for i in layers:
            hidden = self.layers[str(i)](hidden, condition)
        patches = self.head(hidden, condition.to(hidden.dtype)).float()
        return self.parametrisation.estimate(self._image(patches), noisy, level)

    def _image(self, patches: Tensor) -> Tensor:
        """(N, T, C * patch * patch) -> (N, C, H, W)."""
        channels, height, width = self.image
        rows, columns, size = height // self.patch, width // self.patch, self.patch
        patches = patches.reshape(-1, rows, columns, channels, size, size)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Squared error (N,), mean over the elements of an image."""
        return (output - target).square().flatten(1).mean(dim=1)

    def denoised(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output
