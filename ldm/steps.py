"""What samplers are made of: steps of the probability-flow ODE and of its SDE between two points (alpha, sigma).

Three views, each used by the methods that were written in it:
  - ``exponential``: what is predicted (x0 or eps) is a polynomial in lambda = log(alpha / sigma) (DPM-Solver, UniPC);
  - ``Chart``: y over tau with dy = slope dtau; on a variance-exploding process EDM's and k-diffusion's x over sigma;
  - ``ancestral``: which part of sigma_s is new noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from numpy.polynomial import Polynomial
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ldm.parameterization import Denoise, Prediction, solve
from ldm.process import Process, steps_of

Callback = Callable[[int, float, Tensor, Prediction], None]
Noise = Callable[[int, tuple[int, ...]], Tensor]
Predicted = Literal["data", "noise"]  # what is extrapolated: x0 (DPM-Solver++), or eps (DPM-Solver)


class Point(NamedTuple):
    """Of a process: ``here``, where a step begins, and ``there``, where it ends."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), infinite for pure noise and for clean data."""
        if self.alpha > 0 and self.sigma > 0:
            return math.log(self.alpha / self.sigma)
        return math.copysign(math.inf, self.alpha - self.sigma)


def walk(times: Tensor, process: Process) -> Iterator[tuple[int, float, Point, Point, float]]:
    """(step, t, here, there, s) for every step, numbers in fp64. A step from t to t is left out."""
    steps = steps_of(times)
    points = torch.stack(process.exact(steps), -1).tolist()  # (N, 2 ends, alpha and sigma)
    for step, ((t, s), (here, there)) in enumerate(zip(steps.tolist(), points, strict=True)):
        if t != s:
            yield step, t, Point(*here), Point(*there), s


def ask(denoise: Denoise, x: Tensor, t: float, step: int = 0, callback: Callback | None = None) -> Prediction:
    """The network's view of x at t, which the callback is shown. t is told in fp32, or in fp64 where x is."""
    guess = denoise(x, torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)))
    if callback is not None:
        callback(step, t, x, guess)
    return guess


