"""Samplers: pure functions (denoise, x, times, process) -> x.

``denoise(x (B,C,h,w), t (B,))`` gives a Prediction; ``times`` (N+1,) decrease and end where sigma = 0 (or where one
stops). ``noise(key, shape)`` gives the noise of a step, so that runs can be replayed; its key is the number of the step,
but ``dpmpp_sde`` draws twice and asks for keys 2 * step and 2 * step + 1. ``callback(step, t, x, prediction)`` sees every
step. Where lambda = log(alpha / sigma) is infinite (pure noise, clean data) steps are of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ldm.parameterization import Denoise, Prediction
from ldm.process import Process, Variance, log_variance, step_posterior
from ldm.steps import (
    Callback,
    Chart,
    Noise,
    Point,
    ancestral,
    ask,
    churn,
    draw,
    lagrange,
    log_snr_of,
    move,
    sde,
    walk,
    when,
    wide,
)


def ddpm(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, variance: Variance = "small",
         clip_x0: bool = False, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2 and eq. 6 and 7).

    Args:
        variance: of the steps: small, that of q(x_s | x_t, x0); large, that of q(x_t | x_s); learned or learned_range, as
            the network says (2102.09672, eq. 15).
        clip_x0: keep the guess of the data within [-1, 1], as in pixel space.
    """
    for step, t, here, there, _ in walk(times, process):
        guess = ask(denoise, x, t, step, callback)
        if guess.var is None and variance.startswith("learned"):
            raise ValueError(f"variance {variance!r}: this network does not say its variance; take 'small' or 'large'")
        posterior = step_posterior(*here, *there)
        x = posterior.x0 * (guess.x0.clamp(-1, 1) if clip_x0 else guess.x0) + posterior.xt * x
        if there[1] > 0:
            log = log_variance(posterior, guess.var if variance.startswith("learned") else None, variance)
            x = x + (log / 2).exp().to(x) * draw(noise, step, x)
    return x


def ddim(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 0.0, s_noise: float = 1.0,
         clip_x0: bool = False, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16) for any alpha, sigma; eta = 0 is the deterministic one.

    Args:
        s_noise: factor of the new noise.
        clip_x0: keep the guess of the data within [-1, 1], and take the noise that goes with it, as Improved DDPM does.
    """
    for step, t, here, there, _ in walk(times, process):
        guess = ask(denoise, x, t, step, callback)
        x0, eps = guess.x0, guess.eps
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = (x - here[0] * x0) / here[1]
        down, up = ancestral(here, there, eta)
        x = there[0] * x0 + down * eps
        if up > 0:
            x = x + s_noise * up * draw(noise, step, x)
    return x


def ddim_inversion(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, refine: int = 0,
                   callback: Callback | None = None) -> Tensor:
    """From data to noise along the ODE: DDIM over increasing times (2010.02502, section 4.3).

    The slope at x_t stands for that at x_s, but at clean data, where there is no noise to be seen, the slope at s does.

    Args:
        refine: rounds of fixed-point iteration on x_s, which make this the exact inverse of ``ddim`` over the same times
            (2309.04907).
    """
    chart = Chart(process)
    for step, t, here, there, s in walk(times, process):
        guess = ask(denoise, *((x, t) if here[1] > 0 else (chart(*there)[0] * x / chart(*here)[0], s)), step, callback)
        x_s = chart.jump(x, chart.slope(guess), here, there)
        for _ in range(refine):
            x_s = chart.jump(x, chart.slope(ask(denoise, x_s, s)), here, there)
        x = x_s
    return x


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, start: Literal["euler", "prk"] = "euler",
         callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Pseudo linear multistep: Adams-Bashforth slopes put into DDIM's step (PNDM, 2202.09778, eq. 12).

    Args:
        start: of the history: euler, one pseudo improved Euler step (Stable Diffusion's PLMS, diffusers' skip_prk_steps);
            prk, three pseudo Runge-Kutta steps of four calls each (the paper's eq. 13; "pndm" in SAMPLERS).
    """
    chart, slopes = Chart(process), []
    for step, t, here, there, s in walk(times, process):
        d = chart.slope(ask(denoise, x, t, step, callback))
        slopes = [d, *slopes][:4]
        if start == "prk" and len(slopes) < 4 and there[1] > 0:
            t_mid, mid = (t + s) / 2, tuple(float(c) for c in process.exact(torch.tensor((t + s) / 2, dtype=torch.float64)))
            second = chart.slope(ask(denoise, chart.jump(x, d, here, mid), t_mid))
            third = chart.slope(ask(denoise, chart.jump(x, second, here, mid), t_mid))
            fourth = chart.slope(ask(denoise, chart.jump(x, third, here, there), s))
            d = (d + 2 * second + 2 * third + fourth) / 6
        elif len(slopes) == 1 and there[1] > 0:
            d = (d + chart.slope(ask(denoise, chart.jump(x, d, here, there), s))) / 2
        else:
            d = sum(c * old for c, old in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))
        x = chart.jump(x, d, here, there)
    return x


