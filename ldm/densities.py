"""Densities over t: what a training step's noise levels are drawn from.

A density maps uniform numbers to times, so that all randomness follows from a sample's position in the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.common.random import key_to_seed
from ldm.process import Process

BITS = 24  # of a float32's mantissa


class Density:
    """Uniform numbers (B,) in [0, 1) -> times (B,) of a process."""

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        raise NotImplementedError

    def check(self, process: Process) -> list[str]:
        """Why this density does not fit the process; nothing if it does."""
        return []


def stratified(seed: int, stream: str, positions: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(B,) uniform numbers in [0, 1) that cover it evenly: of 2^k positions from a multiple of 2^k on, whatever k, one
    falls into each of 2^k equal strata; other global batches come close. The place of VDM's low-discrepancy sampler
    (2107.00630, appendix I.1), but a function of the position alone, not of the batch that it is in.

    The van der Corput sequence (the position's bits, mirrored) with a digital shift that follows from the seed.
    """
    shift = key_to_seed(seed, stream) % 2**BITS
    mirrored = [int(f"{position % 2**BITS:0{BITS}b}"[::-1], 2) ^ shift for position in positions]
    return torch.tensor(mirrored, dtype=torch.float32).div(2**BITS).to(device)


def _place(share: Tensor, process: Process) -> Tensor:
    """A share of the time axis in [0, 1] -> t; an index where the process is discrete."""
    if process.t_data < 0:
        steps = process.t_max - process.t_min + 1
        return (process.t_min + (share * steps).floor()).clamp(max=process.t_max)
    return process.t_min + share * (process.t_max - process.t_min)


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones, in fp32."""
    return torch.special.ndtri(u.float().clamp(1e-6, 1 - 1e-6))


class Uniform(Density):
    """t uniform over the process (DDPM, algorithm 1)."""

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        return _place(u, process)


class LogitNormal(Density):
    """logit(t) normal (2403.03206, section 3.1): most work in the middle of the time axis.

    Args:
        mean: above 0 for more noise; std: spread, in logits.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        return _place(torch.sigmoid(self.mean + self.std * _normal(u)).to(u.dtype), process)


class Mode(Density):
    """Heavy in the middle, yet positive at both ends (2403.03206, eq. 20): t = 1 - u - s (cos^2(pi u / 2) - 1 + u).

    Args:
        scale: s in [-1, 2 / (pi - 2)]; above 0 favours the middle, below the ends, 0 is uniform.
    """

    def __init__(self, scale: float = 1.29):
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"density.scale: {scale}; the mode density takes -1 to {2 / (math.pi - 2):.4f}")
        self.scale = scale

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        share = 1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
        return _place(share.clamp(0, 1), process)


class LogNormal(Density):
    """log(sigma / alpha) normal (EDM, 2206.00364, table 1), on any process; its ends take what lies beyond them.

    Args:
        mean, std: P_mean and P_std, of the noise-to-signal ratio's natural logarithm.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        t = time_of(process, -(self.mean + self.std * _normal(u).cpu().double()))
        t = t.round() if process.t_data < 0 else t
        return t.clamp(process.t_min, process.t_max).to(u.device, u.dtype)


def time_of(process: Process, log_snr: Tensor) -> Tensor:
    """The time in [t_min, t_max] at which log(alpha / sigma) is closest to ``log_snr`` (B,), fp64, by bisection."""
    low, high = (torch.full_like(log_snr, end) for end in (process.t_min, process.t_max))
    for _ in range(64):  # the ratio falls with t
        middle = (low + high) / 2
        early = process.log_snr(middle) > log_snr
        low, high = torch.where(early, middle, low), torch.where(early, high, middle)
    return (low + high) / 2


class LossSecondMoment(Density, nn.Module):
    """p(t) proportional to sqrt(E[L_t^2]) over the last losses of each step (Improved DDPM, 2102.09672, section 4), uniform
    until every step has enough of them. Discrete processes only.

    The loss of a step is then to be multiplied by 1 / (T p), for the expectation to stay what it was: ``importance``. The
    history is part of the checkpoint.

    Args:
        history: losses that are remembered of each step; uniform: share of uniform draws, so that no step is forgotten.
    """

    def __init__(self, history: int = 10, uniform: float = 0.001):
        super().__init__()
        if history < 1 or not 0 <= uniform <= 1:
            raise ValueError(f"density: history {history}, uniform {uniform}; LossSecondMoment takes a history from 1 and a "
                             "share from 0 to 1")
        self.size, self.uniform = history, uniform

    def check(self, process: Process) -> list[str]:
        if process.t_data < 0:
            return []
        return [f"LossSecondMoment keeps a history of every step, and {type(process).__name__} has no steps; take a "
                "discrete process (ldm.process.DDPM) or another density"]

    def allocate(self, process: Process) -> None:
        """Make room for a process of T steps."""
        for problem in self.check(process):
            raise ValueError(problem)
        steps = int(process.t_max) + 1
        self.register_buffer("losses", torch.zeros(steps, self.size))  # (T, history), the oldest first
        self.register_buffer("counts", torch.zeros(steps, dtype=torch.int64))

    def shares(self) -> Tensor:
        """p(t) (T,), fp64, on the CPU."""
        losses, steps = self.losses.cpu().double(), len(self.counts)
        if (self.counts < self.size).any() or not losses.any():
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        spread = losses.square().mean(1).sqrt()
        return (1 - self.uniform) * spread / spread.sum() + self.uniform / steps

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        edges = self.shares().cumsum(0)
        index = torch.searchsorted(edges / edges[-1], u.cpu().double(), right=True).clamp(max=len(edges) - 1)
        return index.to(u.device, u.dtype)

    def importance(self, t: Tensor) -> Tensor:
        """1 / (T p(t)) for steps t (B,)."""
        shares = self.shares()
        return (1 / (len(shares) * shares[t.long().cpu()])).to(t.device, t.dtype)

    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Remember losses (B,) of steps t (B,), in this order; of all ranks, and before ``importance`` multiplies them."""
        for step, value in zip(t.long().tolist(), loss.detach().to(self.losses), strict=True):
            count = int(self.counts[step])
            if count < self.size:
                self.losses[step, count] = value
                self.counts[step] += 1
            else:
                self.losses[step] = torch.cat([self.losses[step, 1:], value[None]])
