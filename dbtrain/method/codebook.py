"""Target codes: unit-norm vectors that all blocks agree on before any of them trains,
and that never change."""

from typing import Literal

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import derive_seed

CodebookSource = Literal["random", "orthogonal"]


def make_codebook(source: CodebookSource, classes: int, dim: int, seed: int) -> Tensor:
    """(classes, dim) float32 rows of norm 1, a function of its arguments.

    `random` draws directions uniformly; `orthogonal` makes the codes orthogonal, so that
    all pairs are equally far apart, which needs dim >= classes.

    Raises:
        ConfigError: orthogonal codes do not fit the dimension.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "codebook"))
    gaussian = torch.randn(dim, classes, generator=generator, dtype=torch.float64)
    if source == "orthogonal":
        if dim < classes:
            raise ConfigError(
                f"codebook.dim={dim} has no room for {classes} orthogonal codes: set codebook.dim={classes} or more, "
                "or codebook.source=random"
            )
        gaussian = torch.linalg.qr(gaussian).Q
    return (gaussian / gaussian.norm(dim=0)).T.contiguous().float()


def expected_code(output: Tensor, codebook: Tensor) -> Tensor:
    """Expected code under the distribution of logits, float32.

    Args:
        output: logits (..., classes).
        codebook: (classes, D).

    Returns:
        (..., D).
    """
    return output.float().softmax(dim=-1) @ codebook
