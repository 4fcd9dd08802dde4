"""What samplers are made of: steps of the probability-flow ODE and of its SDE between two points (alpha, sigma).

Three views, each used by the methods that were written in it:
  - ``move``: an exponential step with x0 held fixed over lambda = log(alpha / sigma) (DPM-Solver++);
  - ``Chart``: y over tau with dy = slope dtau; on a variance-exploding process EDM's and k-diffusion's x over sigma;
  - ``ancestral``: which part of sigma_s is new noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from ldm.parameterization import Denoise, Prediction
from ldm.process import Process

Callback = Callable[[int, float, Tensor, Prediction], None]
Noise = Callable[[int, tuple[int, ...]], Tensor]
Point = tuple[float, float]  # alpha, sigma; at the current time, and (alpha_s, sigma_s) at the next


def walk(times: Tensor, process: Process) -> Iterator[tuple[int, float, Point, Point, float]]:
    """(step, t, (alpha, sigma), (alpha_s, sigma_s), s) for every step, numbers in fp64. A step from t to t is left out."""
    points = list(zip(*(c.tolist() for c in process.exact(times.double())), strict=True))
    for step, ((t, here), (s, there)) in enumerate(pairwise(zip(times.tolist(), points, strict=True))):
        if t != s:
            yield step, t, here, there, s


def ask(denoise: Denoise, x: Tensor, t: float, step: int = 0, callback: Callback | None = None) -> Prediction:
    """The network's view of x at t, which the callback is shown. t is told in fp32, or in fp64 where x is."""
    guess = denoise(x, torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)))
    if callback is not None:
        callback(step, t, x, guess)
    return guess


def draw(noise: Noise | None, key: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noise is None else noise(key, tuple(x.shape)).to(x)


def log_snr_of(alpha: float, sigma: float) -> float:
    """log(alpha / sigma), infinite for pure noise and for clean data."""
    return math.log(alpha / sigma) if alpha > 0 and sigma > 0 else math.copysign(math.inf, alpha - sigma)


def when(process: Process, log_snr: float) -> tuple[float, Point]:
    """The time of the process that has this lambda, and alpha, sigma there."""
    t = process.when(torch.tensor(log_snr, dtype=torch.float64))
    alpha, sigma = process.exact(t)
    return float(t), (float(alpha), float(sigma))


def move(x: Tensor, x0: Tensor, here: Point, there: Point) -> Tensor:
    """DPM-Solver++ of first order, the exact solution where x0 is constant (2211.01095, section 4): it is DDIM.

    alpha_s (1 - e^-h) = alpha_s - alpha sigma_s / sigma, so nothing diverges where alpha or sigma_s is 0.
    """
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    return (sigma_s / sigma) * x + (alpha_s - alpha * sigma_s / sigma) * x0


def ancestral(here: Point, there: Point, eta: float) -> tuple[float, float]:
    """(down, up): a step to (alpha_s, down), then ``up`` times new noise. eta = 1: ``up`` is the deviation of
    q(x_s | x_t, x0) (DDIM, 2010.02502, eq. 16); k-diffusion's ancestral step on any alpha, sigma."""
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    ratio = (alpha * sigma_s) / (alpha_s * sigma)
    up = min(sigma_s, eta * sigma_s * max(0.0, 1.0 - ratio**2) ** 0.5)
    return max(0.0, sigma_s**2 - up**2) ** 0.5, up


class Chart:
    """Coordinates that straighten the ODE: y = x / alpha over tau = sigma / alpha, dy = eps dtau; on processes that end in
    pure noise or next to it (``straight``) y = x / (alpha + sigma) over tau = sigma / (alpha + sigma), dy = (eps - x0) dtau.
    """

    def __init__(self, process: Process):
        self.process = process

    def __call__(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(x / y, tau)."""
        unit = alpha + sigma if self.process.straight else alpha
        return unit, sigma / unit

    def slope(self, guess: Prediction) -> Tensor:
        return guess.eps - guess.x0 if self.process.straight else guess.eps

    def jump(self, x: Tensor, slope: Tensor, here: Point, there: Point) -> Tensor:
        """Along a straight line."""
        (unit, tau), (unit_s, tau_s) = self(*here), self(*there)
        return unit_s * (x / unit + (tau_s - tau) * slope)

    def between(self, here: Point, there: Point) -> tuple[float, Point]:
        """Time and place of the geometric mean of two tau."""
        tau = math.sqrt(self(*here)[1] * self(*there)[1])
        return when(self.process, math.log((1 - tau) / tau) if self.process.straight else -math.log(tau))


def churn(x: Tensor, t: float, here: Point, process: Process, gamma: float, s_tmin: float, s_tmax: float,
           s_noise: float, noise: Callable[[], Tensor]) -> tuple[Tensor, float, Point]:
    """Back to where sigma / alpha is 1 + gamma times larger, with new noise (EDM, 2206.00364, algorithm 2, lines 4 to 6);
    not beyond the end of the process."""
    (alpha, sigma), gamma = here, min(gamma, math.sqrt(2) - 1)
    if gamma == 0 or alpha == 0 or not s_tmin <= sigma / alpha <= s_tmax:
        return x, t, here
    t_hat, (alpha_hat, sigma_hat) = when(process, math.log(alpha / sigma) - math.log1p(gamma))
    grown = math.sqrt(max(0.0, (sigma_hat / alpha_hat) ** 2 - (sigma / alpha) ** 2))
    return alpha_hat * (x / alpha + s_noise * grown * noise()), t_hat, (alpha_hat, sigma_hat)


def sde(x: Tensor, here: Point, there: Point, eta: float) -> tuple[Tensor, float, float]:
    """The step of the SDE whose noise is eta times that of the reverse process (SDE-DPM-Solver++, 2211.01095, section 5):
    x_s = (sigma_s / sigma) e^(-eta h) x + alpha_s (1 - e^-(1 + eta) h) x0 + up noise -> the three factors, the first with
    x. In powers of e^-h = alpha sigma_s / (alpha_s sigma), which is 0 next to an infinite lambda."""
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    shrink = (alpha * sigma_s) / (alpha_s * sigma)
    return (sigma_s / sigma * shrink**eta * x, alpha_s * (1 - shrink ** (1 + eta)),
            sigma_s * math.sqrt(max(0.0, 1 - shrink ** (2 * eta))))  # fmt: skip


def lagrange(nodes: list[float]) -> list[Polynomial]:
    """Each is 1 at its own node and 0 at the others."""
    return [math.prod((Polynomial([-other, 1.0]) / (node - other) for j, other in enumerate(nodes) if j != i),
                      start=Polynomial([1.0])) for i, node in enumerate(nodes)]  # fmt: skip


def wide(c: Tensor, like: Tensor) -> Tensor:  # (B,) -> (B,1,1,1)
    return c.to(like).view(-1, *[1] * (like.ndim - 1))
