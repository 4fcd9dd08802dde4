"""The training loss: the one line that all objectives share, distances, the variational term, and what a step draws.

Densities over t are in ``ldm.densities``, weights in ``ldm.weights``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.common.random import normal
from ldm.common.random import uniform as uniform_numbers
from ldm.cond import Cond
from ldm.densities import Density, LogitNormal, LossSecondMoment, Uniform, stratified
from ldm.likelihood import discretized_log_likelihood, normal_kl, normal_log_density
from ldm.parameterization import inverse, target
from ldm.process import Process, log_variance
from ldm.weights import WEIGHTS, MinSNR, Uncertainty, Weight, uniform

__all__ = ["DISTANCES", "WEIGHTS", "Huber", "LogitNormal", "MinSNR", "Objective", "PseudoHuber", "Uniform", "Variational",
           "diffusion_loss", "immiscible", "l1", "misfits", "mse", "uniform"]  # fmt: skip

Distance = Callable[[Tensor], Tensor]  # error (B,...) -> (B,)


def mse(error: Tensor) -> Tensor:
    """Mean square of each sample's entries."""
    return error.square().flatten(1).mean(1)


def l1(error: Tensor) -> Tensor:
    """Mean absolute value."""
    return error.abs().flatten(1).mean(1)


class Huber:
    """Mean of e^2 / 2 up to ``delta``, of delta (|e| - delta / 2) beyond it."""

    def __init__(self, delta: float = 1.0):
        self.delta = delta

    def __call__(self, error: Tensor) -> Tensor:
        size = error.abs()
        return torch.where(size < self.delta, size.square() / 2, self.delta * (size - self.delta / 2)).flatten(1).mean(1)


class PseudoHuber:
    """sqrt(|e|^2 + c^2) - c with the norm over a whole sample of d entries (2310.14189, section 3.3); c = 0.00054 sqrt(d)
    where it is not given."""

    def __init__(self, c: float | None = None):
        self.c = c

    def __call__(self, error: Tensor) -> Tensor:
        error = error.flatten(1)
        c = 0.00054 * math.sqrt(error.shape[1]) if self.c is None else self.c
        return (error.square().sum(1) + c**2).sqrt() - c


DISTANCES: dict[str, Distance] = {"mse": mse, "l1": l1, "huber": Huber(), "pseudo_huber": PseudoHuber()}


class Variational:
    """L_t of the variational bound, a mean over dimensions: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and the decoder's
    -log p(x0 | x_t) where t is the first step (Improved DDPM, 2102.09672, eq. 4 to 6). Discrete processes only.

    Args:
        objective: "hybrid" adds it to the simple loss; it then teaches the variance alone, its gradient through the mean
            is stopped (eq. 16: L_simple + 0.001 L_vlb). "vlb" has it in place of the simple loss.
        scale: of the T L_t that stand for the sum over steps; 0.001 with "hybrid" and 1 with "vlb", if None.
            guided-diffusion's loss types: rescaled_mse is "hybrid", mse "hybrid" with scale 1 / T, rescaled_kl "vlb",
            kl "vlb" with scale 1 / T; all of them with cdf "tanh".
        unit: bits, as published, or nats.
        fixed: the variance of p where the network does not learn it (DDPM, section 3.2).
        decoder: "discretized" for pictures on 256 levels of [-1, 1]; "gaussian" is the density itself, for latents.
        cdf: of the discretized decoder; see ``ldm.likelihood.discretized_log_likelihood``.
    """

    def __init__(self, objective: Literal["hybrid", "vlb"] = "hybrid", scale: float | None = None,
                 unit: Literal["bits", "nats"] = "bits", fixed: Literal["small", "large"] = "small",
                 decoder: Literal["discretized", "gaussian"] = "discretized", cdf: Literal["normal", "tanh"] = "normal"):
        self.alone = objective == "vlb"
        self.scale = {"hybrid": 0.001, "vlb": 1.0}[objective] if scale is None else scale
        self.unit, self.fixed, self.decoder, self.cdf = unit, fixed, decoder, cdf

    def check(self, process: Process, variance: str) -> list[str]:
        """Why it does not fit a process and the denoiser's ``variance``; nothing if it does."""
        if process.t_data >= 0:
            return [f"the variational term is a sum over steps, and {type(process).__name__} has none; take weight 'vlb', "
                    "which is its limit, or a discrete process (ldm.process.DDPM)"]
        if process.t_max == process.t_min:
            return ["the first step takes the variance of the second, and this process has one step; take 2 or more"]
        if variance == "fixed" and not self.alone:
            return ["objective 'hybrid' teaches the variance, which is fixed; take variance 'learned_range', or 'vlb'"]
        return []

    def __call__(self, process: Process, variance: str, z: Tensor, x_t: Tensor, t: Tensor, x0: Tensor,
                 var: Tensor | None = None) -> Tensor:
        """scale T L_t (B,) at steps t (B,), for data z, x_t, the network's guess x0 at the data and what it says of the
        variance (B,C,h,w)."""
        exact = t.detach().cpu().double().view(-1, *[1] * (z.ndim - 1))
        step = process.posterior(exact, exact - 1)
        floor = process.posterior(1.0, 0.0).variance  # Improved DDPM's clipped log variance: at t = 0 that of t = 1
        kind = self.fixed if variance == "fixed" else variance
        data, noisy, true_log = (c.to(x0) for c in (step.x0, step.xt, log_variance(step, floor=floor)))
        log = log_variance(step, var, kind, floor).to(x0)
        mean = data * (x0 if self.alone else x0.detach()) + noisy * x_t
        kl = normal_kl(data * z + noisy * x_t, true_log, mean, log)
        first = (t == process.t_min).view(-1, *[1] * (z.ndim - 1))
        per_entry = torch.where(first, self.surprise(z, mean, log), kl)
        steps = process.t_max - process.t_min + 1
        return self.scale * steps * per_entry.flatten(1).mean(1) / (math.log(2) if self.unit == "bits" else 1.0)

    def surprise(self, z: Tensor, mean: Tensor, log: Tensor) -> Tensor:
        """-log p(x0 | x_1) of each entry, in nats."""
        log_std = 0.5 * log.expand_as(mean)
        if self.decoder == "gaussian":
            return -normal_log_density(z, mean, log_std)
        return -discretized_log_likelihood(z, mean, log_std, cdf=self.cdf)


