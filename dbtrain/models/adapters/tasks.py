"""The architectures that a `Stack` becomes, one for each task: what is noised, loss, how a code is shown."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.adapters.cutting import cut, told
from dbtrain.models.adapters.modulation import zero
from dbtrain.models.adapters.stack import ADDED, Stack, State
from dbtrain.models.bounds import Count, Share
from dbtrain.models.chunked_loss import CrossEntropy
from dbtrain.models.layers import LevelEmbedding

LABEL_STREAM = 2
"""Stream of the draws that hides labels; 0 makes the levels and 1 the noise."""
Settings = dict[str, Any]
"""Settings of the library's class; the configuration may give the path of its config.json instead."""


def _install(model: BlockModel, stack: Stack, layers: Sequence[int], level_dim: int) -> None:
    """Give a model its stem, layers and head."""
    model.stem, model.layers, model.head = cut(stack, layers, level_dim)


def _add(model: BlockModel, modules: dict[str, nn.Module]) -> None:
    """Put modules that the original does not have below `added` of the stem."""
    stem = model.get_submodule("stem")
    if not hasattr(stem, ADDED):
        stem.add_module(ADDED, nn.ModuleDict())
    for name, module in modules.items():
        stem.get_submodule(ADDED).add_module(name, module)


def _run(
    model: BlockModel, stack: Stack, layers: Sequence[int], inputs: tuple[Tensor, Tensor, Tensor], level: Tensor | None
) -> State:
    """What the head takes, from the stem and these layers.

    Args:
        inputs: as `Stack.open` takes them.
        level: the condition of the layers, None for a network that has a time.
    """
    stem = model.get_submodule("stem")
    state = {**stem(stack.open, stem, *inputs), "told": told(level)}
    for number in layers:
        state = stack.layer(model.layers[str(number)], state)
    return state


def _close(model: BlockModel, stack: Stack, state: State) -> Tensor:
    """The original's output."""
    stem, head = model.get_submodule("stem"), model.get_submodule("head")
    output: Tensor = head(stack.close, stem, head, state)
    return output


