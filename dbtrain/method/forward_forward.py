"""Forward-Forward (Hinton 2022) behind the plug: each block
tells right labels from wrong ones by its own activity."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example
from dbtrain.method.objective import Precision

WRONG_STREAM = 2
"""Stream of the draws that picks the wrong labels."""


def normalise(hidden: Tensor) -> Tensor:
    """Scale every position's activity (..., D) to mean square 1,
    which hides how good the block before found it."""
    return functional.rms_norm(hidden, hidden.shape[-1:])


def goodness(hidden: Tensor) -> Tensor:
    """Sum of squares of a position's D activities less D, mean over positions: (N, ..., D) to (N,) float32.

    # Hinton 2022, eq. (1), with the number of units as the threshold
    """
    hidden = hidden.float()
    return (hidden.square().sum(-1) - hidden.shape[-1]).flatten(1).mean(1)


class ForwardForward(BlockModel):
    """A classifier whose blocks are trained by goodness; it has no head, and its stem belongs to block 0.

    Args:
        model: a model that holds all layers, shows its hidden states (`BlockModel.open`), and has a codebook;
            its stem is given the code of a label.
        blocks: layers of every block, in the order in which they are applied.
    """

    def __init__(self, model: BlockModel, blocks: Sequence[Sequence[int]]) -> None:
        super().__init__()
        # a model in a tuple is not registered as a submodule, so that parameters keep their usual names
        self._model = (model,)
        self.stem, self.layers = model.get_submodule("stem"), model.layers
        self.num_layers = model.num_layers
        self.noise, self.parametrisation = model.noise, model.parametrisation
        self.blocks = tuple(blocks)
        self.register_buffer("codebook", model.get_buffer("codebook"), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ForwardForward":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # the model is no registered submodule: it shares our layers, but has to be given the moved codebook
        self._model[0].register_buffer("codebook", self.get_buffer("codebook"), persistent=False)
        return self

    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """Read the batch as the model itself reads it."""
        return self._model[0].example(batch)

    def activities(self, layers: Sequence[int], code: Tensor, context: Tensor) -> list[Tensor]:
        """Hidden states (N, ..., D) after each block of `layers`; no gradient reaches the block before."""
        level = torch.ones(len(code), device=code.device)
        hidden, condition = self._model[0].open(code, level, context)
        activities: list[Tensor] = []
        for block in (block for block in self.blocks if block[-1] <= layers[-1]):
            if activities:
                # the condition comes from the stem, which later blocks must not train
                hidden, condition = normalise(activities[-1].detach()), condition.detach()
            for layer in block:
                hidden = self.layers[str(layer)](hidden, condition)
            activities.append(hidden)
        return activities

    def goodness(self, layers: Sequence[int], code: Tensor, context: Tensor) -> Tensor:
        """Goodness (blocks within `layers`, N) of each block's hidden states, float32."""
        return torch.stack([goodness(hidden) for hidden in self.activities(layers, code, context)])

    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """(N, classes) logits: with each class as label the goodness of all blocks but the first, summed.

        This follows Hinton 2022, section 3.3. If there is only one block, its goodness counts. `noisy` is not
        used.
        """
        logits = []
        for code in self.get_buffer("codebook"):
            by_block = self.goodness(layers, code.expand(len(context), -1), context)
            logits.append(by_block[1:].sum(0) if len(by_block) > 1 else by_block[0])
        return torch.stack(logits, dim=1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (N,) of these logits, in nats; what trains is `ForwardForwardObjective`."""
        return functional.cross_entropy(output, target, reduction="none")

    def denoised(self, output: Tensor) -> Tensor:
        """Expected code, (N, D)."""
        return output.float().softmax(dim=-1) @ self.get_buffer("codebook")


class ForwardForwardObjective(nn.Module):
    """Mean over blocks of -log p(right label is right) - log p(wrong label is wrong),
    p = sigmoid of the goodness.

    Args:
        model: all blocks.
        precision: `bf16` runs the network under autocast.
    """

    def __init__(self, model: ForwardForward, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: Batch, key: Tensor, positions: Tensor) -> Tensor:
        """Loss, a float32 scalar; one wrong label a sample, drawn from (key, positions)."""
        model = self.model
        codes, context = self._right_and_wrong(batch, Draws(key, positions))
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            by_block = model.goodness(range(model.num_layers), codes, context)
        right, wrong = by_block.chunk(2, dim=1)
        return (functional.softplus(-right) + functional.softplus(wrong)).mean()

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the module without its draws, as :class:`dbtrain.method.objective.BlockObjective` does."""
        self.__dict__["_right_and_wrong"] = torch.compiler.disable(self._right_and_wrong)  # type: ignore[no-untyped-call]
        super().compile(*arguments, **options)

    def _right_and_wrong(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """(2N, D) codes of the right labels, then of wrong ones, and the context of both."""
        model = self.model
        example, codes = model.example(batch), model.get_buffer("codebook")
        # a label plus a number from 1 to classes - 1, modulo the number of classes, is never the right label
        moved = 1 + (draws.uniform((), WRONG_STREAM) * (len(codes) - 1)).long()
        wrong = (example.target + moved) % len(codes)
        return torch.cat([example.clean, codes[wrong]]), torch.cat([example.context] * 2)
