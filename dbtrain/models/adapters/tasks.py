"""The architectures that a `Stack` becomes, one for each task: what is noised, loss, how a code is shown."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dbtrain.errors import ConfigError
from dbtrain.method.codebook import expected_code
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.adapters.cutting import cut, told
from dbtrain.models.adapters.modulation import zero
from dbtrain.models.adapters.stack import ADDED, State
from dbtrain.models.bounds import Count, Share
from dbtrain.models.captions import Captions
from dbtrain.models.chunked_loss import CrossEntropy, token_cross_entropy
from dbtrain.models.class_labels import ClassLabels
from dbtrain.models.layers import LevelEmbedding

Settings = dict[str, Any]
"""Settings of the library's class; the configuration may give the path of its config.json instead."""


def _install(
    model: Any,
    shape: Mapping[str, Any],
    config: Settings | None,
    depth: int | None,
    layers: Sequence[int] | None,
    level_dim: int = 1,
) -> None:
    """Give a model its `Stack`, and of the original the stem, layers and head that it holds.

    Args:
        model: model without modules; its other arguments are as its class describes them.
        shape: shape of the data, as `Stack` takes it.
    """
    model.cut_as = model.stack(config or {}, shape)
    model.num_layers = int(str(depth))  # completed from the settings where the configuration does not say it
    numbers = range(model.num_layers) if layers is None else layers
    model.stem, model.layers, model.head = cut(model.cut_as, numbers, level_dim)


def _add_code(model: Any, codebook: Tensor, level_dim: int) -> None:
    """Put below `added` of the stem what the original does not have: how it is shown a code and a level."""
    stem = model.get_submodule("stem")
    if not hasattr(stem, ADDED):
        stem.add_module(ADDED, nn.ModuleDict())
    added = getattr(stem, ADDED)
    added.add_module("code", zero(nn.Linear(codebook.shape[1], model.cut_as.width)))
    added.add_module("level", LevelEmbedding(level_dim))
    model.register_buffer("codebook", codebook, persistent=False)


