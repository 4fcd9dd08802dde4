"""Denoiser: a network, a process and a parameterization; it turns the network's output into x0 and eps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.common.build import Block, build, is_block
from ldm.common.weights import is_meta
from ldm.cond import Cond
from ldm.parameterization import MOVING, PARAMETERIZATIONS, STEPWISE, Denoise, Parameterization, Prediction, inverse
from ldm.process import Process, in_double

LearnedVariance = Literal["fixed", "learned", "learned_range"]


class Denoiser(nn.Module):
    """network + process + parameterization.

    Args:
        parameterization: a name of ``ldm.parameterization``, or a function of (alpha, sigma).
        variance: fixed, or what the second half of the network's channels says of it (see ``ldm.process.log_variance``).
        self_conditioning: the network's input has an estimate of x0 beside x_t (2208.04202, section 3), 0 where there is none.

    Raises:
        ValueError: an unknown parameterization, or one that does not go with the process (see ``impossible``).
    """

    def __init__(self, network: nn.Module, process: Process, parameterization: str | Parameterization = "flow",
                 variance: LearnedVariance = "fixed", self_conditioning: bool = False):
        super().__init__()
        self.self_conditioning = self_conditioning
        self.network, self.process, self.parameterization, self.variance = network, process, parameterization, variance
        for problem in impossible(process, parameterization, variance):
            raise ValueError(problem)

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, p, q at t (B,), in fp64."""
        return linear_map(self.process, self.parameterization, in_double(t))

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, p, q at t (B,), in fp32 and shaped to broadcast against ``like`` (B,C,h,w)."""
        return tuple(_beside(c, like) for c in self.exact(t))

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond, estimate: Tensor | None = None) -> Tensor:
        """The network's output as it is: F, then the channels of a learned variance. Its input is x_t, scaled where the
        parameterization says how; spatial conditions are appended after x_t's channels, then the estimate of x0. All of it in
        the type of the network's weights, but where autocast sees to that."""
        c_in = getattr(_pair(self.parameterization), "c_in", None)
        x = x_t if c_in is None else x_t * _beside(c_in(*self.process.exact(in_double(t))), x_t).to(x_t.dtype)
        if cond.spatial is not None:
            if cond.spatial.shape[2:] not in ((1, 1), x.shape[2:]):
                raise ValueError(f"spatial condition {tuple(cond.spatial.shape)} beside x_t {tuple(x_t.shape)}: height and "
                                 "width have to be the same, or 1")
            x = torch.cat([x, cond.spatial.expand(-1, -1, *x.shape[2:]).to(x)], dim=1)
        if self.self_conditioning:
            x = torch.cat([x, torch.zeros_like(x_t) if estimate is None else estimate.to(x.dtype)], dim=1)
        weight = next(self.network.parameters(), None)
        if weight is not None and not torch.is_autocast_enabled(x.device.type):
            x, cond = x.to(weight.dtype), cond.to(dtype=weight.dtype)
        return self.network(x, self.process.time(t), cond)

    def split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """What ``raw`` gave -> F (B,C,h,w), and what it says of the variance (B,C,h,w) if that is learned."""
        return (out, None) if self.variance == "fixed" else out.chunk(2, dim=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, estimate: Tensor | None = None) -> Prediction:
        """x_t (B,C,h,w), t (B,) -> Prediction in fp32."""
        f, var = self.split(self.raw(x_t, t, cond, estimate).float())
        if f.shape != x_t.shape:
            raise ValueError(f"the network gives {tuple(f.shape)} where x_t is {tuple(x_t.shape)}; with variance "
                             f"{self.variance!r} it has to have {x_t.shape[1] * (1 if var is None else 2)} output channels")
        (a, b), (c, d) = ([_beside(k, x_t) for k in row] for row in inverse(*self.exact(t)))
        x_t = x_t.float()
        return Prediction(a * x_t + b * f, c * x_t + d * f, var)


