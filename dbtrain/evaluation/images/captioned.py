"""A grid of pictures in which each row shows one caption, written to its left."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2
"""Pixels around each picture, and around a caption."""


def captioned_grid(pictures: Tensor, captions: Sequence[str]) -> np.ndarray:
    """Pictures (N, C, H, W) in [-1, 1], of which picture i shows caption i modulo their number.

    Returns:
        (height, width, 3) uint8: a row for each caption, with its pictures side by side.
    """
    _, channels, height, width = pictures.shape
    font = ImageFont.load_default()
    boxes = [font.getbbox(caption) for caption in captions]
    left, tall = int(max(box[2] for box in boxes)) + 2 * GAP, int(max(box[3] for box in boxes)) + 2 * GAP
    row, columns = max(height + GAP, tall), -(-len(pictures) // len(captions))
    sheet = Image.new("RGB", (left + columns * (width + GAP), row * len(captions)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, caption in enumerate(captions):
        draw.text((GAP, number * row + (row - tall) // 2), caption, fill="black", font=font)
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    for number, picture in enumerate(pixels.expand(-1, -1, -1, 3) if channels == 1 else pixels):
        at = left + number // len(captions) * (width + GAP), number % len(captions) * row
        sheet.paste(Image.fromarray(picture.contiguous().numpy()), at)
    return np.asarray(sheet)
