"""Denoiser: a network, a process and a parameterization; it turns the network's output into x0 and eps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.common.build import Block, build
from ldm.cond import Cond
from ldm.parameterization import PARAMETERIZATIONS, Denoise, Prediction, solve
from ldm.process import Process


class Denoiser(nn.Module):
    """network + process + parameterization.

    Raises:
        ValueError: an unknown parameterization, or noise prediction on a process that ends in pure noise, where the
            network's answer says nothing of x0.
    """

    def __init__(self, network: nn.Module, process: Process, parameterization: str = "flow"):
        super().__init__()
        self.network, self.process, self.parameterization = network, process, parameterization
        for problem in impossible(process, parameterization):
            raise ValueError(problem)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, p, q at t (B,), shaped to broadcast against ``like`` (B,C,h,w)."""
        alpha, sigma = self.process.coefficients(t)
        p, q = PARAMETERIZATIONS[self.parameterization](alpha, sigma)
        return tuple(c.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1)) for c in (alpha, sigma, p, q))

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """F, the network's output as it is; spatial conditions are appended after x_t's channels."""
        x = x_t if cond.spatial is None else torch.cat([x_t, cond.spatial.to(x_t.dtype)], dim=1)
        return self.network(x, self.process.time(t), cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x_t (B,C,h,w), t (B,) -> Prediction in fp32."""
        alpha, sigma, p, q = self.coefficients(t, x_t)
        return solve(x_t.float(), self.raw(x_t, t, cond).float(), alpha, sigma, p, q)


def impossible(process: Process, parameterization: str) -> list[str]:
    """Why this process and this parameterization do not go together; empty if they do."""
    if parameterization not in PARAMETERIZATIONS:
        return [f"no parameterization {parameterization!r}; there are {', '.join(PARAMETERIZATIONS)}"]
    alpha = process.exact(torch.tensor([process.t_max], dtype=torch.float64))[0]
    if parameterization == "noise" and float(alpha) < 1e-6:
        return [f"parameterization 'noise' cannot name x0 at t = {process.t_max:g}, where {type(process).__name__} is "
                "pure noise (alpha = 0); take 'v' or 'flow'"]
    return []


def bind(denoiser: Denoiser, cond: Cond) -> Denoise:
    """The denoise function of a denoiser under a condition."""
    return lambda x, t: denoiser(x, t, cond)


def build_denoiser(network: Block, process: Process, parameterization: str, autoencoder: Autoencoder,
                   conditioner: nn.Module | None, allowed: Iterable[str] | None = None) -> Denoiser:
    """The Denoiser of a diffusion model: the one place where a network's sizes are derived.

    Convolutions are laid out channels-last: token sequences are then views of feature maps.
    """
    network = build(network, allowed=allowed, in_channels=autoencoder.channels, out_channels=autoencoder.channels,
                    context_dim=getattr(conditioner, "width", None), vector_dim=None)
    with torch.device("cpu"):  # it asks the process for numbers, which the meta device has none of
        return Denoiser(network.to(memory_format=torch.channels_last), process, parameterization)
