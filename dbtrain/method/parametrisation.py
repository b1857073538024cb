"""What a network is given and what its output means: input scale,
denoised estimate, and the network's own time.

The noise says y + sigma * eps; a network may want it in another scale, predict something else than y, and
count time in its own way. In EDM's terms  # EDM, eq. (7): D = c_skip * z + c_out * F(c_in * z, c_noise).
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

InputScaling = Literal["unit", "signal"]


class Parametrisation(Protocol):
    """How one network is used: its input, its output and its time.

    Levels are (N,) or (N, L) sigmas, z is (N, ...) noisy, F is (N, ...) the raw output.
    """

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """c_in * z: what the network is given."""

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """D = c_skip * z + c_out * F: the denoised estimate; an output that is one already stays as it is."""

    def time(self, level: Tensor) -> Tensor:
        """c_noise: what the network is told of the level, same shape."""


def expand(level: Tensor, like: Tensor) -> Tensor:
    """Levels with as many dimensions as `like`."""
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))


def euler_step(noisy: Tensor, denoised: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
    """Euler step of dz/dl = (z - D)/l, where z = (1 - l) y + l eps or z = y + l eps: z' = a z + (1 - a) D
    with a = l'/l.

    # EDM, Algorithm 1; the paper's eq. (3) and (4) as printed have the sign wrong.
    """
    ratio = expand(next_level / level, noisy)
    return ratio * noisy + (1 - ratio) * denoised


class EDM:
    """Unit variance in and out  # Karras et al. 2022 (EDM), Table 1.

    Args:
        sigma_data: standard deviation of one element of the clean target.
        input_scaling: `unit` is c_in = 1/sqrt(sigma^2 + sigma_data^2);
            `signal` is its square, which fades pure noise out of the input.
    """

    def __init__(self, sigma_data: float = 0.5, input_scaling: InputScaling = "unit") -> None:
        self.sigma_data = sigma_data
        self.input_scaling = input_scaling

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """c_in * z with c_in = 1/sqrt(sigma^2 + sigma_data^2)  # EDM,
        Table 1 (or its square under `signal`)."""
        return _scaled(noisy, level, self.sigma_data, self.input_scaling)

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """c_skip = sigma_data^2/(sigma^2 + sigma_data^2), c_out
        = sigma sigma_data/sqrt(sigma^2 + sigma_data^2)."""
        sigma, sd = expand(level, noisy), self.sigma_data
        total = sigma**2 + sd**2
        return (sd**2 / total) * noisy + (sigma * sd * total.rsqrt()) * output

    def time(self, level: Tensor) -> Tensor:
        """c_noise = ln(sigma)/4  # EDM, Table 1."""
        return level.log() / 4


class Direct:
    """EDM's input and time, and an output that is the prediction itself:
    logits over codes, or the clean target (x0).

    Args:
        sigma_data, input_scaling: the same as in :class:`EDM`.
    """

    def __init__(self, sigma_data: float = 0.5, input_scaling: InputScaling = "unit") -> None:
        self.sigma_data = sigma_data
        self.input_scaling = input_scaling

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """c_in * z with the c_in of :class:`EDM`."""
        return _scaled(noisy, level, self.sigma_data, self.input_scaling)

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """The output itself: c_skip = 0, c_out = 1."""
        return output

    def time(self, level: Tensor) -> Tensor:
        """c_noise = ln(sigma)/4  # EDM, Table 1."""
        return level.log() / 4


class FlowV:
    """Rectified flow (Liu et al. 2023; Lipman et al. 2023):
    z = (1 - t) y + t eps, the network predicts v = eps - y.

    With sigma = t/(1 - t) our noisy y + sigma * eps is z/(1 - t) = z (1 + sigma), and D = z - t F: hence
    c_in = c_skip = 1/(1 + sigma), c_out = -sigma/(1 + sigma), c_noise = t.
    """

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """The flow's own z = (y + sigma * eps)/(1 + sigma)."""
        return noisy / (1 + expand(level, noisy))

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """D = z - t F."""
        sigma = expand(level, noisy)
        return (noisy - sigma * output) / (1 + sigma)

    def time(self, level: Tensor) -> Tensor:
        """t = sigma/(1 + sigma), from 0 (clean) to 1 (noise)."""
        return level / (1 + level)


class Velocity:
    """Parametrisation of a flow whose levels are t: the network is given z = (1 - t) y + t eps and predicts v
    = eps - y.

    The same network as :class:`FlowV`, which is told the same by sigma and y + sigma * eps.
    """

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """z itself, whose variance lies between those of y and eps."""
        return noisy

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """D = z - t F."""
        return noisy - expand(level, noisy) * output

    def time(self, level: Tensor) -> Tensor:
        """The level t itself."""
        return level


class FlowDirect:
    """Parametrisation of a flow whose levels are t; the output is the prediction itself: logits, or the clean
    target."""

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """z itself."""
        return noisy

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """The output itself."""
        return output

    def time(self, level: Tensor) -> Tensor:
        """The level t itself."""
        return level


Betas = Literal["continuous", "linear", "scaled_linear"]