def draw(noise: Noise | None, key: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noise is None else noise(key, tuple(x.shape)).to(x)


def noised(x: Tensor, up: float, noise: Noise | None, key: int) -> Tensor:
    """x with new noise of deviation ``up``; none is drawn for 0."""
    return x + up * draw(noise, key, x) if up > 0 else x


def at(process: Process, t: float) -> Point:
    return Point(*(float(c) for c in process.exact(torch.tensor(t, dtype=torch.float64))))


def when(process: Process, log_snr: float) -> tuple[float, Point]:
    """The time of the process that has this lambda, and the point there."""
    t = float(process.when(torch.tensor(log_snr, dtype=torch.float64)))
    return t, at(process, t)


# Exponential integrators.


FINITE = 7.0  # lambda, where it is infinite at an end: sigma / alpha from 1100 to 1 / 1100


def is_pure(here: Point, of: Predicted = "data") -> bool:
    """Whether x is all noise; next to it is enough where eps is extrapolated, of which x is then nearly all."""
    return here.alpha == 0 or (of == "noise" and here.log_snr < -FINITE)


def believed(guess: Prediction, here: Point, of: Predicted) -> tuple[float, Tensor]:
    """lambda, and what is extrapolated over it; in pure noise -inf and x0 in any case."""
    return (-math.inf, guess.x0) if is_pure(here, of) else (here.log_snr, guess.x0 if of == "data" else guess.eps)


class Exponential(NamedTuple):
    """The exact step for a prediction F(lambda) = F + F' (lambda - lambda_t) + F''/2 (lambda - lambda_t)^2, h its length:
    x_s = kept x + value F + slope h F' + bend h^2 F''/2 + up noise."""

    kept: float
    value: float
    slope: float
    bend: float
    up: float


def exponential(here: Point, there: Point, of: Predicted = "data", eta: float = 0.0) -> Exponential:
    """Of the ODE, or of the SDE whose noise has eta times the variance of the reverse process' (2211.01095, section 5).

    data: x_s = (sigma_s / sigma) e^(-eta h) x + alpha_s int_0^H e^(u-H) x0 du, H = (1 + eta) h (2211.01095, prop. 4.1);
    noise: x_s = (alpha_s / alpha) x - (1 + eta) sigma_s int_0^h e^(h-u) eps du (2206.00927, prop. 3.1).
    Both in powers of e^-h = alpha sigma_s / (alpha_s sigma), which is 0 next to an infinite lambda.
    """
    (alpha, sigma), (alpha_s, sigma_s), h = here, there, there.log_snr - here.log_snr
    check_eta(eta)
    if of == "data" or is_pure(here, of):
        shrink = (alpha * sigma_s) / (alpha_s * sigma)
        unit, length, kept = alpha_s, (1 + eta) * h, sigma_s / sigma * shrink**eta
        value = alpha_s * (1 - shrink ** (1 + eta))
        up = sigma_s * math.sqrt(max(0.0, 1 - shrink ** (2 * eta)))
    else:
        grown = alpha_s * sigma / alpha  # sigma_s e^h
        unit, length, kept = (1 + eta) * sigma_s, -h, alpha_s / alpha
        value = (1 + eta) * (sigma_s - grown)
        up = math.sqrt(eta * max(0.0, grown**2 - sigma_s**2))
    slope = unit - value / length
    return Exponential(kept, value, slope, unit - 2 * slope / length, up)


def move(x: Tensor, x0: Tensor, here: Point, there: Point) -> Tensor:
    """The step on which x0 is constant (2211.01095, section 4): it is DDIM.

    alpha_s (1 - e^-h) = alpha_s - alpha sigma_s / sigma, so nothing diverges where alpha or sigma_s is 0.
    """
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    return (sigma_s / sigma) * x + (alpha_s - alpha * sigma_s / sigma) * x0


def single(x: Tensor, here: Point, there: Point, past: list[tuple[float, Tensor]], of: Predicted,
           solver: Literal["slope", "midpoint", "heun"]) -> Tensor:
    """From the start of a block to any point of it, through what was predicted in it so far: ``past``, (lambda, F) from its
    start on (2206.00927, algorithms 1 and 2).

    solver: the change of F counts by its integral; by half of it, two points known; or by a parabola, three points known.
    """
    kept, value, slope, bend, _ = exponential(here, there, of)
    (start, first), *later = past
    x, h = kept * x + value * first, there.log_snr - start
    rises = [(h / (then - start)) * (f - first) for then, f in later]  # h times the slope of the chord
    if len(later) == 2 and solver == "heun":
        r_1, r_2 = ((then - start) / h for then, _ in later)
        return x + slope * (r_2 * rises[0] - r_1 * rises[1]) / (r_2 - r_1) + bend * (rises[1] - rises[0]) / (r_2 - r_1)
    if later:
        x = x + (value / 2 if len(later) == 1 and solver == "midpoint" else slope) * rises[-1]
    return x


def unified(x: Tensor, here: Point, there: Point, past: list[tuple[float, Tensor]], of: Predicted, variant: str,
            new: Tensor | None = None) -> Tensor:
    """UniP of order len(past); with F at the step's end, ``new``, UniC (UniPC, 2302.04867, theorem 3.1).

    past: (lambda, F) of this and earlier steps, latest first.
    """
    (log_snr, now), h = past[0], there.log_snr - past[0][0]
    kept, value, *_ = exponential(here, there, of)
    nodes = [(other - log_snr, f - now) for other, f in past[1:]] + ([] if new is None else [(h, new - now)])
    x_s = kept * x + value * now
    if not nodes:
        return x_s
    unit, z = (there.alpha, -h) if of == "data" else (there.sigma, h)
    scale = z if variant == "bh1" else math.expm1(z)  # B(h)
    phi, wanted = math.expm1(z) / z - 1, []
    for k in range(1, len(nodes) + 1):
        wanted.append(math.factorial(k) * phi / scale)
        phi = phi / z - 1 / math.factorial(k + 1)
    ratios = torch.tensor([gap / h for gap, _ in nodes], dtype=torch.float64)
    powers = torch.vander(ratios, increasing=True).T
    weights = [0.5] if len(nodes) == 1 else torch.linalg.solve(powers, powers.new_tensor(wanted)).tolist()
    return x_s - unit * scale * sum(weight * h / gap * change for weight, (gap, change) in zip(weights, nodes, strict=True))


# The ODE as dy = slope dtau.


class Chart:
    """Coordinates that straighten the ODE: y = x / alpha over tau = sigma / alpha, dy = eps dtau; on processes that end in
    pure noise or next to it (``straight``) y = x / (alpha + sigma) over tau = sigma / (alpha + sigma), dy = (eps - x0) dtau.
    """

    def __init__(self, process: Process):
        self.process = process

    def __call__(self, here: Point) -> tuple[float, float]:
        """(x / y, tau)."""
        unit = here.alpha + here.sigma if self.process.straight else here.alpha
        return unit, here.sigma / unit

    def slope(self, guess: Prediction) -> Tensor:
        return guess.eps - guess.x0 if self.process.straight else guess.eps

    def jump(self, x: Tensor, slope: Tensor, here: Point, there: Point) -> Tensor:
        """Along a straight line."""
        (unit, tau), (unit_s, tau_s) = self(here), self(there)
        return unit_s * (x / unit + (tau_s - tau) * slope)

    def between(self, here: Point, there: Point) -> tuple[float, Point]:
        """Time and place of the geometric mean of two tau."""
        tau = math.sqrt(self(here)[1] * self(there)[1])
        return when(self.process, math.log((1 - tau) / tau) if self.process.straight else -math.log(tau))


def turned(x: Tensor, v: Tensor, here: Point, there: Point) -> Tensor:
    """DDIM's step with v = alpha eps - sigma x0 kept (2202.00512, appendix D, on any process)."""
    guess = solve(x, v, *here, -here.sigma, here.alpha)
    return there.alpha * guess.x0 + there.sigma * guess.eps


def lagrange(nodes: list[float]) -> list[Polynomial]:
    """Each is 1 at its own node and 0 at the others."""
    return [math.prod((Polynomial([-other, 1.0]) / (node - other) for j, other in enumerate(nodes) if j != i),
                      start=Polynomial([1.0])) for i, node in enumerate(nodes)]  # fmt: skip


def integrals(nodes: list[float], end: float, tau: Callable[[Tensor], Tensor]) -> list[float]:
    """int L_j(u) dtau from u = nodes[0] to ``end``, for the Lagrange polynomials L_j of the nodes: L_j tau at both ends less
    the integral of L_j'(u) tau(u) du, by 16 Gauss points."""
    points, shares = leggauss(16)
    half, u = (end - nodes[0]) / 2, (end + nodes[0]) / 2 + (end - nodes[0]) / 2 * points
    first, *taus, last = tau(torch.tensor([nodes[0], *u, end], dtype=torch.float64)).tolist()
    return [float(L(end) * last - L(nodes[0]) * first - half * (shares * L.deriv()(u) * taus).sum()) for L in lagrange(nodes)]


# Noise.


def check_eta(eta: float) -> None:
    if not eta >= 0:
        raise ValueError(f"eta: {eta}; the share of new noise is 0 or more")


def ancestral(here: Point, there: Point, eta: float) -> tuple[Point, float]:
    """(down, up): a step to ``down``, then ``up`` times new noise. eta = 1: ``up`` is the deviation of q(x_s | x_t, x0)
    (DDIM, 2010.02502, eq. 16); k-diffusion's ancestral step on any alpha, sigma."""
    check_eta(eta)
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    ratio = (alpha * sigma_s) / (alpha_s * sigma)
    up = min(sigma_s, eta * sigma_s * max(0.0, 1.0 - ratio**2) ** 0.5)
    return Point(alpha_s, max(0.0, sigma_s**2 - up**2) ** 0.5), up


def churn(x: Tensor, t: float, here: Point, process: Process, gamma: float, s_tmin: float, s_tmax: float,
           s_noise: float, noise: Callable[[], Tensor]) -> tuple[Tensor, float, Point]:
    """Back to where sigma / alpha is 1 + gamma times larger, with new noise (EDM, 2206.00364, algorithm 2, lines 4 to 6);
    not beyond the end of the process."""
    (alpha, sigma), gamma = here, min(gamma, math.sqrt(2) - 1)
    if gamma == 0 or alpha == 0 or not s_tmin <= sigma / alpha <= s_tmax:
        return x, t, here
    t_hat, hat = when(process, here.log_snr - math.log1p(gamma))
    grown = math.sqrt(max(0.0, (hat.sigma / hat.alpha) ** 2 - (sigma / alpha) ** 2))
    return hat.alpha * (x / alpha + s_noise * grown * noise()), t_hat, hat


# Steps of their own for each image, lambda (B,).


def wide(c: Tensor, like: Tensor) -> Tensor:  # (B,) -> (B,1,1,1)
    return c.to(like).view(-1, *[1] * (like.ndim - 1))


def finite_ends(times: Tensor, process: Process) -> tuple[tuple[float, Point], tuple[float, Point], tuple[float, Point], Point]:
    """(t, where the times begin), (t, the first point after it whose lambda is not below -FINITE), (t, the last point, which is
    that of t_min or of FINITE where the times end at clean data), where they end."""
    t, s = float(steps_of(times)[0, 0]), float(steps_of(times)[-1, 1])
    begin, end = at(process, t), at(process, s)
    low = (t, begin) if begin.log_snr >= -FINITE else when(process, -FINITE)
    high = (s, end) if end.sigma > 0 else when(process, min(at(process, process.t_min).log_snr, FINITE))
    return (t, begin), low, high, end


def in_lambda(denoise: Denoise, process: Process, callback: Callback | None) -> Callable[..., Tensor]:
    """eps at y = x / alpha (B,C,h,w) and lambda (B,). The callback is shown the calls that have a number."""
    def look(y: Tensor, log_snr: Tensor, number: int | None = None) -> Tensor:
        t = process.when(log_snr)
        x = wide(process.exact(t)[0], y) * y
        guess = denoise(x, t.to(y.device, torch.promote_types(y.dtype, torch.float32)))
        if callback is not None and number is not None:
            callback(number, float(t.max()), x, guess)
        return guess.eps
    return look


def pair(look: Callable[..., Tensor], y: Tensor, log_snr: Tensor, d: Tensor, h: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1 and -2, or -2 and -3, over a step h (B,) of lambda (2206.00927, eq. 3.7, algorithms 1 and 2): y = x / alpha,
    where the slope is d and elsewhere look(y, lambda), by the lower and by the higher order."""
    def to(share: float, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """y at this share of the step: y - e^-lambda times the sum of weight (B,) * slope (B,C,h,w)."""
        return y - wide((-log_snr - share * h).exp(), y) * sum(wide(weight, y) * slope for weight, slope in terms)

    grown, half, third, two = (torch.expm1(share * h) for share in (1, 1 / 2, 1 / 3, 2 / 3))
    if order == 2:
        change = look(to(1 / 2, (half, d)), log_snr + h / 2) - d
        return to(1, (grown, d)), to(1, (grown, d), (grown, change))
    change = look(to(1 / 3, (third, d)), log_snr + h / 3) - d
    later = look(to(2 / 3, (two, d), (2 * (two / (2 / 3 * h) - 1), change)), log_snr + 2 / 3 * h) - d
    return to(1, (grown, d), (1.5 * grown, change)), to(1, (grown, d), (1.5 * (grown / h - 1), later))


def ancestral_lambda(log_snr: Tensor, target: Tensor, eta: float, last: float) -> tuple[Tensor, Tensor]:
    """``ancestral`` on x / alpha for steps of lambda (B,) to ``target``: (down, up), down not beyond ``last``."""
    check_eta(eta)
    if eta == 0:
        return target, torch.zeros_like(target)
    rho, rho_s = (-log_snr).exp(), (-target).exp()
    up = torch.minimum(rho_s, eta * rho_s * (1 - (rho_s / rho) ** 2).sqrt())
    down = torch.minimum(-0.5 * (rho_s**2 - up**2).log(), target.clamp(min=last))
    return down, (rho_s**2 - (-2 * down).exp()).clamp(min=0).sqrt()


class Control:
    """Proportional-integral-derivative control of steps ``h`` (B,), in fp64 on the CPU (k-diffusion's).

    Args:
        order: of the error; accept_safety: least factor by which an accepted step may say that the next is to change.
    """

    def __init__(self, size: int, h: float, order: float, pcoeff: float, icoeff: float, dcoeff: float, accept_safety: float):
        self.h, self.accept_safety = torch.full((size,), h, dtype=torch.float64), accept_safety
        self.powers = [c / order for c in (pcoeff + icoeff + dcoeff, -pcoeff - 2 * dcoeff, dcoeff)]
        self.past: list[Tensor] = []  # inverse errors of accepted steps, latest first

    def judge(self, error: Tensor) -> Tensor:
        """Relative errors (B,) of steps h -> which are accepted (B,); h is that of the next attempt. ValueError for nan."""
        if error.isnan().any():
            raise ValueError("the size of a step cannot be found: the network gave nan")
        inverse = 1 / (error + 1e-8)
        past = [inverse, *(self.past or 2 * [inverse])]
        factor = 1 + torch.atan(math.prod(one**power for one, power in zip(past, self.powers, strict=True)) - 1)
        accept = factor >= self.accept_safety
        self.past = [torch.where(accept, new, old) for new, old in zip(past[:2], past[1:], strict=True)]
        self.h = self.h * factor
        return accept
