"""The training loss: densities over t, weights, and the one line that all objectives share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.parameterization import target
from ldm.process import Process

Density = Callable[[Tensor, Process], Tensor]  # uniform numbers (B,) in [0,1) -> times (B,)
Weight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # alpha, sigma, p, q -> weight of F's squared error


def _place(share: Tensor, process: Process) -> Tensor:
    """A share of the time axis in [0, 1] -> t; an index where the process is discrete."""
    if process.t_data < 0:
        steps = process.t_max - process.t_min + 1
        return (process.t_min + (share * steps).floor()).clamp(max=process.t_max)
    return process.t_min + share * (process.t_max - process.t_min)


class Uniform:
    """t uniform over the process (DDPM, algorithm 1)."""

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        return _place(u, process)


class LogitNormal:
    """logit(t) normal (2403.03206, section 3.1): most work in the middle of the time axis.

    Args:
        mean: above 0 for more noise; std: spread, in logits.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        normal = torch.special.ndtri(u.float().clamp(1e-6, 1 - 1e-6))
        return _place(torch.sigmoid(self.mean + self.std * normal).to(u.dtype), process)


def uniform(alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Weight 1 on F itself."""
    return torch.ones_like(alpha)


class MinSNR:
    """min(SNR, gamma) on the error of x0 (2303.09556), whatever the network says.

    From x0 = (q x_t - sigma F) / det, an error of F is sigma / det of an error of x0.
    """

    def __init__(self, gamma: float = 5.0):
        self.gamma = gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Tensor:
        weight = torch.minimum(alpha.square(), self.gamma * sigma.square())  # min(SNR, gamma) * sigma^2
        determinant = (alpha * q - sigma * p).square()
        return weight / determinant.clamp(min=torch.finfo(alpha.dtype).tiny)  # 0 / 0 where F = x0 and sigma = 0


WEIGHTS: dict[str, Weight] = {"uniform": uniform, "min_snr": MinSNR()}


def diffusion_loss(denoiser: nn.Module, z: Tensor, cond: Cond, t: Tensor, noise: Tensor,
                   weight: Weight = uniform) -> Tensor:
    """Weighted squared error of F, mean over each sample's entries: (B,C,h,w), t (B,) -> (B,)."""
    alpha, sigma, p, q = denoiser.coefficients(t, z)
    error = denoiser.raw(alpha * z + sigma * noise, t, cond).float() - target(z, noise, p, q)
    return weight(alpha, sigma, p, q).flatten() * error.square().flatten(1).mean(1)
