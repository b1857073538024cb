"""What people do with an exported model; each function goes into the files of the models that can do it."""

import math
from typing import Any

import torch
from torch import Tensor

from dbtrain.data.encoded import as_encoded
from dbtrain.errors import ConfigError
from dbtrain.evaluation.export.routing import RoutedBlocks, drawn
from dbtrain.evaluation.images.told import check_pixels, check_told
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.sampler import Solver, Spacing, chain, guide, spaced_levels


@torch.no_grad()
def classify(model: RoutedBlocks, images: Tensor, seed: int = 0) -> Tensor:
    """Probabilities (N, classes) of images (N, C, H, W) with pixels from -1 (black) to 1 (white), or latents.

    Raises:
        ConfigError: the images have another scale.
    """
    check_pixels(images, model.config["shape"])
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return model.probabilities({"image": images.float(), "label": labels}, seed)


@torch.no_grad()
def sample(
    model: RoutedBlocks,
    labels: Tensor,
    steps: int = 50,
    solver: Solver = "heun",
    spacing: Spacing = "karras",
    guidance: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Samples (N, C, ...) float32, one for each class number or caption, in the scale of the data.

    Args:
        model: what `load` returns.
        labels: (N,) int64, numbers of classes; of a model of captions (N, L, D + 1) float32, embeddings with
            their mask, as `with_mask(text, mask)` makes them.
        steps: noise levels from the greatest to the least.
        solver: Heun evaluates twice a step.
        spacing: `karras` for steps over the whole range, `slices` for the same number in every slice.
        guidance: scale of classifier-free guidance; 1 for none.
        seed: seed of the noise.

    Raises:
        ConfigError: there is no such solver here, no step, or no such class or caption.
    """
    if solver not in ("euler", "heun") or steps < 1:
        raise ConfigError(f"solver={solver!r} and steps={steps}: give 'euler' or 'heun', and 1 step or more")
    check_told(labels, model.config["shape"])
    levels = spaced_levels(model.noise, model.ranges, steps, spacing)
    key, numbers = torch.tensor(derive_seed(seed, "sample")), torch.arange(len(labels))
    draws = Draws(key.to(labels.device), numbers.to(labels.device))
    start = model.noise.prior(tuple(model.config["shape"]["image"]), draws)

    def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = model.blocks[block]
        output = model.output(block, noisy, level, labels)
        if guidance != 1:
            output = guide(output, model.output(block, noisy, level, network.unconditional(labels)), guidance)
        return output, network.denoised(output)

    last = list(chain(denoise, model.noise, model.ranges, levels, start, solver))[-1]
    return as_encoded(last.denoised, model.config["shape"])


@torch.no_grad()
def generate(model: RoutedBlocks, prompt: Tensor, length: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """`length` more tokens (N, length) after prompts (N, P) int64; at temperature 0 the likeliest each time.

    Every token reads the whole text again.
    """
    text = prompt
    for position in range(prompt.shape[1], prompt.shape[1] + length):
        # the last place is that of the token to be drawn; a causal model does not see what is put there
        batch = {"tokens": torch.cat([text, text.new_zeros(len(text), 1)], dim=1)}
        sharp = sharpened(model.probabilities(batch, seed)[:, -1].log(), temperature).double().softmax(dim=-1)
        key = torch.tensor(derive_seed(seed, "generate", "token", position), device=text.device)
        point = Draws(key, torch.arange(len(text), device=text.device)).uniform((), 0).double()
        token = (sharp.cumsum(dim=-1) < point[:, None]).sum(dim=-1).clamp(max=sharp.shape[1] - 1)
        text = torch.cat([text, token[:, None]], dim=1)
    return text[:, prompt.shape[1] :]


@torch.no_grad()
def unmask(model: RoutedBlocks, prompt: Tensor, length: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """`length` tokens (N, length) after prompts (N, P) int64, in about as many steps as the window has masks.

    The whole window is drawn, as in training, and cut off after `length` tokens.
    """
    window, mask = int(model.config["shape"]["length"]), int(model.config["shape"]["vocabulary"])
    text = torch.full((len(prompt), window), mask, device=prompt.device)
    text[:, : prompt.shape[1]] = prompt
    share = float((text == mask).double().mean(dim=1).max())
    steps = math.ceil(window / len(model.blocks))
    levels = [share, *(level for level in model.noise.schedule(model.ranges, steps) if level < share)]

    def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = model.blocks[block]
        output = model.output(block, noisy, level, noisy[:, :0])
        return output, network.denoised(sharpened(output, temperature))

    draws = drawn(text, "evaluation", model.config["seed"], seed)
    last = list(chain(denoise, model.noise, model.ranges, levels, text, draws=draws))[-1]
    level = torch.full((len(text),), last.level, device=text.device)
    step = model.noise.step(last.noisy, last.denoised, level, torch.zeros_like(level), draws.fork(len(levels)))
    return step[:, prompt.shape[1] : prompt.shape[1] + length]


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the softmax at a temperature; at 0 all but the greatest are -inf."""
    if temperature:
        return logits.float() / temperature
    return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
