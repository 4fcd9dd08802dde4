"""What a network says: F = p * x0 + q * eps. A parameterization is the pair (p, q) as a function of (alpha, sigma).

    [x_t]   [alpha  sigma] [x0 ]
    [ F ] = [  p      q  ] [eps]        inverted: x0 and eps from any network; read forwards: its training target
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


PARAMETERIZATIONS: dict[str, Callable[[Tensor, Tensor], Pair]] = {"noise": noise, "data": data, "v": v, "flow": flow}


def target(x0: Tensor, eps: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """F for known data and noise."""
    return p * x0 + q * eps


def solve(x_t: Tensor, f: Tensor, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Prediction:
    """x0 and eps from x_t and F: the 2 x 2 system by Cramer's rule. All broadcast against x_t."""
    determinant = alpha * q - sigma * p
    return Prediction((q * x_t - sigma * f) / determinant, (alpha * f - p * x_t) / determinant)
