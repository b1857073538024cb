"""Real pictures of odd sizes, as files and as tables."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (37, 53)
"""(width, height)."""


def picture(seed: int = 0, size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """Noise, another for every seed."""
    width, height = size
    rows = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(rows).convert(mode)


def content(seed: int = 0, size: tuple[int, int] = SIZE, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    picture(seed, size, mode).save(file, kind)
    return file.getvalue()


def class_folders(root: Path, counts: dict[str, int], first: int = 0, **options: Any) -> Path:
    """A folder for each class with so many pictures, all of them different."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(content(first, **options))
            first += 1
    return root