def euler(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, s_churn: float = 0.0, s_tmin: float = 0.0,
          s_tmax: float = math.inf, s_noise: float = 1.0, callback: Callback | None = None,
          noise: Noise | None = None) -> Tensor:
    """Euler steps of the probability-flow ODE in x / alpha over sigma / alpha (EDM, 2206.00364, algorithm 1 without its
    correction); in flow coordinates it is the same step, and without churn DDIM's.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: new noise at every step whose sigma / alpha is in [s_tmin, s_tmax], see ``heun``.
    """
    for step, t, here, there, _ in walk(times, process):
        x, t, here = churn(x, t, here, process, s_churn / (len(times) - 1), s_tmin, s_tmax, s_noise,
                            partial(draw, noise, step, x))  # fmt: skip
        guess = ask(denoise, x, t, step, callback)
        x = there[0] * guess.x0 + there[1] * guess.eps
    return x


def heun(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, s_churn: float = 0.0, s_tmin: float = 0.0,
         s_tmax: float = math.inf, s_noise: float = 1.0, callback: Callback | None = None,
         noise: Noise | None = None) -> Tensor:
    """Heun's second-order steps (EDM, 2206.00364, algorithm 2; without churn algorithm 1), in the coordinates of Chart;
    the last step, to sigma = 0, is Euler's.

    Args:
        s_churn: noise is first raised by the factor 1 + s_churn / N, at most sqrt(2), ...
        s_tmin, s_tmax: ... where sigma / alpha is within these, ...
        s_noise: ... with new noise of this deviation.
    """
    chart = Chart(process)
    for step, t, here, there, s in walk(times, process):
        x, t, here = churn(x, t, here, process, s_churn / (len(times) - 1), s_tmin, s_tmax, s_noise,
                            partial(draw, noise, step, x))  # fmt: skip
        d = chart.slope(ask(denoise, x, t, step, callback))
        if there[1] > 0:
            d = (d + chart.slope(ask(denoise, chart.jump(x, d, here, there), s))) / 2
        x = chart.jump(x, d, here, there)
    return x


def dpm_2(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 0.0, s_churn: float = 0.0,
          s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, callback: Callback | None = None,
          noise: Noise | None = None) -> Tensor:
    """The slope of a step is that at its geometric middle (k-diffusion's DPM2, after DPM-Solver-2, 2206.00927, algorithm
    1).

    Args:
        eta: share of new noise after every step ("dpm_2_ancestral" in SAMPLERS: 1).
        s_churn, s_tmin, s_tmax, s_noise: new noise before every step, see ``heun``; s_noise is for eta too.
    """
    chart = Chart(process)
    for step, t, here, there, _ in walk(times, process):
        x, t, here = churn(x, t, here, process, s_churn / (len(times) - 1), s_tmin, s_tmax, s_noise,
                            partial(draw, noise, step, x))  # fmt: skip
        d = chart.slope(ask(denoise, x, t, step, callback))
        down, up = ancestral(here, there, eta)
        there = there[0], down
        if down > 0:
            t_mid, mid = chart.between(here, there)
            d = chart.slope(ask(denoise, chart.jump(x, d, here, mid), t_mid))
        x = chart.jump(x, d, here, there)
        if up > 0:
            x = x + s_noise * up * draw(noise, step, x)
    return x