class VpEps:
    """Variance preserving, the network predicts eps: DDPM (Ho et al. 2020) as a column of EDM's Table 1 (VP).

    Where the output has twice the channels of the noisy target, the second half is a learned variance
    (Nichol & Dhariwal 2021) and is not looked at.

    Args:
        beta_d, beta_min: numbers of the linear schedule beta(t) = beta_d t + beta_min  # Song et al. 2021,
            appendix C
        steps: number of time steps in training; the network's own time is an index from 0 to steps - 1.
        betas: `continuous` is that schedule; `linear` and `scaled_linear` are tables of the network's own, as
            diffusers names them, between `beta_start` and `beta_end`.
        beta_start, beta_end: first and last beta of a table.
    """

    def __init__(
        self,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        steps: int = 1000,
        betas: Betas = "continuous",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        self.beta_d, self.beta_min, self.steps = beta_d, beta_min, steps
        self.betas, self.beta_start, self.beta_end = betas, beta_start, beta_end

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """c_in = 1/sqrt(sigma^2 + 1)  # EDM, Table 1 (VP)."""
        return noisy * (expand(level, noisy) ** 2 + 1).rsqrt()

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """c_skip = 1, c_out = -sigma  # EDM, Table 1 (VP)."""
        if noisy.ndim > 1 and output.shape[1] == 2 * noisy.shape[1]:
            output = output[:, : noisy.shape[1]]
        return noisy - expand(level, noisy) * output

    def time(self, level: Tensor) -> Tensor:
        """The network's index of a sigma, which may lie between two whole numbers; computed in float64.

        Without a table c_noise = (M - 1) sigma^-1(sigma)  # EDM, Table 1 (VP), where sigma(t)^2 = exp(beta_d
        t^2/2 + beta_min t) - 1 is solved for t. In a table it is linear in log sigma between two indices, and
        levels outside of the table have its first or last index.
        """
        if self.betas != "continuous":
            return self._index(level.double()).to(level.dtype)
        exponent = torch.log1p(level.double() ** 2)
        t = ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() - self.beta_min) / self.beta_d
        return ((self.steps - 1) * t).to(level.dtype)

    def _index(self, level: Tensor) -> Tensor:
        logs = log_sigmas(self.betas, self.beta_start, self.beta_end, self.steps, level.device)
        x = level.log().clamp(logs[0], logs[-1])
        right = torch.searchsorted(logs, x).clamp(1, self.steps - 1)
        return right - 1 + (x - logs[right - 1]) / (logs[right] - logs[right - 1])


def log_sigmas(betas: Betas, start: float, end: float, steps: int, device: torch.device) -> Tensor:
    """ln sigma of each index of a table of betas, rising, (steps,) float64.

    sigma_i^2 = (1 - abar_i)/abar_i, abar_i the product of 1 - beta up to i  # Ho et al. 2020, eq. (4)

    Under `linear` the betas rise evenly, as in DDPM and DiT; under `scaled_linear` their square roots do, as
    in latent diffusion.
    """
    return torch.tensor(_log_sigmas(betas, start, end, steps), dtype=torch.float64, device=device)


@lru_cache
def _log_sigmas(betas: Betas, start: float, end: float, steps: int) -> tuple[float, ...]:
    """Numbers and no tensor: one that is made while a step is traced is no real one, and would be kept."""
    power = 2.0 if betas == "scaled_linear" else 1.0
    first, last = start ** (1 / power), end ** (1 / power)
    values, kept = [], 1.0
    for index in range(steps):
        kept *= 1 - (first + (last - first) * index / (steps - 1)) ** power
        values.append((math.log1p(-kept) - math.log(kept)) / 2)
    return tuple(values)


class Tokens:
    """Token ids in, a prediction of the clean tokens out,
    and the masked share as time  # MDLM, section 3.2."""

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """The ids themselves."""
        return noisy

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """The output itself: it is a prediction of the clean tokens already."""
        return output

    def time(self, level: Tensor) -> Tensor:
        """The masked share."""
        return level


class Unseen:
    """Parametrisation of a network that is shown nothing of its target, and told nothing of a level: the
    end-to-end baseline."""

    def scale_input(self, noisy: Tensor, level: Tensor) -> Tensor:
        """The noisy target itself, of which such a network is shown nothing."""
        return noisy

    def estimate(self, output: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """The output itself."""
        return output

    def time(self, level: Tensor) -> Tensor:
        """Zeros, same shape as the level."""
        return torch.zeros_like(level)


def default_sigma_data(code_dim: int | None) -> float:
    """Standard deviation of one element of a unit-norm code,
    1/sqrt(D); without codes EDM's, of images in [-1, 1]."""
    return 0.5 if code_dim is None else code_dim**-0.5


def _scaled(noisy: Tensor, level: Tensor, sigma_data: float, scaling: InputScaling) -> Tensor:
    total = expand(level, noisy) ** 2 + sigma_data**2
    return noisy * (total.rsqrt() if scaling == "unit" else total.reciprocal())


PARAMETRISATIONS: Mapping[str, Callable[[float, InputScaling], Parametrisation]] = {
    "edm": EDM,
    "logits": Direct,
    "x0": Direct,
    "flow_v": lambda sigma_data, input_scaling: FlowV(),
    "velocity": lambda sigma_data, input_scaling: Velocity(),
    "flow_x0": lambda sigma_data, input_scaling: FlowDirect(),
    "vp_eps": lambda sigma_data, input_scaling: VpEps(),
    "vp_eps_linear": lambda sigma_data, input_scaling: VpEps(betas="linear"),
    "vp_eps_scaled_linear": lambda sigma_data, input_scaling: VpEps(
        betas="scaled_linear", beta_start=0.00085, beta_end=0.012
    ),
    "tokens": lambda sigma_data, input_scaling: Tokens(),
}
"""(sigma_data, input_scaling) -> parametrisation, by the name that an architecture gives as its
`natural_parametrisation`, or a noise process in its place."""
