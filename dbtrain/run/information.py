"""How much a noisy code decides of what a context leaves open, by noise level, from p(y|x) alone.

The noise is Gaussian, so the posterior p(y|x,z) of a code z = c_y + sigma n is exact given p(y|x), and so is
its variance. Information is half the integral of that variance over the signal-to-noise ratio 1/sigma^2  #
Guo, Shamai, Verdu 2005, Theorem 1

Where the code says nearly nothing, the variance is nearly that of p(y|x), which does not depend on the draw
of the noise. The difference of two entropies is the same number, but there the error of the draws hides it.
"""

import torch
from torch import Tensor

from dbtrain.method.draws import Draws

ELEMENTS = 2**19
"""Elements (rows, draws, codes) of a level: few contexts get many draws each, many contexts or a large
vocabulary one."""
AT_ONCE = 2**22
"""Elements (rows, codes) that are held at once."""
MOST_DRAWS = 64


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy (n,) of (n, V), in nats."""
    return torch.special.entr(probabilities).sum(dim=-1)


def gained(probabilities: Tensor, codebook: Tensor, levels: Tensor, seed: int) -> Tensor:
    """Information I(y; z|x) (n, L) in nats that a code at each level has about the target of each context.

    Args:
        probabilities: p(y|x) (n, V) float64.
        codebook: (V, D) float64.
        levels: (L,) rising sigmas; the integral over the ratio
            ends at the last and takes no more beyond the first.
        seed: seed of the targets and of the noise, which are the same at all levels, so that the curve is
            smooth.
    """
    left = _variance_left(probabilities, codebook, levels, seed)
    ratio = levels**-2
    # I is half the integral of the variance  # Guo, Shamai, Verdu 2005, eq. (1)
    beyond = ratio[-1] * (variance(probabilities, codebook) + left[:, -1]) / 4
    steps = (left[:, 1:] + left[:, :-1]) / 4 * (ratio[:-1] - ratio[1:])
    return beyond[:, None] + torch.cat([steps.flip(1).cumsum(1).flip(1), torch.zeros_like(beyond)[:, None]], dim=1)


def variance(probabilities: Tensor, codebook: Tensor) -> Tensor:
    """Expected squared distance (n,) of the code from its mean under (n, V)."""
    square = probabilities @ (codebook**2).sum(dim=-1)
    return (square - ((probabilities @ codebook) ** 2).sum(dim=-1)).clamp_min(0)


def _variance_left(probabilities: Tensor, codebook: Tensor, levels: Tensor, seed: int) -> Tensor:
    """Mean posterior variance (n, L) of the code given its noisy self."""
    count, width = probabilities.shape
    size = max(1, AT_ONCE // width)
    repeats = min(max(ELEMENTS // (count * width), 1), MOST_DRAWS)
    parts = []
    for start in range(0, count, size):
        rows = probabilities[start : start + size]
        draws = Draws(torch.tensor(seed), torch.arange(start, start + len(rows)))
        left = torch.zeros(len(rows), len(levels), dtype=torch.float64)
        for number in range(repeats):
            left += _one_draw(rows, codebook, levels, draws, number, repeats) / repeats
        parts.append(left)
    return torch.cat(parts)


def _one_draw(rows: Tensor, codebook: Tensor, levels: Tensor, draws: Draws, number: int, repeats: int) -> Tensor:
    # the targets of a context's draws are spread evenly over its probabilities,
    # and every second noise is the one before it with the opposite sign
    picks = torch.frac(draws.uniform((), 0).double() + number / repeats)[:, None]
    target = (rows.cumsum(dim=-1) < picks).sum(dim=-1).clamp(max=rows.shape[1] - 1)
    noise = draws.fork(number // 2).normal((codebook.shape[1],), 1).double() * (-1) ** number
    sync = codebook[target] @ codebook.T - 0.5 * (codebook**2).sum(dim=-1)
    disturbance, prior = noise @ codebook.T, rows.clamp_min(1e-300).log()
    posteriors = ((prior + sync / s**2 + disturbance / s).softmax(dim=-1) for s in levels.tolist())
    return torch.stack([variance(posterior, codebook) for posterior in posteriors], dim=1)


def decided(gains: Tensor) -> Tensor:
    """Share (L,) of what contexts leave open that a code at each rising level decides,
    from their gains (n, L).

    NaN where nothing is left open.
    """
    mean = gains.mean(dim=0)
    return mean / mean[0]


def levels_at(levels: Tensor, shares: Tensor, wanted: Tensor) -> Tensor:
    """The levels (m,) at which a code decides the `wanted` shares (m,),
    by interpolating log level on the log odds.

    Args:
        levels: (L,) rising.
        shares: (L,) falling.
        wanted: in (0, 1); beyond the curve's ends its outermost pieces are continued.

    Returns:
        (m,) float64, NaN where the shares are.
    """
    least = 1e-15
    odds = shares.clamp(least, 1 - least).logit().flip(0)
    logs, at = levels.log().flip(0), wanted.double().logit()
    right = torch.searchsorted(odds.contiguous(), at).clamp(1, len(odds) - 1)
    part = (at - odds[right - 1]) / (odds[right] - odds[right - 1])
    return (logs[right - 1] + part * (logs[right] - logs[right - 1])).exp()