def _told(model: Any, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a noisy code adds to the hidden states, the network's time, and the condition of its layers."""
    added = model.get_submodule(f"stem.{ADDED}")
    time = model.cut_as.time(level, model.parametrisation)
    code = added.get_submodule("code")(model.parametrisation.scale_input(noisy, level))
    return code, time, added.get_submodule("level")(time)


def _run(model: Any, layers: Sequence[int], inputs: tuple[Tensor, Tensor, Tensor], level: Tensor | None) -> State:
    """What the head takes, from the stem and these layers.

    Args:
        inputs: as `Stack.open` takes them.
        level: the condition of the layers, None for a network that has a time.
    """
    stem = model.get_submodule("stem")
    state: State = {**stem(model.cut_as.open, stem, *inputs), "told": told(level)}
    for number in layers:
        state = model.cut_as.layer(model.layers[str(number)], state)
    return state


def _close(model: Any, state: State) -> Tensor:
    """The original's output."""
    stem, head = model.get_submodule("stem"), model.get_submodule("head")
    output: Tensor = head(model.cut_as.close, stem, head, state)
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
        self.noise = noise
        self.parametrisation = parametrisation
        _install(self, {"image": image, "classes": classes}, config, depth, layers, level_dim)
        _add_code(self, codebook, level_dim)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,): the clean target is the label's code (N, D)."""
        label = batch["label"]
        return Example(clean=self.get_buffer("codebook")[label], context=batch["image"], target=label)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, classes)."""
        code, time, condition = _told(self, noisy, level)
        return _close(self, _run(self, layers, (code, time, context), condition[:, None]))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,), in nats."""
        return functional.cross_entropy(output, target, reduction="none")

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, D)."""
        return expected_code(output, self.get_buffer("codebook"))


class Denoiser(BlockModel):
    """A denoiser of images or latents, given their class or caption; it has a time of its own.

    Args:
        noise: the noise process.
        parametrisation: wraps the network: of its input, output and time.
        image: (channels, height, width) of an image or latent, or (channels, frames, height, width).
        classes: number of classes, of data that has classes.
        text: (tokens, width) of the embeddings of a caption, of data that has captions.
        config: keys of the class's own configuration, or the path of its config.json or of the folder that
            has it; what the data decides may be left out.
        depth: layers of the whole model; by default as many as `config` says.
        label_dropout: share of the training labels or captions that are hidden, for classifier-free guidance.
        layers: numbers of the layers that this instance holds; all of them by default.

    Raises:
        ConfigError: settings and data do not fit.
    """

    takes = ("image",)
    may_take = ("classes", "text")
    samples = "image"
    cut_as: Any
    """The `Stack` of the network."""

    def __init__(
        self,
        *,
        noise: NoiseProcess,
        parametrisation: Parametrisation,
        image: tuple[int, ...],
        classes: int | None = None,
        text: tuple[int, int] | None = None,
        config: Settings | None = None,
        depth: Count | None = None,
        label_dropout: Share = 0.1,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.noise = noise
        self.parametrisation = parametrisation
        told = _told_of(self.stack, {"classes": classes, "text": text})
        self.condition = ClassLabels(told["classes"], label_dropout) if "classes" in told else Captions(label_dropout)
        _install(self, {"image": image, **told}, config, depth, layers)

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``image`` (N, C, ...), and ``label`` (N,), or ``text`` (N, L, D) and ``mask`` (N, L); draws hide a
        share of the labels or captions."""
        return self.condition.example(batch, draws)

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells no class, (N,), or no caption, (N, L, D + 1).

        Raises:
            ConfigError: none was hidden in training, so that the network knows no such context.
        """
        return self.condition.unconditional(context)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Denoised images (N, C, ...), float32, from the network's output as its parametrisation has it."""
        time = self.cut_as.time(level, self.parametrisation)
        given = self.parametrisation.scale_input(noisy, level)
        output = _close(self, _run(self, layers, (given, time, context), None))
        return self.parametrisation.estimate(output.float(), noisy, level)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Squared error (N,), mean over the elements of an image."""
        return (output - target).square().flatten(1).mean(dim=1)

    def denoised(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output


def _told_of(stack: Any, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the data's shape that a denoiser is told.

    Raises:
        ConfigError: the network cannot be told what the data has.
    """
    there = {name: value for name, value in shape.items() if value is not None}
    if not (found := {name: there[name] for name in stack.conditions if name in there}):
        raise ConfigError(
            f"{stack.original} is told {' or '.join(stack.conditions)} of an image, and the data has "
            f"{' and '.join(there) or 'neither classes nor text'}: choose other data, or another model.arch"
        )
    return found


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
    cut_as: Any
    """The `Stack` of the network."""

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
        self.noise = noise
        self.parametrisation = parametrisation
        _install(self, {"vocabulary": vocabulary}, config, depth, layers, level_dim)
        self.start_token: int = self.cut_as.start_token
        _add_code(self, codebook, level_dim)
        self.cross_entropy = CrossEntropy()

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """``tokens`` (N, L): clean are their codes (N, L, D), context (N, L) is the token before each."""
        tokens = batch["tokens"]
        before = functional.pad(tokens[:, :-1], (1, 0), value=self.start_token)
        return Example(clean=self.get_buffer("codebook")[tokens], context=before, target=tokens)

    def _read(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> State:
        code, time, condition = _told(self, noisy, level)
        return _run(self, layers, (code, time, context), condition)

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Logits (N, T, V), from codes (N, T, D), levels (N, T) and the token before each (N, T)."""
        return _close(self, self._read(layers, noisy, level, context))

    def predict_loss(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, target: Tensor
    ) -> Tensor:
        """Cross-entropy (N, T); in chunks where the logits of all positions are too many."""
        vocabulary = len(self.get_buffer("codebook"))
        if not self.cross_entropy.wants_chunks(target.numel(), vocabulary):
            return super().predict_loss(layers, noisy, level, context, target)
        state = self._read(layers, noisy, level, context)

        def readout(hidden: Tensor, _: Tensor) -> Tensor:
            return _close(self, {**state, "hidden": hidden})

        return self.cross_entropy(readout, state["hidden"], state["hidden"][..., :1], target, vocabulary)

    def compile_parts(self) -> None:
        """The chunks of the loss."""
        self.cross_entropy.compile()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N, T), in nats."""
        return token_cross_entropy(output, target)

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code under the predicted distribution, (N, T, D)."""
        return expected_code(output, self.get_buffer("codebook"))