def diffusion_loss(denoiser: nn.Module, z: Tensor, cond: Cond, t: Tensor, noise: Tensor, weight: Callable = uniform, *,
                   distance: Distance = mse, uncertainty: Uncertainty | None = None,
                   variational: Variational | None = None, again: Tensor | None = None) -> Tensor:
    """Weighted squared error of F, mean over each sample's entries: (B,C,h,w), t (B,) -> (B,).

    Args:
        weight: (alpha, sigma, p, q) -> weight of F's squared error; see ``ldm.weights``.
        distance: of the error in units in which its weight is 1, so that a loss other than the squared error is the same
            number in every parameterization too.
        uncertainty: learned log of the loss at each noise level, by which the loss is divided.
        variational: the bound's term, added or in place of the error.
        again: with self-conditioning, where (B,) the network is asked a second time, its first answer in view
            (2208.04202, algorithm 1).
    """
    alpha, sigma, p, q = denoiser.coefficients(t, z)
    x_t = alpha * z + sigma * noise
    estimate = () if again is None or not denoiser.self_conditioning else (_estimate(denoiser, x_t, t, cond, again),)
    f, *var = denoiser.raw(x_t, t, cond, *estimate).float().split(z.shape[1], dim=1)
    exact = denoiser.exact(t)  # in fp64: a determinant may be a small difference
    loss = z.new_zeros(len(z), dtype=torch.float32)
    if variational is None or not variational.alone:
        weigh = weight.at(denoiser.process, t) if isinstance(weight, Weight) else weight
        loss = _weighted(f - target(z, noise, p, q), weigh(*exact).to(f), distance)
        if uncertainty is not None:
            level = uncertainty(*(c.to(f) for c in exact[:2]))
            loss = loss / level.exp() + level  # EDM2, 2312.02696, eq. 21
    if variational is not None:
        a, b = (c.to(f).view_as(alpha) for c in inverse(*exact)[0])
        loss = loss + variational(denoiser.process, denoiser.variance, z, x_t, t, a * x_t + b * f, *var)
    return loss


@torch.no_grad()
def _estimate(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, again: Tensor) -> Tensor:
    """What the network says of x0 without an estimate (B,C,h,w), 0 where it is not to be told."""
    x0 = denoiser(x_t, t, cond).x0
    torch.clear_autocast_cache()  # casts of weights that were made without gradients: some versions of torch reuse them
    return torch.where(again.view(-1, *[1] * (x_t.ndim - 1)), x0, torch.zeros_like(x0))


def _weighted(error: Tensor, weight: Tensor, distance: Distance) -> Tensor:
    """Distance (B,) of the error (B,C,h,w) whose square weighs as much (B,)."""
    if distance is mse:
        return weight * mse(error)
    return distance(weight.sqrt().view(-1, *[1] * (error.ndim - 1)) * error)


