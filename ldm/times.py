"""Lists of times for samplers: (process, n) -> (n + 1,) decreasing, fp64, from t_max to the time of clean data.
An ``overlap`` gives steps (n, 2) in their place, from where and to where each goes.

Lists of the first kind space the times themselves, those of the second the noise levels sigma/alpha (the sigma of
k-diffusion), which every process has: a level becomes a time by inverting sigma(t)/alpha(t). Lists of published samplers
begin below t_max, end above clean data or hold more steps than n: see each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ldm.common.named import Spec, options_of, pick, split
from ldm.process import Process

Times = Callable[..., Tensor]
End = Literal["data", "first"]  # a list ends at clean data, or at t_min, the noise of the first training step
Over = Literal["level", "sigma"]  # what is spaced: sigma / alpha, which is the sigma of k-diffusion; or a flow's own sigma

ENDLESS = (0.002, 80.0)  # noise levels between which a process is walked that goes on to 0 or infinity (EDM's)


# Times.


def linear(process: Process, n: int, *, end: End = "data", round: bool = False, overlap: bool = False) -> Tensor:
    """n + 1 evenly spaced times from t_max to t_data: "trailing" for discrete kinds (2305.08891, table 2).

    round: to whole steps (discrete kinds), as diffusers does where n does not divide T. overlap: see ``linspace``.
    """
    times = torch.linspace(process.t_max, process.t_data, n + 1, dtype=torch.float64)
    if round:
        _steps(process, n, "linear")
        times = (times + 1).round() - 1  # ties go to even numbers as they count, from 1
    return _back(times[:-1], process, n, end) if overlap else _then(times[:-1], process, end)


def shifted(process: Process, n: int, *, shift: float = 3.0, first: float = 1.0, last: float = 0.0) -> Tensor:
    """Linear times moved towards noise: share u -> shift * u / (1 + (shift - 1) * u) (2403.03206, eq. 23).

    first: the share u that they begin at; diffusers' use_flow_sigmas: 1 - 1 / T = 0.999. last: the one that they would end
    at, in whose place is clean data.
    """
    share = _shift(torch.linspace(first, last, n + 1, dtype=torch.float64), shift)
    return _at_shares(process, torch.cat([share[:-1], share.new_zeros(1)]))


def flow_match(process: Process, n: int, *, shift: float = 3.0, low: float = 0.001, terminal: float | None = None) -> Tensor:
    """diffusers' FlowMatchEuler: n even shares from 1 to `low`, shifted; then clean data.

    Its trap: with a fixed shift the training table's lowest share, 0.001, is shifted already, so that the low end is
    shifted twice: low = shift * 0.001 / (1 + (shift - 1) * 0.001) says the same. terminal: the shares are stretched about
    1 so that the last is this one.
    """
    share = _shift(torch.linspace(1, low, n, dtype=torch.float64), shift)
    if terminal is not None and n > 1:
        share = 1 - (1 - share) * (1 - terminal) / (1 - share[-1])
    return _at_shares(process, torch.cat([share, share.new_zeros(1)]))


def beta(process: Process, n: int, *, alpha: float = 0.6, beta: float = 0.6, sigma_min: float | None = None,
         sigma_max: float | None = None, span: Spec | None = None, over: Literal["time", "level", "sigma"] = "time") -> Tensor:
    """Quantiles of Beta(alpha, beta): below 1 both, more steps at the two ends (2407.12173).

    over: the time axis; or n of them over noise levels, or over a flow's own sigma, from sigma_max to sigma_min, then clean
    data (diffusers' use_beta_sigmas). span: see ``karras``.
    """
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"times 'beta': alpha {alpha}, beta {beta}; both are above 0")
    if over == "time" and not sigma_min is sigma_max is span is None:
        raise ValueError("times 'beta': sigma_min, sigma_max and span go with noise levels; take over 'level'")
    logit = torch.linspace(-60, 60, 400_001, dtype=torch.float64) / min(alpha, beta, 1.0)
    share = torch.sigmoid(logit)  # over which the density is share^alpha (1 - share)^beta, smooth and 0 at the ends
    density = torch.exp(alpha * torch.nn.functional.logsigmoid(logit) + beta * torch.nn.functional.logsigmoid(-logit))
    total = torch.cumulative_trapezoid(density, logit)
    even = torch.linspace(1, 0, n + (over == "time"), dtype=torch.float64)
    found = _interpolate(even, total / total[-1], share[1:])
    found[even == 1], found[even == 0] = 1, 0
    if over == "time":
        return _at_shares(process, found)
    low, high = _range(process, sigma_min, sigma_max, over, span, n)
    return _at_levels(process, low + found * (high - low), over, whole=sigma_max is span is None)


def linspace(process: Process, n: int, *, points: Literal["n", "n+1"] = "n", round: bool = True, end: End = "data",
             overlap: bool = False) -> Tensor:
    """Even times from t_max to t_min, both among them, then clean data (2305.08891, table 2). Not for flows: t_min is clean.

    Discrete kinds: points "n+1" leaves out the last, t_min, as diffusers' DPM-Solver, UniPC and DEIS do; round: to whole
    steps (not in diffusers' Euler, Heun, LMS); overlap: every step goes back by T // n, beyond where the next one begins
    (diffusers' DDIM and PNDM).
    """
    if process.t_min == process.t_data:
        raise ValueError(f"times 'linspace' hold t_min and then clean data, which {type(process).__name__} has at the same "
                         "time; take 'linear'")
    times = torch.linspace(process.t_max, process.t_min, n + (points == "n+1"), dtype=torch.float64)[:n]
    times = times.round() if round and process.t_data < 0 else times
    return _back(times, process, n, end) if overlap else _then(times, process, end)


def leading(process: Process, n: int, *, offset: int = 1, divide: Literal["n", "n+1"] = "n", end: End = "data") -> Tensor:
    """DDIM's choice on T steps (2010.02502): offset + k * (T // n), k < n; never reaches t_max. Discrete kinds only.

    The word has two meanings in diffusers: DPM-Solver, UniPC and DEIS divide T by n + 1 and leave out k = 0. offset:
    its steps_offset. end "first": its set_alpha_to_one=False.
    """
    steps = _steps(process, n, "leading")
    more = divide == "n+1"
    return _ladder(torch.arange(n + more)[more:] * (steps // (n + more)) + offset, process, end, "leading")


def compvis(process: Process, n: int) -> Tensor:
    """LDM's and Stable Diffusion's DDIM list: 1 + k * (T // n) as long as there are any (n or more), then t = 0, not the
    data: their last step leaves the noise of the first training step. Discrete kinds only."""
    steps = _steps(process, n, "compvis")
    return _ladder(torch.arange(0, steps, steps // n) + 1, process, "first", "compvis")


def quadratic(process: Process, n: int) -> Tensor:
    """Squares of even numbers. Discrete kinds, as LDM's "quad" list: 1 + floor(u^2), u even in [0, sqrt(0.8 T)], then t = 0;
    small times that are found more than once are kept once, for a step from t to t does nothing. Others: shares u^2."""
    if process.t_data >= 0:
        return _at_shares(process, torch.linspace(1, 0, n + 1, dtype=torch.float64).square())
    steps = _steps(process, n, "quadratic")
    ladder = torch.linspace(0, math.sqrt(0.8 * steps), n, dtype=torch.float64).square().long() + 1
    return _ladder(ladder.unique(), process, "first", "quadratic")


def lcm(process: Process, n: int, *, trained: int = 50, end: End = "data") -> Tensor:
    """n of the ``trained`` even times that a consistency model was distilled at, from the last training step; then clean
    data (LCM, 2310.04378; diffusers' LCM, and with end "first" its TCD). Discrete kinds only."""
    steps = _steps(process, trained, "lcm")
    if n > trained:
        raise ValueError(f"times 'lcm': {n} steps of the {trained} that it was trained at; take {trained} at most")
    ladder = (torch.arange(1, trained + 1) * (steps // trained) - 1).flip(0)
    return _then(ladder[torch.arange(n) * trained // n].double(), process, end)


# Noise levels.


def karras(process: Process, n: int, *, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None,
           span: Spec | None = None, end: End = "data", round: bool = False, over: Over = "level") -> Tensor:
    """n levels, even after the root of order rho, then clean data (EDM, 2206.00364, eq. 5). Every process.

    sigma_min, sigma_max: the process's own, or 0.002 and 80 where that is 0 or infinite, as k-diffusion and diffusers' DPM
    have it. span: another list of n times, between whose first and last levels these lie (diffusers' Euler, Heun, LMS).
    round: to whole steps, at which a network was trained (discrete kinds). over: "sigma" as diffusers' flow matching, on flows.
    """
    low, high = _range(process, sigma_min, sigma_max, over, span, n)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return _at_levels(process, levels, over, whole=sigma_max is span is None, round=round, end=end)


def polyexponential(process: Process, n: int, *, rho: float = 1.0, sigma_min: float | None = None,
                    sigma_max: float | None = None, span: Spec | None = None, end: End = "data", round: bool = False,
                    over: Over = "level") -> Tensor:
    """n levels whose logarithms follow a ramp to the power rho, then clean data (k-diffusion). Every process."""
    low, high = _range(process, sigma_min, sigma_max, over, span, n)
    ramp = torch.linspace(1, 0, n, dtype=torch.float64) ** rho
    levels = torch.exp(math.log(low) + ramp * math.log(high / low))
    return _at_levels(process, levels, over, whole=sigma_max is span is None, round=round, end=end)


def exponential(process: Process, n: int, *, sigma_min: float | None = None, sigma_max: float | None = None,
                span: Spec | None = None, end: End = "data", round: bool = False, over: Over = "level") -> Tensor:
    """n levels in even ratios, then clean data (k-diffusion; diffusers' exponential and "lu lambdas"). Every process."""
    return polyexponential(process, n, sigma_min=sigma_min, sigma_max=sigma_max, span=span, end=end, round=round, over=over)


def log_snr(process: Process, n: int, *, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """n + 1 levels in even ratios, so n equal steps of log(alpha / sigma) (DPM-Solver, 2206.00927, section 3.3). Every
    process; ends at sigma_min, not at clean data, as theirs."""
    return exponential(process, n + 1, sigma_min=sigma_min, sigma_max=sigma_max)[:-1]


def dpm_fast(process: Process, n: int, *, order: int = 3, sigma_min: float | None = None,
             sigma_max: float | None = None) -> Tensor:
    """For the sampler "dpm_fast": its blocks are equal steps of log(alpha / sigma), each in even parts (k-diffusion; n + 1
    levels). Every process; ends at sigma_min."""
    low, high = (math.log(level) for level in _range(process, sigma_min, sigma_max))
    sizes = blocks(n, order)
    place = torch.cat([k + torch.arange(size, dtype=torch.float64) / size for k, size in enumerate(sizes)])
    levels = torch.exp(high + (low - high) / len(sizes) * torch.cat([place, place.new_tensor([len(sizes)])]))
    return _at_levels(process, levels, whole=sigma_max is None)[:-1]


def vp(process: Process, n: int, *, beta_d: float = 19.9, beta_min: float = 0.1, eps: float | None = None,
       sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """The n levels of a VP diffusion at even times, then clean data (2011.13456). Every process: the even times span its own
    range of levels, or go from 1 to ``eps`` (eps_s of k-diffusion's get_sigmas_vp)."""
    if eps is None:
        low, high = (  # level^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) = e^b
            (math.sqrt(beta_min**2 + 2 * beta_d * b) - beta_min) / beta_d
            for b in (math.log1p(level**2) for level in _range(process, sigma_min, sigma_max)))
    else:
        low, high = eps, 1.0
    t = torch.linspace(high, low, n, dtype=torch.float64)
    levels = torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()
    return _at_levels(process, levels, "level", whole=sigma_max is None and eps is None)


def sigmas(process: Process, n: int, *, values: Sequence[float]) -> Tensor:
    """Your own decreasing levels sigma/alpha, brought to n steps; they end with 0 (clean data), or where one stops."""
    levels = torch.tensor(values, dtype=torch.float64)
    if not (len(levels) > 1 and (levels.diff() < 0).all() and levels[-1] >= 0):
        raise ValueError(f"times 'sigmas': values: expected two or more decreasing noise levels from 0, got {list(values)}")
    times = _when(process, -levels.log())
    times[levels == 0] = process.t_data
    return _stretched(process, times, n)


def _align(levels: Sequence[float]) -> Times:
    def times(process: Process, n: int) -> Tensor:
        at = _when(process, -torch.tensor(levels, dtype=torch.float64).log())
        at[0] = process.t_max  # its own where the levels were found
        return _then(_stretched(process, at, n)[:-1], process, "data")

    times.__doc__ = "Align your steps (2404.14507): its published levels, brought to n steps; then clean data. Every process."
    return times


ays_sd1 = _align([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029])
ays_sdxl = _align([14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029])


def blocks(n: int, order: int, lower_order_final: bool = True, clean: bool = False) -> list[int]:
    """How singlestep methods share out n calls of the network: in blocks of ``order``; the rest is the last block, and where
    there is none the last block becomes two, for a last step of first order (DPM-Solver-fast, 2206.00927). clean: the last
    step, to clean data, is of first order in any case."""
    sizes = [order] * (n // order) + [n % order] * (n % order > 0)
    if sizes and sizes[-1] > 1 and (clean or (lower_order_final and sizes[-1] == order)):
        sizes[-1:] = [sizes[-1] - 1, 1]
    return sizes


TIMES: dict[str, Times] = {
    "linear": linear, "trailing": linear, "leading": leading, "linspace": linspace, "compvis": compvis,
    "quadratic": quadratic, "lcm": lcm, "shifted": shifted, "flow_match": flow_match, "beta": beta, "karras": karras,
    "exponential": exponential, "polyexponential": polyexponential, "log_snr": log_snr, "dpm_fast": dpm_fast, "vp": vp,
    "sigmas": sigmas, "ays_sd1": ays_sd1, "ays_sdxl": ays_sdxl,
}  # fmt: skip


def make_times(spec: Spec | Sequence[float] | Tensor, process: Process, n: int | None = None) -> Tensor:
    """The times that a name, {name: ..., option: ...} or a list of times asks for.

    A list (M + 1,) is what it says where n is None or M; else the logarithms of its noise levels are interpolated to n
    steps, its ends being kept ("align your steps", 2404.14507). Steps (M,2), from where and to where, are what they say.
    """
    low, high = min(process.t_data, process.t_min), process.t_max
    if isinstance(spec, (str, Mapping)):
        return _named(spec, process, n, low, high)
    times = torch.as_tensor(spec, dtype=torch.float64)
    pairs = times.ndim == 2 and times.shape[1] == 2
    falling = (times.diff() < 0).all() if pairs or times.ndim == 1 else False
    if not (falling and times.numel() > 1 and times.max() <= high and times.min() >= low):
        raise ValueError(f"times: expected two or more decreasing times from {high:g} down to {low:g} at most, got "
                         f"{times.tolist()}")
    if pairs and n not in (None, len(times)):
        raise ValueError(f"times: {len(times)} steps from and to where cannot be brought to {n}; give a list of times")
    return times if pairs or n is None or n == len(times) - 1 else _stretched(process, times, n)


def _named(spec: Spec, process: Process, n: int | None, low: float, high: float) -> Tensor:
    """The times of a name with options. ValueError where options leave nothing that falls from ``high`` to ``low`` at most."""
    if n is None or n < 1:
        raise ValueError(f"times: {n} steps; a list that is made by name takes a whole number from 1")
    call = pick(spec, TIMES, "times")
    try:
        times = call(process, n)
    except ZeroDivisionError:
        times = torch.full((n + 1,), math.nan)
    falling = (times.diff() <= 0).all() and low <= times.min() < times.max() <= high  # not with nan
    if not falling:
        raise ValueError(f"times: {spec}: with these options they do not fall from {high:g} to {low:g}; leave out the one that "
                         f"is beyond its range ({', '.join(options_of(TIMES[split(spec)[0]])) or 'there are none'})")
    return times


def _when(process: Process, log_snr: Tensor) -> Tensor:
    """The times (N,) of these log(alpha / sigma); the steps of a discrete process exactly."""
    times = process.when(log_snr)
    return torch.where((times - times.round()).abs() < 1e-9, times.round(), times) if process.t_data < 0 else times


def _shift(share: Tensor, shift: float) -> Tensor:
    return shift * share / (1 + (shift - 1) * share)


def _at_shares(process: Process, share: Tensor) -> Tensor:
    """Shares of the way from clean data (0) to t_max (1) -> times."""
    times = process.t_data + share * (process.t_max - process.t_data)
    return torch.where(share == 1, process.t_max, times)


def _at_levels(process: Process, levels: Tensor, over: Over = "level", *, whole: bool, round: bool = False,
               end: End = "data") -> Tensor:
    """Noise levels (n,) -> times, then the end. whole: the first is t_max itself."""
    times = _when(process, -(levels if over == "level" else levels / (1 - levels)).log())
    if whole:
        times[0] = process.t_max
    if round:
        _steps(process, 1, "karras, exponential: round")
        times = times.round().unique().flip(0)
    return _then(times, process, end)


def _range(process: Process, low: float | None, high: float | None, over: Over = "level", span: Spec | None = None, n: int = 1
           ) -> tuple[float, float]:
    """The least and the greatest level: what is asked for, else those of a list of n times before its end, else those of
    t_min and t_max, as far as they are numbers."""
    if span is not None:
        last, first = torch.exp(-process.log_snr(make_times(span, process, n)[[-2, 0]])).tolist()
        low, high = last if low is None else low, first if high is None else high
    if over == "sigma" and float(sum(process.exact(torch.tensor(0.5, dtype=torch.float64)))) != 1:
        raise ValueError(f"times over 'sigma' are for flows, where alpha = 1 - sigma; {type(process).__name__} takes 'level'")
    own = torch.exp(-process.log_snr(torch.tensor([process.t_min, process.t_max], dtype=torch.float64))).tolist()
    low = (own[0] if own[0] > 0 else ENDLESS[0]) if low is None else low
    high = (1.0 if over == "sigma" else min(own[1], ENDLESS[1]) if process.straight else own[1]) if high is None else high
    if not 0 < low < high or (over == "sigma" and high > 1):
        raise ValueError(f"times: sigma_min {low:g} and sigma_max {high:g}: expected 0 < sigma_min < sigma_max"
                         + " <= 1" * (over == "sigma"))
    return low, high


def _stretched(process: Process, times: Tensor, n: int) -> Tensor:
    """Times (M + 1,) brought to (n + 1,): noise levels interpolated by their logarithms. The first and the last stay; a
    last of no noise has no logarithm, and stays outside."""
    levels = -process.log_snr(times)
    clean = not levels[-1].isfinite()
    inner = levels[: len(levels) - int(clean)].clamp(math.log(1e-4), math.log(1e4))
    place = torch.linspace(0, len(inner) - 1, n + 1 - int(clean), dtype=torch.float64)
    found = _when(process, -_interpolate(place, torch.arange(len(inner), dtype=torch.float64), inner))
    found = torch.cat([found, times[-1:]]) if clean else torch.cat([found[:-1], times[-1:]])
    return torch.cat([times[:1], found[1:]])


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (known, values), both (M,), known increasing, at x (N,)."""
    if len(known) == 1:
        return values.expand(len(x)).clone()
    right = torch.searchsorted(known, x).clamp(1, len(known) - 1)
    share = ((x - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], share)


def _steps(process: Process, n: int, name: str) -> int:
    """T of a discrete process that has n steps and more."""
    if process.t_data >= 0:
        raise ValueError(f"times {name!r} belong to discrete processes; {type(process).__name__} takes 'linear'")
    steps = int(process.t_max) + 1
    if n > steps:
        raise ValueError(f"times {name!r}: {n} steps of a process that has {steps}; take {max(1, steps // 2)} at most, "
                         "or 'linear'")
    return steps


def _ladder(ladder: Tensor, process: Process, end: End, name: str) -> Tensor:
    """The ladder (N,) walked down, then the end. ValueError where it begins beyond the process."""
    steps = int(process.t_max) + 1
    if ladder[-1] >= steps:
        few = f"a number of steps that divides {steps}, {steps // 2} at most, or " if steps > 1 else ""
        raise ValueError(f"times {name!r}: these begin at t = {int(ladder[-1])}, the process ends at {steps - 1}; take {few}"
                         "'linear'")
    return _then(ladder.flip(0).double(), process, end)


def _last(process: Process, end: End) -> float:
    return process.t_data if end == "data" else process.t_min


def _then(times: Tensor, process: Process, end: End) -> Tensor:
    """The times (n,) and where they end."""
    return torch.cat([times, times.new_tensor([_last(process, end)])])


def _back(times: Tensor, process: Process, n: int, end: End) -> Tensor:
    """Steps (n,2) from the times (n,) back by T // n; those beyond the first training step end where the list does."""
    to = times - _steps(process, n, "overlap") // n
    return torch.stack([times, torch.where(to < process.t_min, _last(process, end), to)], 1)
