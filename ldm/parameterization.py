"""What a network says: F = p * x0 + q * eps. A parameterization is the pair (p, q) as a function of (alpha, sigma).

    [x_t]   [alpha  sigma] [x0 ]
    [ F ] = [  p      q  ] [eps]        inverted: x0 and eps from any network; read forwards: its training target

PARAMETERIZATIONS are functions of the time at hand, STEPWISE of that time and of the one before it on a discrete process,
MOVING of the rates at which alpha and sigma change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prediction:
    """What is believed of a noisy x_t: data x0 and noise eps, (B,C,h,w); ``var`` where the network learned it."""

    x0: Tensor
    eps: Tensor
    var: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Prediction]  # (x_t (B,C,h,w), t (B,)) -> Prediction


def noise(alpha: Tensor, sigma: Tensor) -> Pair:
    """F = eps (DDPM, 2006.11239)."""
    return torch.zeros_like(alpha), torch.ones_like(sigma)


def data(alpha: Tensor, sigma: Tensor) -> Pair:
    """F = x0."""
    return torch.ones_like(alpha), torch.zeros_like(sigma)


def v(alpha: Tensor, sigma: Tensor) -> Pair:
    """F = alpha eps - sigma x0 (2202.00512)."""
    return -sigma, alpha


def flow(alpha: Tensor, sigma: Tensor) -> Pair:
    """F = eps - x0, the velocity of a rectified flow (2209.03003)."""
    return -torch.ones_like(alpha), torch.ones_like(sigma)


class Preconditioned:
    """F of unit variance for data of standard deviation sigma_data (2206.00364, table 1), for any alpha and sigma.

    With y = x_t / alpha and s = sigma / alpha the paper's D = c_skip(s) y + c_out(s) F is x0, where
    c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s sigma_data / sqrt(s^2 + sigma_data^2). Solved for F, with r the
    standard deviation of x_t:  F = (sigma / sigma_data * x0 - alpha sigma_data * eps) / r.

    Args:
        sigma_data: 1 for latents, which come at unit scale; the paper has 0.5 for pictures in [-1, 1].
        negative: -F is what the network says; with sigma_data 1 this is v of the variance-preserving x_t / r (CosXL).
    """

    def __init__(self, sigma_data: float = 1.0, negative: bool = False):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data: {sigma_data}; a standard deviation is above 0")
        self.sigma_data, self.sign = sigma_data, -1 if negative else 1

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Pair:
        c_in = self.sign * self.c_in(alpha, sigma)
        return c_in * sigma / self.sigma_data, -c_in * alpha * self.sigma_data

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 / r: what x_t is multiplied by before the network sees it."""
        return 1 / torch.hypot(alpha * self.sigma_data, sigma)


def previous(alpha: Tensor, sigma: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Pair:
    """F = mean of q(x_s | x_t, x0), s the step before t (DDPM, 2006.11239, eq. 7 with x_t = alpha x0 + sigma eps)."""
    return alpha_s, alpha * sigma_s**2 / (alpha_s * sigma)


def velocity(alpha_rate: Tensor, sigma_rate: Tensor) -> Pair:
    """F = alpha' x0 + sigma' eps: how x_t moves as the share of the way to pure noise grows (2209.15571, 2401.08740)."""
    return alpha_rate, sigma_rate


Parameterization = Callable[[Tensor, Tensor], Pair]
PARAMETERIZATIONS: dict[str, Parameterization] = {"noise": noise, "data": data, "v": v, "flow": flow, "edm": Preconditioned()}
MOVING: dict[str, Parameterization] = {"velocity": velocity}
STEPWISE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Pair]] = {"previous": previous}


def target(x0: Tensor, eps: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """F for known data and noise."""
    return p * x0 + q * eps


def inverse(alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> tuple[Pair, Pair]:
    """-> (a, b), (c, d) with x0 = a x_t + b F and eps = c x_t + d F, by Cramer's rule. In fp64: the determinant of
    ``previous`` is the small difference of two numbers."""
    determinant = alpha * q - sigma * p
    return (q / determinant, -sigma / determinant), (-p / determinant, alpha / determinant)


def solve(x_t: Tensor, f: Tensor, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Prediction:
    """x0 and eps from x_t and F. All broadcast against x_t."""
    (a, b), (c, d) = inverse(alpha, sigma, p, q)
    return Prediction(a * x_t + b * f, c * x_t + d * f)
