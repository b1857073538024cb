"""Text from any causal language model, token by token,
without a cache: every token reads the whole text again."""

import torch
from torch import Tensor

from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.evaluation.text.unmasking import sharpened
from dbtrain.method.draws import Draws, derive_seed


@torch.no_grad()
def uncached(model: MergedModel, prompt: Tensor, length: int, temperature: float, seed: int, first: int = 0) -> Tensor:
    """`length` more tokens (N, length) after prompts (N,
    P), by the readout and steps of the run's configuration.

    What is drawn for a text follows from the seed and its number, `first` and those after it.
    """
    section, text = model.run_plan.config.evaluation, prompt
    rows = first + torch.arange(len(prompt), device=model.device)
    for position in range(prompt.shape[1], prompt.shape[1] + length):
        # the last place is that of the token to be drawn; a causal model does not see what is put there
        batch = {"tokens": torch.cat([text, text.new_zeros(len(text), 1)], dim=1)}
        evaluations = model.evaluations(batch, model.draws(rows, seed), section.steps_per_block)
        probabilities = readouts(evaluations)[section.readout][:, -1]
        sharp = sharpened(probabilities.log(), temperature).double().softmax(dim=-1)
        key = torch.tensor(derive_seed(seed, "generate", "token", position), device=model.device)
        point = Draws(key, rows).uniform((), 0).double()
        token = (sharp.cumsum(dim=-1) < point[:, None]).sum(dim=-1).clamp(max=sharp.shape[1] - 1)
        text = torch.cat([text, token[:, None]], dim=1)
    return text[:, prompt.shape[1] :]