def misfits(process: Process, variance: str, density: Density | None = None, uncertainty: Uncertainty | None = None,
            variational: Variational | None = None) -> list[str]:
    """What of a loss does not go with the process, the denoiser's variance or the rest of it; empty if all does."""
    problems = [f"density: {problem}" for problem in (density.check(process) if isinstance(density, Density) else [])]
    problems += [f"variational: {problem}" for problem in (variational.check(process, variance) if variational else [])]
    if variational and variational.alone and uncertainty:
        problems.append("uncertainty: it scales the simple loss, which objective 'vlb' does without; remove one of them")
    if variance != "fixed" and not variational:
        problems.append(f"variational: variance {variance!r} is learned from the bound alone; set a block "
                        "(target: ldm.loss.Variational)")
    return problems


def immiscible(z: Tensor, noise: Tensor) -> Tensor:
    """The same noises (B,C,h,w), each given to the sample that it is assigned to: the pairing with the least sum of squared
    distances within this batch (2406.12303, algorithm 1). What is drawn here is the noise of x_t and of the target."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(z.flatten(1).float(), noise.flatten(1).float()).square()
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return noise[torch.as_tensor(order, device=noise.device)]


class Objective(nn.Module):
    """What one training step draws and how it is judged. It holds what of that is learned or remembered.

    Args:
        density: draws t from uniform numbers.
        weight, distance: names of WEIGHTS and DISTANCES, or objects; uncertainty, variational: see ``diffusion_loss``.
        draws: "independent" uniform numbers for the density, or "stratified" ones, which cover it evenly.
        offset_noise: standard deviation of noise that is the same in all pixels of a channel, added to the rest (N.
            Guttenberg 2023, "Diffusion with offset noise"): the mean colour is noised more.
        immiscible: pair noises with the samples of a batch by distance; depends on what else is in the local batch.
    """

    def __init__(self, density: Density | None = None, weight: str | Callable = "uniform", distance: str | Distance = "mse",
                 uncertainty: Uncertainty | None = None, variational: Variational | None = None,
                 draws: Literal["independent", "stratified"] = "independent", offset_noise: float = 0.0,
                 immiscible: bool = False):
        super().__init__()
        self.density, self.uncertainty, self.variational = density or Uniform(), uncertainty, variational
        self.weight = WEIGHTS[weight] if isinstance(weight, str) else weight
        self.distance = DISTANCES[distance] if isinstance(distance, str) else distance
        self.draw = {"independent": uniform_numbers, "stratified": stratified}[draws]
        self.offset_noise, self.immiscible = offset_noise, immiscible

    def attach(self, process: Process, variance: str = "fixed") -> Objective:
        """ValueError where it does not fit the process or the denoiser's variance; makes room for what is remembered."""
        for problem in misfits(process, variance, self.density, self.uncertainty, self.variational):
            raise ValueError(problem)
        if isinstance(self.density, LossSecondMoment):
            self.density.allocate(process)
        return self

    def times(self, positions: list[int], seed: int, process: Process, device: torch.device | str = "cpu") -> Tensor:
        """t (B,) for the samples at these positions of the run."""
        return self.density(self.draw(seed, "t", positions, device), process)

    def noise(self, z: Tensor, positions: list[int], seed: int) -> Tensor:
        """Noise (B,C,h,w) for latents z."""
        noise = normal(z.shape[1:], seed, "noise", positions, z.device)
        if self.offset_noise:
            shape = (z.shape[1], *[1] * (z.ndim - 2))
            noise = noise + self.offset_noise * normal(shape, seed, "offset", positions, z.device)
        return immiscible(z, noise) if self.immiscible else noise

    def forward(self, denoiser: nn.Module, z: Tensor, cond: Cond, t: Tensor, noise: Tensor, again: Tensor) -> Tensor:
        """Losses (B,) of latents z (B,C,h,w); again (B,): see ``diffusion_loss``."""
        return diffusion_loss(denoiser, z, cond, t, noise, self.weight, distance=self.distance,
                              uncertainty=self.uncertainty, variational=self.variational, again=again)

    def reduce(self, losses: Tensor, t: Tensor, positions: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean loss. Where the density follows the losses, they are weighted by importance and remembered, those of all
        ranks in the order of their positions (``gather``: (B,) -> (ranks, B), or (B,) on one)."""
        if not isinstance(self.density, LossSecondMoment):
            return losses.mean()
        mean = (self.density.importance(t) * losses).mean()
        with torch.no_grad():
            order = gather(positions.to(t.device)).flatten().argsort()
            self.density.observe(gather(t).flatten()[order], gather(losses.detach()).flatten()[order])
        return mean
