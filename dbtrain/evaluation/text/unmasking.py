"""Text from a masked diffusion language model: ancestral sampling, from masks alone to none."""

import math

import torch
from torch import Tensor

from dbtrain.evaluation.merged_model import MergedModel, chain_levels
from dbtrain.method.sampler import chain


@torch.no_grad()
def unmask(
    model: MergedModel, start: Tensor, steps_per_block: int, temperature: float, seed: int, first: int = 0
) -> Tensor:
    """Token ids (N, L) in place of the masks of `start` (N,
    L); what is seen there stays. A function of its arguments.

    Each block takes its turn at the masked shares that it owns  # MDLM, eq. (6). The first share is the
    greatest of `start`: p(token | what is seen) does not depend on the level, and blocks of higher shares
    were never trained with so few masks. Tokens that one step reveals do not see each other; with as many
    steps as tokens this matters little.

    Args:
        model: the merged model.
        start: token ids, the mask's where a token is to be drawn.
        steps_per_block: steps in each block's slice; as many
            fewer in all as there are fewer masks than places.
        temperature: temperature of the softmax; at 0 a revealed token is the likeliest.
        seed: seed of the draws.
        first: number of the first text, from which its draws follow.
    """
    run_plan, noise = model.run_plan, model.run_plan.noise()

    def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        network = model.blocks[block]
        output = network.predict(run_plan.runs(block), noisy, level, noisy[:, :0])
        return output, network.denoised(sharpened(output, temperature))

    share = float((start == int(run_plan.shape["vocabulary"])).double().mean(dim=1).max())
    if not share:
        return start
    levels = [share, *(level for level in chain_levels(run_plan, steps_per_block) if level < share)]
    draws = model.draws(first + torch.arange(len(start)), seed)
    for last in chain(denoise, noise, run_plan.ranges, levels, start, draws=draws):
        noisy, denoised, at = last.noisy, last.denoised, last.level
    level = torch.full((len(start),), at, device=start.device)
    return noise.step(noisy, denoised, level, torch.zeros_like(level), draws.fork(len(levels)))


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the softmax at a temperature; at 0 all but the greatest are -inf."""
    if temperature:
        return logits.float() / temperature
    return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(dim=-1, keepdim=True), 0.0)


def unmasking(model: MergedModel, prompt: Tensor, length: int, temperature: float, seed: int, first: int = 0) -> Tensor:
    """`length` tokens (N, length) after prompts (N, P), in
    about as many steps as the window has masks after them."""
    run_plan = model.run_plan
    window = int(run_plan.shape["length"])
    start = torch.full((len(prompt), window), int(run_plan.shape["vocabulary"]), device=model.device)
    start[:, : prompt.shape[1]] = prompt
    # the whole window is drawn, as in training, because the tokens that are cut off influence those that stay
    tokens = unmask(model, start, math.ceil(window / run_plan.split.blocks), temperature, seed, first)
    return tokens[:, prompt.shape[1] : prompt.shape[1] + length]
