"""Random changes to training images, by the draws of a step, so that a resumed block sees the same ones."""

import torch
from torch import Tensor
from torch.nn import functional

from dbtrain.method.draws import Draws

SHIFT_STREAM, FLIP_STREAM = 0, 1
"""Of draws with a key of their own."""
BLACK = -1.0


def shift(image: Tensor, pixels: int, draws: Draws) -> Tensor:
    """Move each of the images (N, C, H, W) by up to `pixels` down or up and right or left; what comes in is black."""
    height, width = image.shape[2:]
    padded = functional.pad(image, [pixels] * 4, value=BLACK)
    start = (draws.uniform((2,), SHIFT_STREAM) * (2 * pixels + 1)).long()
    rows = start[:, 0, None] + torch.arange(height, device=image.device)
    columns = start[:, 1, None] + torch.arange(width, device=image.device)
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def flip(image: Tensor, draws: Draws) -> Tensor:
    """Mirror about half of the images (N, C, H, W), left to right."""
    mirrored = draws.uniform((), FLIP_STREAM) < 0.5
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)