def _beside(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) in fp64 -> (B,1,1,1) in fp32 where ``like`` (B,C,h,w) is."""
    return coefficient.float().to(like.device).view(-1, *[1] * (like.ndim - 1))


def _pair(parameterization: str | Parameterization) -> Parameterization:
    return PARAMETERIZATIONS[parameterization] if parameterization in PARAMETERIZATIONS else parameterization


def linear_map(process: Process, parameterization: str | Parameterization, t: Tensor) -> tuple[Tensor, ...]:
    """alpha, sigma, p, q at t (B,), in fp64: [x_t; F] = [[alpha, sigma], [p, q]] [x0; eps]."""
    here = process.exact(t)
    if parameterization in STEPWISE:
        return (*here, *STEPWISE[parameterization](*here, *process.exact(t - 1)))
    if parameterization in MOVING:
        return (*here, *MOVING[parameterization](*process.rates(t)))
    return (*here, *_pair(parameterization)(*here))


def impossible(process: Process, parameterization: str | Parameterization, variance: str = "fixed") -> list[str]:
    """Why these do not go together; empty if they do."""
    names = (*PARAMETERIZATIONS, *STEPWISE, *MOVING)
    if parameterization not in names and not callable(parameterization):
        return [f"no parameterization {parameterization!r}; there are {', '.join(names)}"]
    if variance not in get_args(LearnedVariance):
        return [f"no variance {variance!r}; there are {', '.join(get_args(LearnedVariance))}"]
    kind = type(process).__name__
    if parameterization in STEPWISE and process.t_data >= 0:
        return [f"parameterization {parameterization!r} is the mean of the step before, and {kind} has no steps; take a "
                "discrete process (DDPM), or 'data'"]
    alpha, sigma, p, q = linear_map(process, parameterization, torch.tensor([process.t_max], dtype=torch.float64))
    if abs(float(alpha * q - sigma * p)) < 1e-6:  # the determinant: an error of F is sigma / determinant of one of x0
        return [f"parameterization {parameterization!r} cannot name x0 at t = {process.t_max:g}, where {kind} is "
                "pure noise (alpha = 0); take 'v' or 'flow'"]
    return []


class Remembering:
    """A denoiser for one walk of a sampler: with self-conditioning, what it said of x0 in one step is its estimate in the
    next (2208.04202, algorithm 2). The first has none, nor one whose batch is of another shape."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.x0 = denoiser, None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        known = self.denoiser.self_conditioning and self.x0 is not None and self.x0.shape == x_t.shape
        guess = self.denoiser(x_t, t, cond, self.x0) if known else self.denoiser(x_t, t, cond)
        self.x0 = guess.x0
        return guess


def bind(denoiser: Denoiser, cond: Cond) -> Denoise:
    """The denoise function of a denoiser under a condition."""
    return lambda x, t: denoiser(x, t, cond)


def build_denoiser(network: Block, process: Process, parameterization: str | Block | Parameterization,
                   autoencoder: Autoencoder, conditioner: nn.Module | None, allowed: Iterable[str] | None = None,
                   variance: LearnedVariance = "fixed", self_conditioning: bool = False) -> Denoiser:
    """The Denoiser of a diffusion model: the one place where a network's sizes are derived.

    Convolutions are laid out channels-last: token sequences are then views of feature maps.
    """
    taken, given = (autoencoder.channels * (2 if twice else 1) for twice in (self_conditioning, variance != "fixed"))
    taken += 0 if conditioner is None else conditioner.beside(autoencoder.channels)
    network = build(network, allowed=allowed, in_channels=taken, out_channels=given,
                    context_dim=getattr(conditioner, "width", None), vector_dim=getattr(conditioner, "vector_width", None))
    if is_block(parameterization):
        parameterization = build(parameterization, allowed=allowed)
    with torch.device("cpu"):  # it asks the process for numbers, which the meta device has none of
        network = network if is_meta(network) else network.to(memory_format=torch.channels_last)
        return Denoiser(network, process, parameterization, variance, self_conditioning)
