"""How samples were drawn, kept inside of their picture: which block did which step, and whose weights."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError

from dbtrain.errors import ShardError, first_line

CHUNK = "dbtrain"
"""Keyword of the text in a PNG that holds a `Drawn` as JSON."""


@dataclass(frozen=True)
class Drawn:
    """How the samples of one command were drawn."""

    weights: str
    """`MergedDirectory.weights_hash` of the model that drew them."""
    solver: str
    guidance: float
    seed: int
    level_name: str
    """What a level is called, such as ``sigma``."""
    edges: tuple[float, ...]
    """Falling: block b owns the levels from ``edges[b + 1]`` to ``edges[b]``."""
    steps: tuple[tuple[float, int], ...]
    """(level, block that was asked there), one for each step of the solver."""

    def counted(self) -> list[tuple[int, int]]:
        """(steps, evaluations of its network) of each block.

        Heun evaluates twice at every level but the first, as its last step is Euler's  # EDM, Algorithm 1
        Guidance doubles all evaluations.
        """
        steps = Counter(block for _, block in self.steps)
        first = self.steps[0][1] if self.steps else -1
        times = 2 if self.guidance != 1 else 1
        asked = {block: 2 * n - (block == first) if self.solver == "heun" else n for block, n in steps.items()}
        return [(steps[block], times * asked.get(block, 0)) for block in range(len(self.edges) - 1)]


def as_text(drawn: Drawn) -> PngInfo:
    """The text of a PNG that says how it was drawn."""
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(asdict(drawn)))
    return info


def read_drawn(data: bytes, where: str) -> Drawn | None:
    """How the samples in a picture were drawn; None if the picture does not say so, as those of before.

    Args:
        data: content of the file.
        where: name of the file, for messages.

    Raises:
        ShardError: it is no whole PNG, or what it says of itself is damaged.
    """
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as picture:
            picture.load()
            text = picture.info.get(CHUNK)
    except Exception as error:  # Pillow raises OSError, SyntaxError and others for what is damaged
        why = "Pillow knows no such format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise ShardError(f"{where} is no whole PNG ({why}): draw it anew with dbtrain sample") from None
    if text is None:
        return None
    try:
        drawn = TypeAdapter(Drawn).validate_json(text)
    except ValidationError as error:
        raise ShardError(f"{where} says wrongly how it was drawn ({first_line(error)}): draw it anew") from None
    numbers = (*drawn.edges, *(level for level, _ in drawn.steps))
    if not all(map(math.isfinite, numbers)) or not drawn.level_name.replace(" ", "").isalnum():
        raise ShardError(f"{where} says wrongly how it was drawn (its levels or their name): draw it anew")
    return drawn