class Classifier(BlockModel):
    """A classifier of images, of which every block denoises the label's code.

    Args:
        codebook: (classes, D) frozen unit-norm codes, common to all blocks.
        noise: the noise process.
        parametrisation: parametrisation of the network's input, output and time.
        image: (channels, height, width).
        classes: number of classes.
        config: keys of the class's own configuration, or the path of its config.json or of the folder that
            has it; what the data decides may be left out.
        depth: layers of the whole model; by default as many as `config` says.
        level_dim: width of the embedding of the level, from which every layer's norms are modulated.
        layers: numbers of the layers that this instance holds; all of them by default.

    Raises:
        ConfigError: settings and data do not fit.
    """

    codes = "classes"
    takes = ("image", "classes")
    classifies = True
    hides_target = True

    def __init__(
        self,
        *,
        codebook: Tensor,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        image: tuple[int, int, int],
        classes: int,
        config: Settings | None = None,
        depth: Count | None = None,
        level_dim: Count = 64,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.cut_as: Stack = self.stack(config or {}, {"image": image, "classes": classes})
        self.num_layers = int(str(depth))
        self.noise = noise
        self.parametrisation = parametrisation
        _install(self, self.cut_as, range(self.num_layers) if layers is None else layers, level_dim)
        code = zero(nn.Linear(codebook.shape[1], self.cut_as.width))
        _add(self, {"code": code, "level": LevelEmbedding(level_dim)})
        self.register_buffer("codebook", codebook, persistent=False)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,): the clean target is the label's code (N, D)."""
        label = batch["label"]
        return Example(clean=self.get_buffer("codebook")[label], context=batch["image"], target=label)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, classes)."""
        added = self.get_submodule(f"stem.{ADDED}")
        time = self.cut_as.time(level, self.parametrisation)
        code = added.get_submodule("code")(self.parametrisation.scale_input(noisy, level))
        condition = added.get_submodule("level")(time)[:, None]
        return _close(self, self.cut_as, _run(self, self.cut_as, layers, (code, time, context), condition))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,), in nats."""
        return functional.cross_entropy(output, target, reduction="none")

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, D)."""
        return output.float().softmax(dim=-1) @ self.get_buffer("codebook")


class Denoiser(BlockModel):
    """A denoiser of images or latents, given their class; it has a time of its own.

    Args:
        noise: the noise process.
        parametrisation: wraps the network: of its input, output and time.
        image: (channels, height, width) of an image or latent.
        classes: number of classes.
        config: keys of the class's own configuration, or the path of its config.json or of the folder that
            has it; what the data decides may be left out.
        depth: layers of the whole model; by default as many as `config` says.
        label_dropout: share of the training labels that are hidden, for classifier-free guidance.
        layers: numbers of the layers that this instance holds; all of them by default.

    Raises:
        ConfigError: settings and data do not fit.
    """

    takes = ("image", "classes")
    samples = "image"

    def __init__(
        self,
        *,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        image: tuple[int, int, int],
        classes: int,
        config: Settings | None = None,
        depth: Count | None = None,
        label_dropout: Share = 0.1,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.cut_as: Stack = self.stack(config or {}, {"image": image, "classes": classes})
        self.num_layers = int(str(depth))
        self.noise = noise
        self.parametrisation = parametrisation
        self.no_class = classes
        self.label_dropout = label_dropout
        _install(self, self.cut_as, range(self.num_layers) if layers is None else layers, 1)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,); draws hide a share of the labels."""
        label = batch["label"]
        if draws is not None and self.label_dropout:
            hidden = draws.uniform((), LABEL_STREAM) < self.label_dropout
            label = torch.where(hidden, self.no_class, label)
        return Example(clean=batch["image"], context=label, target=batch["image"])

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells no class, (N,).

        Raises:
            ConfigError: no label was hidden in training, so that the network knows no such context.
        """
        if not self.label_dropout:
            raise ConfigError("guidance needs a model that was trained with model.label_dropout above 0; ask for 1")
        return torch.full_like(context, self.no_class)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Denoised images (N, C, H, W), float32, from the network's output as its parametrisation has it."""
        time = self.cut_as.time(level, self.parametrisation)
        given = self.parametrisation.scale_input(noisy, level)
        output = _close(self, self.cut_as, _run(self, self.cut_as, layers, (given, time, context), None))
        return self.parametrisation.estimate(output.float(), noisy, level)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Squared error (N,), mean over the elements of an image."""
        return (output - target).square().flatten(1).mean(dim=1)

    def denoised(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output


class NextToken(BlockModel):
    """A causal language model, of which every block denoises the next token's code.

    Args:
        codebook: (V, D) frozen unit-norm codes, common to all blocks.
        noise: the noise process, with one level for each position.
        parametrisation: parametrisation of the network's input, output and time.
        vocabulary: number of tokens.
        config: keys of the class's own configuration, or the path of its config.json or of the folder that
            has it; what the data decides may be left out.
        depth: layers of the whole model; by default as many as `config` says.
        level_dim: width of the embedding of the level, from which every layer's norms are modulated.
        layers: numbers of the layers that this instance holds; all of them by default.

    Raises:
        ConfigError: settings and data do not fit.
    """

    codes = "vocabulary"
    takes = ("vocabulary",)
    per_position = True
    likelihood = "next_token"
    continues = "uncached"
    hides_target = True

    def __init__(
        self,
        *,
        codebook: Tensor,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        vocabulary: int,
        config: Settings | None = None,
        depth: Count | None = None,
        level_dim: Count = 64,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.cut_as: Any = self.stack(config or {}, {"vocabulary": vocabulary})
        self.num_layers = int(str(depth))
        self.noise = noise
        self.parametrisation = parametrisation
        self.start_token: int = self.cut_as.start_token
        _install(self, self.cut_as, range(self.num_layers) if layers is None else layers, level_dim)
        code = zero(nn.Linear(codebook.shape[1], self.cut_as.width))
        _add(self, {"code": code, "level": LevelEmbedding(level_dim)})
        self.register_buffer("codebook", codebook, persistent=False)
        self.cross_entropy = CrossEntropy()

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``tokens`` (N, L): clean are their codes (N, L, D), context (N, L) is the token before each."""
        tokens = batch["tokens"]
        before = functional.pad(tokens[:, :-1], (1, 0), value=self.start_token)
        return Example(clean=self.get_buffer("codebook")[tokens], context=before, target=tokens)

    def _read(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> State:
        added = self.get_submodule(f"stem.{ADDED}")
        time = self.cut_as.time(level, self.parametrisation)
        code = added.get_submodule("code")(self.parametrisation.scale_input(noisy, level))
        return _run(self, self.cut_as, layers, (code, time, context), added.get_submodule("level")(time))

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, T, V), from codes (N, T, D), levels (N, T) and the token before each (N, T)."""
        return _close(self, self.cut_as, self._read(layers, noisy, level, context))

    def predict_loss(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, target: Tensor
    ) -> Tensor:
        """Cross-entropy (N, T); in chunks where the logits of all positions are too many."""
        vocabulary = len(self.get_buffer("codebook"))
        if not self.cross_entropy.wants_chunks(target.numel(), vocabulary):
            return super().predict_loss(layers, noisy, level, context, target)
        state = self._read(layers, noisy, level, context)

        def readout(hidden: Tensor, _: Tensor) -> Tensor:
            return _close(self, self.cut_as, {**state, "hidden": hidden})

        return self.cross_entropy(readout, state["hidden"], state["hidden"][..., :1], target, vocabulary)

    def compile_parts(self) -> None:
        """The chunks of the loss."""
        self.cross_entropy.compile()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N, T), in nats."""
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view_as(target)

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, T, D)."""
        return output.float().softmax(dim=-1) @ self.get_buffer("codebook")
