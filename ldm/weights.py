"""Weights of the squared error, as functions of the noise level.

Papers weigh the error of x0 or of eps. As x_t is known, an error d of x0 is an error -alpha / sigma * d of eps and
(alpha q - sigma p) / -sigma * d of what the network says, F = p x0 + q eps. So with w_x0 and w_eps weights of the two,

    w_x0 sigma^2 = w_eps alpha^2 = w_F (alpha q - sigma p)^2

and a weight is this one number, ``scaled``; divided by the determinant's square it makes the loss the same in every
parameterization. SNR = alpha^2 / sigma^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.process import Process, step_posterior


class Weight:
    """alpha, sigma, p, q -> weight of F's squared error, all of one shape."""

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """w_x0 sigma^2, which is w_eps alpha^2; finite where alpha or sigma is 0."""
        raise NotImplementedError

    def at(self, process: Process, t: Tensor) -> Weight:
        """The weight for times t (B,): itself, where alpha and sigma are all that it depends on."""
        return self

    def __call__(self, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Tensor:
        determinant = (alpha * q - sigma * p).square()
        weight = self.scaled(alpha, sigma) / determinant.clamp(min=torch.finfo(alpha.dtype).tiny)
        return weight.clamp(max=1e12)  # the determinant of F = x0 is 0 where sigma is: a finite loss there


class Unweighted(Weight):
    """1 on F itself, which is another loss in each parameterization: L_simple of DDPM, CFM of rectified flows, ..."""

    def __call__(self, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class Simple(Weight):
    """1 on the error of eps: L_simple (DDPM, 2006.11239, eq. 14)."""

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha.square()


class MinSNR(Weight):
    """min(SNR, gamma) on the error of x0 (2303.09556, section 3.4); soft: SNR gamma / (SNR + gamma), the smooth form of
    the Hourglass Diffusion Transformer (2401.11605, "soft-min-SNR")."""

    def __init__(self, gamma: float = 5.0, soft: bool = False):
        self.gamma, self.soft = gamma, soft

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        signal, noise = alpha.square(), self.gamma * sigma.square()
        return signal * noise / (signal + noise) if self.soft else torch.minimum(signal, noise)


class P2(Weight):
    """1 / (k + SNR)^gamma on the error of eps (2204.00227, eq. 8)."""

    def __init__(self, gamma: float = 1.0, k: float = 1.0):
        self.gamma, self.k = gamma, k

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        signal, noise = alpha.square(), sigma.square()
        return signal * (noise / (self.k * noise + signal)) ** self.gamma


class EDM(Weight):
    """SNR + 1 / std^2 on the error of x0; with alpha = 1 that is (sigma^2 + std^2) / (sigma std)^2 (2206.00364, table 1).

    Args:
        std: standard deviation of the data, sigma_data of the paper.
    """

    def __init__(self, std: float = 1.0):
        self.std = std

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha.square() + (sigma / self.std).square()


class Sigmoid(Weight):
    """sigmoid(bias - log SNR) on the error of eps (2303.00848; 2410.19324). The papers' factor
    -d(log SNR)/dt is not in it: it says how t is drawn, which is the density's business."""

    def __init__(self, bias: float = 0.0):
        self.odds = math.exp(bias)

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        signal, noise = alpha.square(), self.odds * sigma.square()
        return signal * noise / (signal + noise)


class VLB(Weight):
    """The variational bound's own weight: with t uniform the mean loss is the bound without its two ends, in nats a
    dimension (for a process of T steps, the sum of its L_t).

    Steps: T/2 (SNR(t-1) / SNR(t) - 1) on the error of eps (2107.00630, eq. 14; DDPM's eq. 12 with the posterior's
    variance); the first, whose term is a likelihood, takes the second's as LDM does. Continuous: -1/2 d(log SNR)/dt times
    the length of the time axis (2107.00630, eq. 17).
    """

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise ValueError("weight 'vlb' depends on the step before: take VLB().at(process, t), as diffusion_loss does")

    def at(self, process: Process, t: Tensor) -> Weight:
        return _Given(_bound(process, t.detach().cpu().double()))


class Velocity(Weight):
    """1 on the error of x' = alpha' x0 + sigma' eps (SiT, 2401.08740): parameterization "velocity" without weight."""

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise ValueError("weight 'velocity' depends on the rates of the process: take Velocity().at(process, t), as "
                         "diffusion_loss does")

    def at(self, process: Process, t: Tensor) -> Weight:
        exact = t.detach().cpu().double()
        (alpha, sigma), (alpha_rate, sigma_rate) = process.exact(exact), process.rates(exact)
        return _Given((alpha * sigma_rate - sigma * alpha_rate).square())


class _Given(Weight):
    """These numbers (B,)."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.numbers.to(alpha).view_as(alpha)


def _bound(process: Process, t: Tensor) -> Tensor:
    """The weights of VLB on the error of eps times alpha^2, (B,) in fp64."""
    if process.t_data < 0:
        if process.t_max == process.t_min:
            raise ValueError("weight 'vlb': the first step takes the weight of the second, and this process has one step; take "
                             "'simple'")
        step = t.clamp(min=process.t_min + 1)
        (alpha, _), (alpha_t, sigma_t), (alpha_s, sigma_s) = (process.exact(at) for at in (t, step, step - 1))
        # (SNR(t-1) / SNR(t) - 1) alpha(t)^2 is SNR(t-1) times the variance of the step, which has a value in pure noise too
        weight = (alpha_s / sigma_s).square() * step_posterior(alpha_t, sigma_t, alpha_s, sigma_s).beta
        weight = torch.where(t < step, weight * (alpha / alpha_t).square(), weight)
        return (process.t_max - process.t_min + 1) / 2 * weight
    length = process.t_max - process.t_min
    alpha = process.exact(t)[0]
    with torch.enable_grad():  # kept off the ends, where the slope of a flow is infinite
        t = t.clamp(process.t_min + 1e-5 * length, process.t_max - 1e-5 * length).requires_grad_()
        (slope,) = torch.autograd.grad(process.log_snr(t).sum(), t)
    return -slope * length * alpha.square()


class Uncertainty(nn.Module):
    """u(sigma) of EDM2 (2312.02696, eq. 21): log of the loss that a noise level leaves, learned beside the model. The loss
    L becomes L / exp(u) + u, so that every noise level weighs about the same. It begins at u = 0.

    Fixed Fourier features of ln(sigma / alpha) / 4 and one linear layer; used in training alone.
    """

    def __init__(self, features: int = 128):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.register_buffer("frequency", 2 * math.pi * torch.randn(features, generator=source))
        self.register_buffer("phase", 2 * math.pi * torch.rand(features, generator=source))
        self.embed = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.embed.weight)

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
        level = (sigma.clamp(min=1e-6) / alpha.clamp(min=1e-6)).log().float() / 4
        features = math.sqrt(2) * torch.cos(level[:, None] * self.frequency + self.phase)
        return self.embed(features)[:, 0]


uniform = Unweighted()
WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "uniform": uniform, "simple": Simple(), "min_snr": MinSNR(), "soft_min_snr": MinSNR(soft=True), "p2": P2(), "edm": EDM(),
    "sigmoid": Sigmoid(), "vlb": VLB(), "velocity": Velocity(),
}  # fmt: skip