def lms(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: int = 4,
        callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Linear multistep (k-diffusion's LMS; Adams-Bashforth for uneven steps): the polynomial over tau through the last
    ``order`` slopes is integrated over the step, exactly."""
    chart, slopes, nodes = Chart(process), [], []
    for step, t, here, there, _ in walk(times, process):
        tau, tau_s = chart(*here)[1], chart(*there)[1]
        slopes = [chart.slope(ask(denoise, x, t, step, callback)), *slopes][:order]
        nodes = [tau, *nodes][:order]
        # in units of the step, where the integral runs from 0 to 1
        primitives = (basis.integ() for basis in lagrange([(node - tau) / (tau_s - tau) for node in nodes]))
        d = sum(float(primitive(1.0)) * slope for primitive, slope in zip(primitives, slopes, strict=True))
        x = chart.jump(x, d, here, there)
    return x


def deis(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: int = 3,
         basis: Literal["t", "log_rho"] = "t", lower_order_final: bool = False, callback: Callback | None = None,
         noise: Noise | None = None) -> Tensor:
    """DEIS, tAB (2204.13902, eq. 14 and 15): as ``lms``, but the polynomial is one in another variable u than tau.

    Its weights, the integrals of L_j(u) dtau, are L_j tau at both ends less that of L_j'(u) tau(u) du, by 16 Gauss points.

    Args:
        basis: u: the process' time (the paper's tAB), or log(sigma / alpha) (diffusers).
        lower_order_final: the last steps are of order 2, 1.
    """
    chart, slopes, nodes = Chart(process), [], []
    points, shares = leggauss(16)
    for step, t, here, there, s in walk(times, process):
        u, u_s = (t, s) if basis == "t" else (-log_snr_of(*here), -log_snr_of(*there))
        slopes, nodes = [chart.slope(ask(denoise, x, t, step, callback)), *slopes][:order], [u, *nodes][:order]
        tau, tau_s = chart(*here)[1], chart(*there)[1]
        last = min(len(nodes), len(times) - 1 - step if lower_order_final else order)
        last = next((j for j in range(last) if math.isinf(nodes[j])), last) if math.isfinite(u_s) else 0
        weights = [tau_s - tau]
        if last > 1:
            at = torch.from_numpy((u + u_s) / 2 + (u_s - u) / 2 * points)
            alpha, sigma = process.exact(at) if basis == "t" else ((-at).exp(), torch.ones_like(at))
            taus = (sigma / (alpha + sigma if process.straight else alpha)).numpy()
            weights = [float(L(u_s) * tau_s - L(u) * tau - (u_s - u) / 2 * (shares * L.deriv()(at.numpy()) * taus).sum())
                       for L in lagrange(nodes[:last])]  # fmt: skip
        d = sum(weight * slope for weight, slope in zip(weights, slopes, strict=False)) / (tau_s - tau)
        x = chart.jump(x, d, here, there)
    return x


def dpmpp_2s(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 0.0, s_noise: float = 1.0,
             callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2S) (2211.01095, algorithm 1 with r = 1/2): x0 of a step is that at its middle in lambda.

    Args:
        eta: share of new noise ("dpmpp_2s_ancestral" in SAMPLERS: 1).
        s_noise: factor of the new noise.
    """
    for step, t, here, there, _ in walk(times, process):
        data = ask(denoise, x, t, step, callback).x0
        down, up = ancestral(here, there, eta)
        there = there[0], down
        if here[0] > 0 and down > 0:
            t_mid, mid = when(process, (log_snr_of(*here) + log_snr_of(*there)) / 2)
            data = ask(denoise, move(x, data, here, mid), t_mid).x0
        x = move(x, data, here, there)
        if up > 0:
            x = x + s_noise * up * draw(noise, step, x)
    return x


def dpmpp_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 1.0, s_noise: float = 1.0,
              r: float = 0.5, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++ (2S) with an ancestral step to each of its two points (k-diffusion's DPM-Solver++ SDE).

    Args:
        eta: share of new noise; 0 is DPM-Solver++(2S).
        s_noise: factor of the new noise.
        r: where in the step, in lambda, x0 is asked for a second time.
    """
    for step, t, here, there, _ in walk(times, process):
        data = ask(denoise, x, t, step, callback).x0
        if here[0] > 0 and there[1] > 0:
            t_mid, mid = when(process, (1 - r) * log_snr_of(*here) + r * log_snr_of(*there))
            down, up = ancestral(here, mid, eta)
            x_mid = move(x, data, here, (mid[0], down)) + s_noise * up * draw(noise, 2 * step, x)
            data = (1 - 1 / (2 * r)) * data + 1 / (2 * r) * ask(denoise, x_mid, t_mid).x0
        down, up = ancestral(here, there, eta)
        x = move(x, data, here, (there[0], down))
        if up > 0:
            x = x + s_noise * up * draw(noise, 2 * step + 1, x)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, lower_order_final: bool = False,
             callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M), a multistep method on x0 over lambda = log(alpha / sigma) (2211.01095, algorithm 2).

    Args:
        lower_order_final: the last step is of first order even where it does not end at the data.
    """
    before, h_before = None, 0.0
    for step, t, here, there, _ in walk(times, process):
        guess = ask(denoise, x, t, step, callback)
        h, data = log_snr_of(*there) - log_snr_of(*here), guess.x0
        if before is not None and there[1] > 0 and not (lower_order_final and step == len(times) - 2):
            r = h_before / h  # inf after a start from pure noise: first order
            data = data + (data - before) / (2 * r)
        x = move(x, data, here, there)
        before, h_before = guess.x0, h
    return x


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 1.0,
                 s_noise: float = 1.0, solver: Literal["midpoint", "heun"] = "midpoint",
                 lower_order_final: bool = False, callback: Callback | None = None,
                 noise: Noise | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M) (2211.01095, section 5): DPM-Solver++(2M) on the SDE of ``steps.sde``.

    Args:
        eta, s_noise: factors of the noise; eta = 0, midpoint is DPM-Solver++(2M).
        solver: how the change of x0 since the last step counts: half of it, or its integral (k-diffusion, diffusers).
        lower_order_final: the last step is of first order even where it does not end at the data.
    """
    before, h_before = None, 0.0
    for step, t, here, there, _ in walk(times, process):
        data = ask(denoise, x, t, step, callback).x0
        h, h_eta = log_snr_of(*there) - log_snr_of(*here), (1 + eta) * (log_snr_of(*there) - log_snr_of(*here))
        kept, gain, up = sde(x, here, there, eta)
        x = kept + gain * data
        if before is not None and there[1] > 0 and not (lower_order_final and step == len(times) - 2):
            x = x + (gain / 2 if solver == "midpoint" else there[0] - gain / h_eta) * (h / h_before) * (data - before)
        if up > 0:
            x = x + s_noise * up * draw(noise, step, x)
        before, h_before = data, h
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 1.0,
                 s_noise: float = 1.0, curvature: float = 0.5, solver: Literal["midpoint", "heun"] = "heun",
                 lower_order_final: bool = False, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(3M) SDE (k-diffusion): the parabola through the last three x0 over lambda, integrated.

    Args:
        eta, s_noise: factors of the noise.
        curvature: factor of the parabola's second derivative: 1 makes the method with eta = 0 one of third order
            ("dpmpp_3m" in SAMPLERS); k-diffusion, diffusers and DPM-Solver's authors take half of it.
        solver: of the steps of order 2, see ``dpmpp_2m_sde``; diffusers and DPM-Solver's authors take midpoint.
        lower_order_final: the last steps are of order 2, 1.
    """
    past: list[tuple[float, Tensor]] = []  # (lambda, x0), latest first
    for step, t, here, there, _ in walk(times, process):
        data = ask(denoise, x, t, step, callback).x0
        past = [(log_snr_of(*here), data), *past][: min(3, len(times) - 1 - step) if lower_order_final else 3]
        kept, gain, up = sde(x, here, there, eta)
        x = kept + gain * data
        if there[1] > 0 and len(past) > 1:
            h = log_snr_of(*there) - past[0][0]
            slopes = [(now - then) * (h / (a - b)) for (a, now), (b, then) in pairwise(past)]  # 0 from an infinite lambda
            first, second = slopes[0], None
            if len(past) == 3:
                r0, r1 = (past[0][0] - past[1][0]) / h, (past[1][0] - past[2][0]) / h
                first = slopes[0] + (slopes[0] - slopes[1]) * (r0 / (r0 + r1))
                second = 2 * curvature * (slopes[0] - slopes[1]) / (r0 + r1)
            h_eta = (1 + eta) * h
            phi_2 = there[0] - gain / h_eta
            x = x + (gain / 2 if second is None and solver == "midpoint" else phi_2) * first
            if second is not None:
                x = x - (phi_2 / h_eta - there[0] / 2) * second
        if up > 0:
            x = x + s_noise * up * draw(noise, step, x)
    return x


def _unified(x: Tensor, here: Point, there: Point, past: list[tuple[float, Tensor]], variant: str,
             new: Tensor | None = None) -> Tensor:
    """UniP of order len(past); with x0 at the step's end, ``new``, UniC (UniPC, 2302.04867, theorem 3.1, on x0).

    past: (lambda, x0) of this and earlier steps, latest first.
    """
    (log_snr, data), h = past[0], log_snr_of(*there) - past[0][0]
    nodes = [(other - log_snr, x0 - data) for other, x0 in past[1:]] + ([] if new is None else [(h, new - data)])
    x_s = move(x, data, here, there)
    if not nodes:
        return x_s
    scale = -h if variant == "bh1" else math.expm1(-h)  # B(h)
    phi, wanted = math.expm1(-h) / -h - 1, []
    for k in range(1, len(nodes) + 1):
        wanted.append(math.factorial(k) * phi / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    ratios = torch.tensor([gap / h for gap, _ in nodes], dtype=torch.float64)
    powers = torch.vander(ratios, increasing=True).T
    weights = [0.5] if len(nodes) == 1 else torch.linalg.solve(powers, powers.new_tensor(wanted)).tolist()
    return x_s - there[0] * scale * sum(weight * h / gap * change for weight, (gap, change) in zip(weights, nodes, strict=True))


def unipc(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: int = 2,
          variant: Literal["bh1", "bh2"] = "bh2", corrector: bool = True, lower_order_final: bool = True,
          callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """UniPC (2302.04867, algorithms 1, UniC, and 2, UniP): a multistep predictor, corrected as soon as the next x0 is known;
    one call of the network, at the predicted x, serves both.

    Args:
        variant: B(h) is h or e^h - 1.
        corrector: False is UniP alone.
        lower_order_final: the last steps are of order 2, 1.
    """
    past, step_before = [], None
    for step, t, here, there, _ in walk(times, process):
        data = ask(denoise, x, t, step, callback).x0
        if corrector and step_before is not None:
            x = _unified(*step_before, variant, new=data)
        if here[0] == 0 or there[1] == 0:
            step_before, x = None, move(x, data, here, there)
            continue
        past = [(log_snr_of(*here), data), *past][:order]
        step_before = x, here, there, past[: len(times) - 1 - step] if lower_order_final else past
        x = _unified(*step_before, variant)
    return x


def _pair(eps: Callable[[Tensor, Tensor], Tensor], y: Tensor, d: Tensor, log_snr: Tensor, h: Tensor,
          order: int) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1 and -2, or -2 and -3, over a step h (B,) of lambda (2206.00927, eq. 3.7, algorithms 1 and 2) on
    y = x / alpha with slope d = eps -> y by the lower and by the higher order."""
    def to(share: float, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """y at this share of the step: y - e^-lambda times the sum of weight (B,) * slope (B,C,h,w)."""
        return y - wide((-log_snr - share * h).exp(), y) * sum(wide(weight, y) * slope for weight, slope in terms)

    grown, half, third, two = (torch.expm1(share * h) for share in (1, 1 / 2, 1 / 3, 2 / 3))
    if order == 2:
        change = eps(to(1 / 2, (half, d)), log_snr + h / 2) - d
        return to(1, (grown, d)), to(1, (grown, d), (grown, change))
    change = eps(to(1 / 3, (third, d)), log_snr + h / 3) - d
    later = eps(to(2 / 3, (two, d), (2 * (two / (2 / 3 * h) - 1), change)), log_snr + 2 / 3 * h) - d
    return to(1, (grown, d), (1.5 * grown, change)), to(1, (grown, d), (1.5 * (grown / h - 1), later))


FINITE = 7.0  # where lambda is infinite at an end, dpm_adaptive works within [-7, 7]: sigma / alpha from 1100 to 1 / 1100


def dpm_adaptive(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: Literal[2, 3] = 3,
                 rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05, pcoeff: float = 0.0,
                 icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0,
                 s_noise: float = 1.0, joint: bool = False, callback: Callback | None = None,
                 noise: Noise | None = None) -> Tensor:
    """DPM-Solver-12 or -23 with steps of its own (2206.00927, appendix C; the control is k-diffusion's), from times[0] to
    times[-1]; what lies between is not used. Every image has steps of its own; ``callback`` and ``noise`` count attempts.

    Args:
        rtol, atol: accepted error of a step: relative to x, and at least.
        h_init: first step in lambda.
        pcoeff, icoeff, dcoeff, accept_safety: of the proportional-integral-derivative control.
        eta, s_noise: share of new noise, and its factor.
        joint: one step for all images, by their mean error, as k-diffusion does.
    """
    start, stop = zip(*(c[[0, -1]].tolist() for c in process.exact(times.double())), strict=True)
    low, high = max(log_snr_of(*start), -FINITE), log_snr_of(*stop)
    if high == math.inf:
        high = min(float(process.log_snr(torch.tensor(process.t_min))), FINITE)
    y = move(x, ask(denoise, x, float(times[0])).x0, start, when(process, low)[1]) if low > log_snr_of(*start) else x
    before, y = y, y / when(process, low)[1][0]
    log_snr, h = (torch.full((len(x),), value, dtype=torch.float64) for value in (low, h_init))
    weights = [b / (1.5 if eta else order) for b in (pcoeff + icoeff + dcoeff, -pcoeff - 2 * dcoeff, dcoeff)]
    history, attempt = None, 0

    def look(y: Tensor, log_snr: Tensor, callback: Callback | None = None) -> Tensor:
        t = process.when(log_snr)
        x_t = wide(process.exact(t)[0], y) * y
        guess = denoise(x_t, t.to(y.device, torch.promote_types(y.dtype, torch.float32)))
        if callback is not None:
            callback(attempt, float(t.max()), x_t, guess)
        return guess.eps

    while (active := log_snr < high - 1e-5).any():
        target = torch.where(active, (log_snr + h).clamp(max=high), log_snr + 1e-3)  # whoever is done repeats a dummy step
        rho, rho_s = (-log_snr).exp(), (-target).exp()
        up = torch.minimum(rho_s, eta * rho_s * (1 - (rho_s / rho) ** 2).sqrt())
        down = -0.5 * (rho_s**2 - up**2).log()
        down = torch.where(active, down.clamp(max=high), down) if eta else target
        up = (rho_s**2 - (-2 * down).exp()).clamp(min=0).sqrt()
        lower, higher = _pair(look, y, look(y, log_snr, callback), log_snr, down - log_snr, order)
        alpha_s = wide(process.exact(process.when(target))[0], y)
        allowed = (rtol * torch.maximum((alpha_s * lower).abs(), before.abs())).clamp(min=atol)
        error = (alpha_s * (lower - higher) / allowed).square().flatten(1).mean(1).double().cpu()
        inverse = 1 / ((error.mean().expand_as(error) if joint else error).sqrt() + 1e-8)
        history = [inverse, *(history or 3 * [inverse])[1:]]
        factor = 1 + torch.atan(math.prod(past**weight for past, weight in zip(history, weights, strict=True)) - 1)
        accept = active & (factor >= accept_safety)
        history = [inverse, *(torch.where(accept, new, old) for new, old in pairwise(history))]
        if eta:
            higher = higher + s_noise * wide(up, y) * draw(noise, attempt, y)
        chosen = wide(accept, y).bool()
        y, before = torch.where(chosen, higher, y), torch.where(chosen, alpha_s * lower, before)
        log_snr, h, attempt = torch.where(accept, target, log_snr), h * factor, attempt + 1
    t, here = when(process, high)
    x = here[0] * y
    return move(x, ask(denoise, x, t).x0, here, stop) if log_snr_of(*stop) > high else x


def lcm(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, scaling: float = 10.0,
        callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Multistep sampling by a consistency model (2303.01469, algorithm 1; LCM, 2310.04378, algorithm 3): to the data and
    back to less noise, with new noise each time.

    Args:
        scaling: LCM's of the time (0..1000) in c_skip = 0.5^2 / (t^2 + 0.5^2), c_out = t / sqrt(t^2 + 0.5^2), which make the
            model the identity where t = 0 (section 3 and appendix).
    """
    for step, t, _, there, _ in walk(times, process):
        guess = ask(denoise, x, t, step, callback)
        scaled = scaling * float(process.time(torch.tensor(t, dtype=torch.float64)))
        norm = math.hypot(scaled, 0.5)
        x = there[0] * ((0.5 / norm) ** 2 * x + scaled / norm * guess.x0)
        if there[1] > 0:
            x = x + there[1] * draw(noise, step, x)
    return x


RULES: dict[str, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {  # where, from what, weights
    "euler": ((0,), ((),), (1,)), "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)), "heun3": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": ((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}  # fmt: skip


def runge_kutta(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *,
                method: Literal["euler", "midpoint", "heun2", "heun3", "rk4"] = "heun2", to_the_end: bool = False,
                callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """The probability-flow ODE dx = (alpha' x0 + sigma' eps) du over u, the share of the way to pure noise, by an explicit
    Runge-Kutta rule (SiT, 2401.08740; torchdiffeq's names, "rk4" is Kutta's 3/8 rule). Increasing times lead to noise.

    Args:
        to_the_end: ask the network at clean data too, which those that say a velocity (flow, v) know; else the last step
            of rules that would is Euler's.
    """
    for step, t, _, there, s in walk(times, process):
        blind = there[1] == 0 and not to_the_end and 1 in RULES[method][0]
        nodes, rows, weights = RULES["euler" if blind else method]
        h, slopes = process.share(s) - process.share(t), []
        for node, row in zip(nodes, rows, strict=True):
            at, y = t + node * (s - t), x + h * sum(a * slope for a, slope in zip(row, slopes, strict=True))
            guess = ask(denoise, y, at, step, None if slopes else callback)
            slopes.append(_moves(guess, _rates(process, at)))
        x = x + h * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return x


def _rates(process: Process, t: float) -> Point:
    return tuple(float(rate) for rate in process.rates(torch.tensor(t, dtype=torch.float64)))


def _moves(guess: Prediction, rates: Point) -> Tensor:
    """dx / du."""
    return rates[0] * guess.x0 + rates[1] * guess.eps


DIFFUSIONS: dict[str, Callable[[float, float, float, float], float]] = {  # (norm, share u, sigma, that of the process)
    "constant": lambda norm, u, sigma, own: norm, "sbdm": lambda norm, u, sigma, own: norm * own,
    "sigma": lambda norm, u, sigma, own: norm * sigma, "linear": lambda norm, u, sigma, own: norm * u,
    "decreasing": lambda norm, u, sigma, own: 0.25 * (1 - norm * math.cos(math.pi * u)) ** 2,
    "increasing_decreasing": lambda norm, u, sigma, own: norm * math.sin(math.pi * u) ** 2,
}  # fmt: skip


def diffusion_of(form: str, process: Process, t: float, norm: float = 1.0) -> float:
    """w at t (SiT, 2401.08740). "sbdm" is that of the process itself, sigma sigma' - sigma^2 alpha' / alpha, half of g^2 of
    2011.13456; it grows without limit towards pure noise, begin below it. At pure noise itself it is put to 0 here."""
    alpha, sigma = (float(c) for c in process.exact(torch.tensor(t, dtype=torch.float64)))
    alpha_rate, sigma_rate = _rates(process, t)
    own = sigma * (sigma_rate - sigma * alpha_rate / alpha) if alpha > 1e-9 else 0.0
    return DIFFUSIONS[form](norm, process.share(t), sigma, own)


def reverse_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, method: Literal["euler", "heun"] = "euler",
                diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"] = "sigma",
                norm: float = 1.0, last_step: Literal["mean", "tweedie", "euler"] | None = "mean",
                callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """The SDE with the marginals of the probability-flow ODE and as much noise as one likes (SiT, 2401.08740), walked
    towards the data: dx = (-x' + w score) dv + sqrt(2 w) dW, v = 1 - u, u the share of the way to pure noise, x' = alpha' x0 +
    sigma' eps, score = -eps / sigma. w is half of the paper's, as in its code.

    Args:
        method: Euler-Maruyama, or stochastic Heun (the noise first, then Heun's step).
        diffusion, norm: w(u) and its factor, see ``diffusion_of``.
        last_step: of the step that ends at clean data: mean, without noise; tweedie, the network's x0; euler, of the ODE;
            None, like the others.
    """
    def drift(guess: Prediction, t: float, sigma: float, w: float) -> Tensor:
        return -_moves(guess, _rates(process, t)) - w / sigma * guess.eps

    for step, t, here, there, s in walk(times, process):
        h, w = process.share(t) - process.share(s), diffusion_of(diffusion, process, t, norm)
        last = last_step if there[1] == 0 else None
        new = 0.0 if last else math.sqrt(2 * w * h) * draw(noise, step, x)
        if method == "heun":
            x, new = x + new, 0.0
        guess = ask(denoise, x, t, step, callback)
        if last == "tweedie":
            return guess.x0
        slope = drift(guess, t, here[1], 0.0 if last == "euler" else w)
        if method == "heun" and there[1] > 0:
            after = ask(denoise, x + h * slope, s)
            slope = (slope + drift(after, s, there[1], diffusion_of(diffusion, process, s, norm))) / 2
        x = x + h * slope + new
    return x


euler_ancestral = partial(ddim, eta=1.0)  # k-diffusion's is DDIM with all the noise of the posterior
pndm = partial(plms, start="prk")
dpm_2_ancestral = partial(dpm_2, eta=1.0)
dpmpp_2s_ancestral = partial(dpmpp_2s, eta=1.0)
dpmpp_2m_sde_heun = partial(dpmpp_2m_sde, solver="heun")
dpmpp_3m = partial(dpmpp_3m_sde, eta=0.0, curvature=1.0)

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm, "ddim": ddim, "plms": plms, "pndm": pndm, "euler": euler, "euler_ancestral": euler_ancestral,
    "heun": heun, "dpm_2": dpm_2, "dpm_2_ancestral": dpm_2_ancestral, "lms": lms, "deis": deis,
    "dpmpp_2s": dpmpp_2s, "dpmpp_2s_ancestral": dpmpp_2s_ancestral, "dpmpp_sde": dpmpp_sde, "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun, "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m_sde, "unipc": unipc, "dpm_adaptive": dpm_adaptive, "lcm": lcm,
    "runge_kutta": runge_kutta, "reverse_sde": reverse_sde,
}  # fmt: skip
