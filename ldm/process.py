"""Noise processes: x_t = alpha(t) * x0 + sigma(t) * eps.

A process is two functions of time. Discrete (DDPM) kinds count t = 0..T-1 as in training, fractions interpolate, and
t = -1 is the data itself. Tables are fp64 and cast after indexing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.betas import SCHEDULES, numbers, spaced, zero_terminal_snr
from ldm.common.files import UserError

Number = Tensor | float
Between = Literal["log_alpha", "log_snr", "level"]
Tells = Literal["step", "thousandth", "whole", "below"]
Variance = Literal["small", "large", "learned", "learned_range"]
MOST_STEPS = 1_000_000


class StepPosterior(NamedTuple):
    """q(x_s | x_t, x0) = N(x0 * data + xt * x_t, variance) for s before t; ``beta`` is the variance of q(x_t | x_s)."""

    x0: Number
    xt: Number
    variance: Number
    beta: Number


def step_posterior(alpha: Number, sigma: Number, alpha_s: Number, sigma_s: Number) -> StepPosterior:
    """Bayes' rule for one step from t to s < t; numbers, or fp64 tensors of one shape (DDPM, 2006.11239, eq. 6 and 7).

    q(x_t | x_s) = N(a x_s, beta) with a = alpha / alpha_s, and q(x_s | x0) = N(alpha_s x0, sigma_s^2).
    """
    a = alpha / alpha_s
    beta = (sigma - a * sigma_s) * (sigma + a * sigma_s)  # sigma^2 - a^2 sigma_s^2
    share = (sigma_s / sigma) ** 2
    return StepPosterior(alpha_s * beta / sigma**2, a * share, beta * share, beta)


def log_variance(posterior: StepPosterior, var: Tensor | None = None, kind: Variance | float = "small",
                 floor: Number = 1e-20) -> Tensor:
    """Log of the variance of p(x_s | x_t), in the type of ``var`` (fp64 without), which ``posterior`` broadcasts against.

    Args:
        var: what the network says of it (B,C,h,w).
        kind: small: that of the posterior; large: beta (DDPM, section 3.2); a number: that share of the way from small to
            large (LDM's v_posterior); learned: ``var`` is the log variance; learned_range: between the two,
            log = v log(beta) + (1 - v) log(variance) with v = (var + 1) / 2 (Improved DDPM, 2102.09672, eq. 15).
        floor: stands for the variance 0 of the step to the data. Improved DDPM takes the variance of the step before
            it, ``process.posterior(1, 0).variance``; CompVis 1e-20.
    """
    if kind == "learned":
        return var
    variance, beta, floor = (torch.as_tensor(c, dtype=torch.float64) for c in (posterior.variance, posterior.beta, floor))
    small = torch.where(variance > 0, variance, floor).log()
    if kind == "learned_range":
        share = (var + 1) / 2
        return share * beta.log().to(var) + (1 - share) * small.to(var)
    if isinstance(kind, str):
        fixed = small if kind == "small" else torch.where(variance > 0, beta, floor).log()
    else:
        fixed = torch.lerp(variance, beta, kind).maximum(floor).log()
    return fixed if var is None else fixed.to(var)


def in_double(t: Tensor) -> Tensor:
    """In fp64, on the processor where t's device is one of Apple's, which have none."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def steps_of(times: Tensor) -> Tensor:
    """Times (N+1,), or steps (N,2) as they are -> (N,2): where each step begins and where it ends, fp64, on the CPU."""
    times = times.cpu().double()
    return times if times.ndim == 2 else torch.stack([times[:-1], times[1:]], 1)


class Process:
    """Base: ``t_data`` is the time of clean data, [t_min, t_max] the times that a network is trained on."""

    t_data: float = 0.0
    t_min: float
    t_max: float
    straight: bool = False  # True: the ODE is solved in flow coordinates (alpha may be next to 0), else in sigma/alpha

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> (B,), (B,)
        """alpha(t) and sigma(t) in t's floating type (fp32 for integers)."""
        dtype = t.dtype if t.is_floating_point() else torch.float32
        alpha, sigma = self.exact(in_double(t))
        return alpha.to(t.device, dtype), sigma.to(t.device, dtype)

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t) in fp64."""
        raise NotImplementedError

    def share(self, t: Number) -> Number:
        """Of the way from clean data (0) to t_max (1)."""
        return (t - self.t_data) / (self.t_max - self.t_data)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha' = d alpha / du and sigma' in fp64, u the ``share`` of the way: dx_t / du = alpha' x0 + sigma' eps."""
        with torch.inference_mode(False), torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            return tuple((self.t_max - self.t_data) * torch.autograd.grad(c.sum(), t, retain_graph=True)[0]
                         if c.requires_grad else torch.zeros_like(t) for c in self.exact(t))  # fmt: skip

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), half of the log signal-to-noise ratio (DPM-Solver, 2206.00927)."""
        alpha, sigma = self.exact(in_double(t))
        return alpha.log() - sigma.log()

    def when(self, log_snr: Tensor) -> Tensor:
        """The inverse of ``log_snr``, fp64, by search: the time where lambda(t) is that, or the nearest end."""
        wanted = in_double(log_snr).unsqueeze(-1)
        low, high = torch.full_like(wanted, self.t_data), torch.full_like(wanted, self.t_max)
        shares = torch.linspace(0, 1, 65, dtype=torch.float64, device=wanted.device)
        for _ in range(9):  # 64^9 parts
            grid = torch.lerp(low, high, shares)
            above = (self.log_snr(grid) > wanted).sum(-1, keepdim=True).clamp(1, 64)
            low, high = grid.gather(-1, above - 1), grid.gather(-1, above)
        return ((low + high) / 2).squeeze(-1)

    def posterior(self, t: Number, s: Number) -> StepPosterior:
        """q(x_s | x_t, x0) in fp64, of the shape of t and s; s < t."""
        t, s = (in_double(time) if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)
                for time in (t, s))  # fmt: skip
        return step_posterior(*self.exact(t), *self.exact(s))

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


class Discrete(Process):
    """T steps, t = 0..T-1: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

    Args:
        alpha_bar: (T,) fp64, decreasing; told: (T,) what the network is told of each step, in place of t.
        between: what is linear from one step to the next: "log_alpha", the VP diffusion whose beta is constant there;
            "log_snr", log(alpha / sigma), as in k-diffusion; "level", sigma / alpha, as diffusers' Euler, Heun and LMS.
        tells: what the network is told: "step", t; "thousandth", 1000 t / T (Improved DDPM's rescale_timesteps); "whole", t
            rounded (k-diffusion's quantize; diffusers' solvers on "karras"), "below", t cut (theirs on other levels).
    """

    t_data = -1.0
    t_min = 0.0

    def __init__(self, alpha_bar: Tensor, told: Tensor | None = None, between: Between = "log_alpha", tells: Tells = "step"):
        self.alpha_bar, self.between, self.tells = alpha_bar, between, tells
        self.t_max = float(len(alpha_bar) - 1)
        self.straight = float(alpha_bar[-1]) < 1e-6  # else sigma/alpha is 1000 and more at the end
        if between == "level" and alpha_bar[-1] == 0:
            raise UserError("between 'level': sigma / alpha has no end where the last step is pure noise; take 'log_alpha'")
        # index 0 is the data (t = -1), index k is t = k - 1
        self._log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * alpha_bar.log()])
        self._log_snr = self._log_alpha - 0.5 * torch.log(-torch.expm1(2 * self._log_alpha))
        self._told = None if told is None else torch.cat([-torch.ones(1, dtype=torch.float64), told.double()])

    @property
    def betas(self) -> Tensor:  # (T,) fp64
        previous = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])
        return 1 - self.alpha_bar / previous

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = _between(self._log_alpha.to(t.device), t)
        if self.between != "log_alpha":  # but for the way to the data, where these are infinite
            log_snr, inside = self._log_snr.to(t.device), (t > 0) & (t < self.t_max)
            found = _between(log_snr, t) if self.between == "log_snr" else -_between((-log_snr).exp(), t).log()
            log_alpha = torch.where(inside, 0.5 * torch.nn.functional.logsigmoid(2 * found), log_alpha)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).clamp(min=0).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of the differences between the steps before and after t, at the ends of those to the next."""
        low, high = (t - 1).clamp(min=self.t_data), (t + 1).clamp(max=self.t_max)
        way = (self.t_max - self.t_data) / (high - low)
        return tuple(way * (after - before) for before, after in zip(self.exact(low), self.exact(high), strict=True))

    def time(self, t: Tensor) -> Tensor:
        dtype = t.dtype if t.is_floating_point() else torch.float32
        if self._told is not None:
            t = _between(self._told.to(t.device, torch.float32), t).to(dtype)
        if self.tells == "thousandth":
            return (t * (1000.0 / len(self.alpha_bar))).to(dtype)
        # a level that was found as exp(log(sigma)) lies a little below its step, and is told as the one before
        return {"whole": t.round(), "below": (t - 2e-4).floor().clamp(min=0)}.get(self.tells, t)


def _between(table: Tensor, t: Tensor) -> Tensor:
    """Values of a table that begins at t = -1, linear in between; -inf, at the end only, counts as -50 on the way to it."""
    index = (t + 1).clamp(0, len(table) - 1)
    low = index.floor().long().clamp(max=len(table) - 2)
    part = index - low
    return torch.where(part == 0, table[low], torch.where(
        part == 1, table[low + 1], torch.lerp(table[low], table[low + 1].clamp(min=-50.0), part.to(table.dtype))))


class DDPM(Discrete):
    """T steps from a schedule of betas.

    Args:
        start, end: first and last beta of the schedule (its own default if None). Improved DDPM scales those of "linear" with
            the steps: 0.1 / T and 20 / T.
        zero_terminal: rescale so that the last step is pure noise; not with noise prediction.
        floor: the least alpha_bar; above 0, the last step of ``zero_terminal`` has a sigma / alpha (diffusers: 2^-24).
        between, tells: see ``Discrete``.
    """

    def __init__(self, schedule: Literal["linear", "scaled_linear", "sqrt", "cosine", "sigmoid"] = "scaled_linear",
                 steps: int = 1000, start: float | None = None, end: float | None = None, zero_terminal: bool = False,
                 floor: float = 0.0, between: Between = "log_alpha", tells: Tells = "step"):
        given = {k: v for k, v in (("start", start), ("end", end)) if v is not None}
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps: {steps}; it takes a whole number from 1 to {MOST_STEPS:,}")
        betas = SCHEDULES[schedule](steps, **given)
        if not ((betas > 0) & (betas < 1)).all():
            raise UserError(f"DDPM: schedule {schedule!r}, start {start}, end {end}: expected betas between 0 and 1, got "
                            f"{betas[:1].tolist()} to {betas[-1:].tolist()}")
        alpha_bar = torch.cumprod(1 - betas, 0)
        alpha_bar = (zero_terminal_snr(alpha_bar) if zero_terminal else alpha_bar).clamp(min=floor)
        super().__init__(alpha_bar, between=between, tells=tells)


class Table(Discrete):
    """T steps from numbers: a list, or a file (.npy, .pt, .safetensors that hold one tensor).

    Args:
        alpha_bar: products of 1 - beta, decreasing from below 1 to 0 or above; betas: in their place. One of both.
        zero_terminal, floor, between, tells: see ``DDPM``.

    A checkpoint holds the numbers themselves: ``block`` is this process's config without the file.
    """

    def __init__(self, alpha_bar: list[float] | Path | None = None, betas: list[float] | Path | None = None,
                 zero_terminal: bool = False, floor: float = 0.0, between: Between = "log_alpha", tells: Tells = "step"):
        if (alpha_bar is None) == (betas is None):
            raise UserError("a table of noise levels is given as alpha_bar or as betas: one of both")
        table = numbers("alpha_bar", alpha_bar) if betas is None else torch.cumprod(1 - numbers("betas", betas), 0)
        before = torch.cat([table.new_ones(1), table[:-1]])
        wrong = (~((table < before) & (table >= 0))).nonzero().flatten().tolist()
        if wrong:
            k = wrong[0]
            raise UserError(f"alpha_bar[{k}] is {float(table[k]):g} after {float(before[k]):g}: alpha-bar, the product of "
                            "1 - beta, has to decrease at every step, from below 1 and not below 0")
        super().__init__((zero_terminal_snr(table) if zero_terminal else table).clamp(min=floor), between=between, tells=tells)
        self.block = {"target": "ldm.process.Table",
                      "params": {"alpha_bar": self.alpha_bar.tolist(), "between": between, "tells": tells}}


def respaced(process: Discrete, kept: list[int] | str) -> Discrete:
    """Some of the steps of a discrete process as a process of its own, whose network is told the times of the whole one
    (Improved DDPM, 2102.09672, section 4: betas from the alpha_bar that are left).

    kept: the steps, or how to choose them (see ``spaced``).
    """
    steps = len(process.alpha_bar)
    kept = spaced(steps, kept) if isinstance(kept, str) else sorted(set(kept))
    if not kept or kept[0] < 0 or kept[-1] >= steps:
        raise UserError(f"kept: expected steps between 0 and {steps - 1}, got {kept[:1]} to {kept[-1:]}")
    rows = torch.tensor(kept)
    found = Discrete(process.alpha_bar[rows], process.time(rows.double()), process.between)
    if hasattr(process, "block"):
        found.block = {"target": "ldm.process.respaced", "params": {"process": process.block, "kept": kept}}
    return found


class VP(Process):
    """Continuous variance-preserving diffusion (2011.13456, eq. 33), t in (0, 1], beta linear from b_min to b_max."""

    t_min, t_max = 1e-3, 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 <= beta_min <= beta_max or beta_max == 0:
            raise UserError(f"VP: beta_min {beta_min}, beta_max {beta_max}: expected 0 <= beta_min <= beta_max, not both "
                            "0")
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


def sd3_shift(tokens: int, base: int = 1024) -> float:
    """sqrt(m / n) for pictures of m tokens where no shift is right for n (2403.03206, eq. 23); 1024 are 512 x 512 pixels
    at a factor of 8 and patches of 2."""
    return math.sqrt(tokens / base)


def flux_shift(tokens: int, base: tuple[int, float] = (256, 0.5), most: tuple[int, float] = (4096, 1.15)) -> float:
    """exp(mu), mu on the line through (tokens, mu) = base and most: flux, and diffusers' dynamic shifting."""
    slope = (most[1] - base[1]) / (most[0] - base[0])
    return math.exp(base[1] + slope * (tokens - base[0]))


SHIFTS: dict[str, Callable[[int], float]] = {"sd3": sd3_shift, "flux": flux_shift}


class RectifiedFlow(Process):
    """Straight lines, x_t = (1 - t) x0 + t eps, t in [0, 1] (2209.03003, 2210.02747).

    Args:
        shift: resolution shift s of 2403.03206, eq. 23: t -> s t / (1 + (s - 1) t); above 1 means more noise. Or how it
            follows from the number of tokens of a picture: see ``sd3_shift``, ``flux_shift``.
        tells: what the network is told: 1000 sigma, or the whole number below it (diffusers' solvers on a flow).
    """

    t_min, t_max = 0.0, 1.0
    straight = True

    def __init__(self, shift: float | Literal["sd3", "flux"] = 1.0, tokens: int | None = None,
                 tells: Literal["exact", "below"] = "exact"):
        if isinstance(shift, str) != (tokens is not None):
            raise UserError(f"shift {shift!r} with tokens {tokens}: 'sd3' and 'flux' need tokens, a number takes none")
        self.shift, self.tells = SHIFTS[shift](tokens) if isinstance(shift, str) else shift, tells
        if not 0 < self.shift < math.inf:
            raise UserError(f"RectifiedFlow: shift {shift}: expected a number above 0; 1 is none")

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - sigma, sigma

    def time(self, t: Tensor) -> Tensor:
        """The network is told sigma, not t, so a shift does not change what it knows."""
        time = 1000.0 * self.exact(in_double(t))[1].to(t.device, t.dtype)
        return time.floor() if self.tells == "below" else time


class EDM(Process):
    """Variance exploding, alpha = 1, sigma = t in [sigma_min, sigma_max] (2206.00364).

    Args:
        tells: c_noise = ln(sigma) / 4 as it is (diffusers, CosXL), or brought to the range 0..1000 that other processes have.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, tells: Literal["thousand", "c_noise"] = "thousand"):
        if not 0 <= sigma_min < sigma_max < math.inf:
            raise UserError(f"EDM: sigma_min {sigma_min}, sigma_max {sigma_max}: expected 0 <= sigma_min < sigma_max")
        self.t_min, self.t_max, self.tells = sigma_min, sigma_max, tells

    def exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def when(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-in_double(log_snr))

    def time(self, t: Tensor) -> Tensor:
        if self.tells == "c_noise":
            return t.clamp(min=self.t_min).log() / 4
        low, high = math.log(self.t_min), math.log(self.t_max)
        return 1000.0 * (t.clamp(min=self.t_min).log() - low) / (high - low)
