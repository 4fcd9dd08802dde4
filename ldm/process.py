"""Noise processes: x_t = alpha(t) * x0 + sigma(t) * eps.

A process is two functions of time. Discrete (DDPM) kinds count t = 0..T-1 as in training, fractions interpolate, and
t = -1 is the data itself. Tables are fp64 and cast after indexing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


class Process:
    """Base: ``t_data`` is the time of clean data, [t_min, t_max] the times that a network is trained on."""

    t_data: float = 0.0
    t_min: float
    t_max: float
    straight: bool = False  # True: the ODE is solved in flow coordinates (alpha may be next to 0), else in sigma/alpha

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> (B,), (B,)
        """alpha(t) and sigma(t) in t's floating type (fp32 for integers)."""
        exact = (t.cpu() if t.device.type == "mps" else t).double()  # Apple's GPUs have no fp64
        dtype = t.dtype if t.is_floating_point() else torch.float32
        alpha, sigma = self.exact(exact)
        return alpha.to(t.device, dtype), sigma.to(t.device, dtype)

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) in fp64."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), half of the log signal-to-noise ratio (DPM-Solver, 2206.00927)."""
        alpha, sigma = self.exact(t.double())
        return alpha.log() - sigma.log()

    def time(self, t: Tensor) -> Tensor:
        """What the network is told: t on DDPM's scale of 0..1000."""
        return t

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B,C,H,W) for times t (B,)."""
        alpha, sigma = (c.to(x0.dtype).view(-1, *[1] * (x0.ndim - 1)) for c in self.coefficients(t))
        return alpha * x0 + sigma * eps

    def prior_std(self) -> float:
        """Standard deviation of x at t_max for data of unit variance: what sampling starts from."""
        alpha, sigma = self.exact(torch.tensor([self.t_max], dtype=torch.float64))
        return float(torch.hypot(alpha, sigma))


def linear_betas(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """DDPM, 2006.11239, section 4: betas linear in t (CompVis calls this one sqrt_linear)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """LDM, Stable Diffusion: square roots of the betas linear in t (CompVis calls this one linear)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def sqrt_betas(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """CompVis' sqrt: the square root of the linear betas."""
    return torch.linspace(start, end, steps, dtype=torch.float64) ** 0.5


def cosine_betas(steps: int, start: float = 8e-3, end: float = 0.999) -> Tensor:
    """Improved DDPM, 2102.09672, eq. 17: alpha_bar = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) * pi / 2); s = start,
    betas <= end."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + start) / (1 + start) * math.pi / 2) ** 2
    alpha_bar = f / f[0]
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, end)


def sigmoid_betas(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """DDPM's sigmoid schedule: betas follow a sigmoid over [-6, 6]."""
    return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas, "scaled_linear": scaled_linear_betas, "sqrt": sqrt_betas, "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first is kept (2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class DDPM(Process):
    """T discrete steps from a schedule of betas: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

    Args:
        start, end: first and last beta of the schedule (its own default if None).
        zero_terminal: rescale so that the last step is pure noise; not with noise prediction.
    """

    t_data = -1.0
    t_min = 0.0

    def __init__(self, schedule: Literal["linear", "scaled_linear", "sqrt", "cosine", "sigmoid"] = "scaled_linear",
                 steps: int = 1000, start: float | None = None, end: float | None = None, zero_terminal: bool = False):
        given = {k: v for k, v in (("start", start), ("end", end)) if v is not None}
        betas = SCHEDULES[schedule](steps, **given)
        alpha_bar = torch.cumprod(1 - betas, 0)
        self.alpha_bar = zero_terminal_snr(alpha_bar) if zero_terminal else alpha_bar  # (T,) fp64
        self.t_max = float(steps - 1)
        self.straight = float(self.alpha_bar[-1]) < 1e-6  # else sigma/alpha is 1000 and more at the end
        # index 0 is the data (t = -1), index k is t = k - 1
        self._log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * self.alpha_bar.log()])

    @property
    def betas(self) -> Tensor:  # (T,) fp64
        previous = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])
        return 1 - self.alpha_bar / previous

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Between steps log(alpha) is linear: the VP diffusion whose beta is constant from one step to the next."""
        table = self._log_alpha.to(t.device)
        index = (t + 1).clamp(0, len(table) - 1)
        low = index.floor().long().clamp(max=len(table) - 2)
        part = index - low
        log_alpha = torch.where(part == 0, table[low], torch.where(
            part == 1, table[low + 1], torch.lerp(table[low], table[low + 1].clamp(min=-50.0), part)))
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).clamp(min=0).sqrt()


class VP(Process):
    """Continuous variance-preserving diffusion (2011.13456, eq. 33), t in (0, 1], beta linear from b_min to b_max."""

    t_min, t_max = 1e-3, 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time(self, t: Tensor) -> Tensor:
        return 1000.0 * t


class Cosine(Process):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1] (2202.00512)."""

    t_min, t_max = 0.0, 1.0
    straight = True

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)

    def time(self, t: Tensor) -> Tensor:
        return 1000.0 * t


class RectifiedFlow(Process):
    """Straight lines, x_t = (1 - t) x0 + t eps, t in [0, 1] (2209.03003, 2210.02747).

    Args:
        shift: resolution shift s of 2403.03206, eq. 23: t -> s t / (1 + (s - 1) t); above 1 means more noise.
    """

    t_min, t_max = 0.0, 1.0
    straight = True

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - sigma, sigma

    def time(self, t: Tensor) -> Tensor:
        """The network is told sigma, not t, so a shift does not change what it knows."""
        return 1000.0 * self.exact(t.double())[1].to(t.dtype)


class EDM(Process):
    """Variance exploding, alpha = 1, sigma = t in [sigma_min, sigma_max] (2206.00364)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        self.t_min, self.t_max = sigma_min, sigma_max

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def time(self, t: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4, brought to the range 0..1000."""
        low, high = math.log(self.t_min), math.log(self.t_max)
        return 1000.0 * (t.clamp(min=self.t_min).log() - low) / (high - low)
