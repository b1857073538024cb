"""Forward-Forward (Hinton 2022) behind the plug: each block tells right labels from wrong ones by its own activity."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example, NoiseProcess
from dbtrain.method.objective import Precision

WRONG_STREAM = 2
"""Stream of the draws that picks the wrong labels."""


def normalise(hidden: Tensor) -> Tensor:
    """Scale every position's activity (..., D) to mean square 1, which hides how good the block before found it."""
    return functional.rms_norm(hidden, hidden.shape[-1:])


class ForwardForward(nn.Module):
    """A classifier whose blocks are trained by goodness; it has no head.

    Its layers are the model's own, met at the seams between blocks: what enters a block is cut from the graph and
    normalised, what leaves it is kept. The stem belongs to block 0.

    Args:
        model: behind the plug, with all layers, and with codes that its stem is shown as the label.
        blocks: layers of every block.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[range]) -> None:
        super().__init__()
        # in a tuple it is no submodule, so that parameters have their usual names
        self._model = (model,)
        self.stem, self.layers = model.get_submodule("stem"), model.get_submodule("layers")
        self.num_layers: int = cast(BlockModel, model).num_layers
        self.noise: NoiseProcess = cast(BlockModel, model).noise
        self.blocks = tuple(blocks)
        self.register_buffer("codebook", model.get_buffer("codebook"), persistent=False)
        self._seen: list[Tensor] = []
        for number, layers in enumerate(self.blocks):
            for layer in layers if number else ():
                enter = _cut if layer == layers.start else _cut_condition
                self.layers.get_submodule(str(layer)).register_forward_pre_hook(enter)
            self.layers.get_submodule(str(layers.stop - 1)).register_forward_hook(partial(_keep, self._seen))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ForwardForward":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # the model is no submodule: its layers move with ours, its codebook has to be handed on
        self._model[0].register_buffer("codebook", self.get_buffer("codebook"), persistent=False)
        return self

    def example(self, batch: Batch) -> Example:
        """The model's own."""
        return cast(BlockModel, self._model[0]).example(batch)

    def goodness(self, layers: range, code: Tensor, context: Tensor) -> Tensor:
        """(blocks within `layers`, N) float32: an activity's sum of squares, less its D elements; mean over positions.

        # Hinton 2022, eq. (1), with the number of units as the threshold
        """
        self._seen.clear()
        level = torch.ones(len(code), device=code.device)
        cast(BlockModel, self._model[0]).run(layers, code, level, context)
        activity = [hidden.float() for hidden in self._seen]
        self._seen.clear()
        return torch.stack([(h.square().sum(-1) - h.shape[-1]).flatten(1).mean(1) for h in activity])

    def run(self, layers: range, noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """(N, classes): with every class's code in turn, the goodness of all blocks but the first, summed.

        As in Hinton 2022, section 3.3; of the first if there is no other.
        """
        scores = []
        for code in self.get_buffer("codebook"):
            goodness = self.goodness(layers, code.expand(len(context), -1), context)
            scores.append(goodness[min(1, len(goodness) - 1) :].sum(0))
        return torch.stack(scores, dim=1)

    def readout(self, hidden: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """Goodness serves as logits."""
        return hidden

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,) of these logits, in nats; it is not what trains."""
        return functional.cross_entropy(output, target, reduction="none")

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code, (N, D)."""
        return output.float().softmax(dim=-1) @ self.get_buffer("codebook")


def _cut(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *rest = _cut_condition(layer, inputs)
    return (normalise(hidden.detach()), *rest)


def _cut_condition(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # the condition comes from the stem, which later blocks must not train
    hidden, *rest = inputs
    return (hidden, *(i.detach() if isinstance(i, Tensor) else i for i in rest))


def _keep(seen: list[Tensor], layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    seen.append(output)


class ForwardForwardObjective(nn.Module):
    """Mean over blocks of -log p(right label is right) - log p(wrong label is wrong), p = sigmoid of the goodness.

    Args:
        model: all blocks.
        precision: `bf16` runs the network under autocast.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: Batch, key: Tensor, positions: Tensor) -> Tensor:
        """Loss, a float32 scalar; one wrong label a sample, drawn from (key, positions)."""
        model = cast(ForwardForward, self.model)
        codes, context = self._right_and_wrong(batch, Draws(key, positions))
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            goodness = model.goodness(range(model.num_layers), codes, context)
        right, wrong = goodness.chunk(2, dim=1)
        return (functional.softplus(-right) + functional.softplus(wrong)).mean()

    def compile(self, *arguments: Any, **options: Any) -> None:
        """As of :class:`dbtrain.method.objective.BlockObjective`."""
        self.__dict__["_right_and_wrong"] = torch.compiler.disable(self._right_and_wrong)  # type: ignore[no-untyped-call]
        super().compile(*arguments, **options)

    def _right_and_wrong(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """(2N, D) codes of the right labels, then of wrong ones, and the context of both."""
        model = cast(ForwardForward, self.model)
        example, codes = model.example(batch), model.get_buffer("codebook")
        step = 1 + (draws.uniform((), WRONG_STREAM) * (len(codes) - 1)).long()
        wrong = (example.target + step) % len(codes)
        return torch.cat([example.clean, codes[wrong]]), torch.cat([example.context] * 2)
