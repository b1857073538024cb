"""How a class of another library is cut: which modules are layers, which head, and what runs between."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from dbtrain.method.parametrisation import Parametrisation

State = dict[str, Any]
"""What passes from layer to layer by name: streams such as `hidden`, and constants such as rotary tables."""
Task = Literal["classify", "denoise", "continue"]
"""Logits of the classes of an image; a clean image or latent, given its class; logits of the next token."""
ADDED = "added"
"""Part of a name that marks a parameter which the original class does not have."""


class Stack(Protocol):
    """A class of networks behind the plug; one instance holds the settings of one network.

    The constructor takes the settings of the class, a mapping, and the data's shape, and completes the first
    by the second; it raises ConfigError where they do not fit.
    """

    original: ClassVar[str]
    """Name of the class, for messages."""
    package: ClassVar[str]
    """Name of the package that has the class, which is also the name of its distribution."""
    task: ClassVar[Task]
    """What the network is for: it decides what is noised, and how the network is told a code."""
    layers: ClassVar[str]
    """Name of the list of layers in the original, in the order in which they run."""
    head: ClassVar[Sequence[str]]
    """Beginnings of the names that are the head's; what is neither layer nor head is the stem's."""
    modulated: ClassVar[Mapping[str, int]]
    """Norms of a layer that a network without a time of its own is told the level by: 2 to scale and shift
    what they give, 1 to scale it. Empty for a network that has a time."""
    depth_key: ClassVar[str]
    """Key of the settings that counts the layers."""
    natural_noise: ClassVar[str]
    """The same as `BlockModel.natural_noise`."""
    natural_parametrisation: ClassVar[str]
    """The same as `BlockModel.natural_parametrisation`."""
    noise_defaults: ClassVar[Mapping[str, Any]]
    """The same as `BlockModel.noise_defaults`."""
    conditions: ClassVar[Sequence[str]]
    """What a denoiser can be told of a sample, of which the data has one: `classes`, or `text`, which are
    embeddings of a caption."""
    inputs: ClassVar[Mapping[str, str]]
    """Parameters of :meth:`additions` that only make an input of the original: what they are, by name."""
    pipeline: ClassVar[Sequence[str]]
    """What the library's pipeline calls its networks of this class, the one for the most noise first."""
    steps: ClassVar[int]
    """Number of steps by which that pipeline counts time, where it has several such networks."""
    width: int
    """Width of the hidden states."""

    def __init__(self, config: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
        """Settings as a configuration has them, and the data's shape: `image`, `classes` or `vocabulary`."""

    @classmethod
    def settled(cls, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The settings as run.json keeps them; ConfigError if they are those of another class.

        Args:
            value: keys of the class's own configuration.
            source: what they are from, for messages.
        """

    def build(self, layers: Sequence[int]) -> nn.Module:
        """The original, made with no other layers than these, which stand in its list from 0 on."""

    def additions(self) -> nn.ModuleDict:
        """Modules of the stem, besides those of the task, that the original does not have."""

    def time(self, level: Tensor, parametrisation: Parametrisation) -> Tensor:
        """Our level (N,) as the time that the network was made for, such as an index from 0 to 999."""

    def open(self, stem: Any, given: Tensor, time: Tensor, condition: Tensor) -> State:
        """What the first layer takes.

        Args:
            stem: has the original's modules under the names that they have there.
            given: the scaled noisy image or latent; of a classifier or a language model what its noisy code
                adds to the hidden states, (N, width) or (N, T, width).
            time: what :meth:`time` returns, (N,).
            condition: images, classes or tokens, (N, ...), or the embeddings of captions with their mask as
                `without_mask` takes them apart, (N, L, D + 1).
        """

    def layer(self, layer: Any, state: State) -> State:
        """What the next layer takes; `state["told"]` are keywords by which a layer is told the level."""

    def close(self, stem: Any, head: Any, state: State) -> Tensor:
        """The output of the original."""


NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


METHODS = ("build", "open", "layer", "close")
"""What every `Stack` has; the others have defaults."""


def is_stack(kind: type[Any]) -> bool:
    """Whether a class of the user's is written as a `Stack`, and no network itself."""
    return not issubclass(kind, nn.Module) and all(callable(getattr(kind, name, None)) for name in METHODS)
