"""Samplers: pure functions (denoise, x, times, process) -> x.

``denoise(x (B,C,h,w), t (B,))`` gives a Prediction; ``times`` (N+1,) decrease and end where sigma = 0 (or where one
stops), or are N pairs (from, to). ``noise(key, shape)`` gives the noise of a step, so that runs can be replayed; its key is
the number of the step, but ``dpmpp_sde`` draws twice and asks for keys 2 * step and 2 * step + 1. ``callback(step, t, x,
prediction)`` sees every step. Where lambda = log(alpha / sigma) is infinite (pure noise, clean data) steps are of first order.

``of``, where there is a choice: what is extrapolated, the "data" x0 (DPM-Solver++) or the "noise" eps (DPM-Solver).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from ldm.parameterization import Denoise, Prediction, target
from ldm.process import Process, Variance, log_variance, step_posterior, steps_of
from ldm.steps import (
    Callback,
    Chart,
    Control,
    Noise,
    Point,
    Predicted,
    ancestral,
    ancestral_lambda,
    ask,
    at,
    believed,
    churn,
    draw,
    exponential,
    finite_ends,
    in_lambda,
    integrals,
    is_pure,
    lagrange,
    move,
    noised,
    pair,
    single,
    turned,
    unified,
    walk,
    when,
    wide,
)
from ldm.times import blocks


def ddpm(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, variance: Variance | float = "small",
         clip_x0: bool = False, noisy_end: bool = False, callback: Callback | None = None,
         noise: Noise | None = None) -> Tensor:
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2 and eq. 6 and 7).

    Args:
        variance: of the steps: small, that of q(x_s | x_t, x0); large, that of q(x_t | x_s); a share of the way from small to
            large (LDM's v_posterior); learned or learned_range, as the network says (2102.09672, eq. 15).
        clip_x0: keep the guess of the data within [-1, 1], as in pixel space.
        noisy_end: the step to clean data has the noise of its variance too (diffusers, where that begins at t = 1).
    """
    for step, t, here, there, _ in walk(times, process):
        guess = ask(denoise, x, t, step, callback)
        learned = variance in ("learned", "learned_range")
        if guess.var is None and learned:
            raise ValueError(f"variance {variance!r}: this network does not say its variance; take 'small' or 'large'")
        posterior = step_posterior(*here, *there)
        x = posterior.x0 * (guess.x0.clamp(-1, 1) if clip_x0 else guess.x0) + posterior.xt * x
        if there.sigma > 0 or noisy_end:
            floor = posterior.beta if variance == "large" else 1e-20
            log = log_variance(posterior, guess.var if learned else None, variance, floor)
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
            eps = (x - here.alpha * x0) / here.sigma
        down, up = ancestral(here, there, eta)
        x = noised(there.alpha * x0 + down.sigma * eps, s_noise * up, noise, step)
    return x


def ddim_inversion(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, refine: int = 0,
                   asks: Literal["begin", "end"] = "begin", callback: Callback | None = None) -> Tensor:
    """From data to noise along the ODE: DDIM over increasing times (2010.02502, section 4.3).

    The slope at x_t stands for that at x_s, but at clean data, where there is no noise to be seen, the slope at s does.

    Args:
        refine: rounds of fixed-point iteration on x_s, which make this the exact inverse of ``ddim`` over the same times
            (2309.04907).
        asks: "end" tells the network the time s together with x_t (diffusers' DDIMInverse).
    """
    chart = Chart(process)
    for step, t, here, there, s in walk(times, process):
        seen = (x, t) if here.sigma > 0 else (chart(there)[0] * x / chart(here)[0], s)
        guess = ask(denoise, *(seen if asks == "begin" else (x, s)), step, callback)
        x_s = chart.jump(x, chart.slope(guess), here, there)
        for _ in range(refine):
            x_s = chart.jump(x, chart.slope(ask(denoise, x_s, s)), here, there)
        x = x_s
    return x


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


STABLE = {3: 6 / 11, 4: 3 / 10}  # h |eigenvalue| up to which Adams-Bashforth is stable; 1 for order 2


def orders_of(order: int, final_order: int | None, times: Tensor, process: Process) -> list[int]:
    """The order of each step of a multistep method on Chart: ``order`` as published, or in each of the last steps one less
    down to ``final_order``.

    None: as published on x / alpha over sigma / alpha, where nobody takes long steps; in flow coordinates not above what is
    stable. There a slope's derivative is up to 1 / tau, for data that are points, times the scale of guidance. So a step that
    leaves out a share of tau may make this share half of STABLE: 10 even steps are of order 4 4 4 4 3 3 3 2 2 2.
    """
    steps = steps_of(times)
    if order < 1:
        raise ValueError(f"order: {order}; a multistep method looks at one step or more")
    if final_order is not None or not process.straight:
        return [min(order, max(order if final_order is None else final_order, left)) for left in range(len(steps), 0, -1)]
    alpha, sigma = process.exact(steps)
    tau, tau_s = (sigma / (alpha + sigma)).unbind(1)
    return [max(k for k in range(1, order + 1) if k <= 2 or share <= STABLE.get(k, STABLE[4]) / 2)
            for share in (1 - tau_s / tau).tolist()]  # fmt: skip


def plms(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, start: Literal["euler", "prk"] = "euler",
         order: Literal[1, 2, 3, 4] = 4, final_order: int | None = None, of: Literal["slope", "v"] = "slope",
         callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Pseudo linear multistep: Adams-Bashforth slopes put into DDIM's step (PNDM, 2202.09778, eq. 9 and 12).

    Args:
        start: of the history: euler, one pseudo improved Euler step (Stable Diffusion's PLMS, diffusers' skip_prk_steps);
            prk, three pseudo Runge-Kutta steps of four calls each (the paper's eq. 13; "pndm" in SAMPLERS).
        order: of the slopes, 1 to 4; final_order: lowest order of the last steps, see ``orders_of``.
        of: what the slopes are of: the ODE of Chart; or v, as diffusers has it for networks that say v.
    """
    chart, slopes = Chart(process), []

    def slope(guess: Prediction, here: Point) -> Tensor:
        return chart.slope(guess) if of == "slope" else target(guess.x0, guess.eps, -here.sigma, here.alpha)

    jump, orders = chart.jump if of == "slope" else turned, orders_of(order, final_order, times, process)
    for done, (step, t, here, there, s) in enumerate(walk(times, process)):
        d = slope(ask(denoise, x, t, step, callback), here)
        slopes = [d, *slopes][: orders[step]]
        if start == "prk" and done < 3 and there.sigma > 0:
            middle, mid = (t + s) / 2, at(process, (t + s) / 2)
            second = slope(ask(denoise, jump(x, d, here, mid), middle), mid)
            third = slope(ask(denoise, jump(x, second, here, mid), middle), mid)
            fourth = slope(ask(denoise, jump(x, third, here, there), s), there)
            d = (d + 2 * second + 2 * third + fourth) / 6
        elif done == 0 and orders[step] > 1 and there.sigma > 0:
            d = (d + slope(ask(denoise, jump(x, d, here, there), s), there)) / 2
        else:
            d = sum(c * old for c, old in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))
        x = jump(x, d, here, there)
    return x


def euler(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, s_churn: float = 0.0, s_tmin: float = 0.0,
          s_tmax: float = math.inf, s_noise: float = 1.0, callback: Callback | None = None,
          noise: Noise | None = None) -> Tensor:
    """Euler steps of the probability-flow ODE in x / alpha over sigma / alpha (EDM, 2206.00364, algorithm 1 without its
    correction); in flow coordinates it is the same step, and without churn DDIM's.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: new noise at every step whose sigma / alpha is in [s_tmin, s_tmax], see ``heun``.
    """
    gamma = s_churn / len(steps_of(times))
    for step, t, here, there, _ in walk(times, process):
        x, t, here = churn(x, t, here, process, gamma, s_tmin, s_tmax, s_noise, partial(draw, noise, step, x))
        guess = ask(denoise, x, t, step, callback)
        x = there.alpha * guess.x0 + there.sigma * guess.eps
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
    chart, gamma = Chart(process), s_churn / len(steps_of(times))
    for step, t, here, there, s in walk(times, process):
        x, t, here = churn(x, t, here, process, gamma, s_tmin, s_tmax, s_noise, partial(draw, noise, step, x))
        d = chart.slope(ask(denoise, x, t, step, callback))
        if there.sigma > 0:
            d = (d + chart.slope(ask(denoise, chart.jump(x, d, here, there), s))) / 2
        x = chart.jump(x, d, here, there)
    return x


def dpm_2(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 0.0, s_churn: float = 0.0,
          s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, callback: Callback | None = None,
          noise: Noise | None = None) -> Tensor:
    """The slope of a step is that at its geometric middle: DPM-Solver-2 (2206.00927, algorithm 1) where the coordinates are
    x / alpha over sigma / alpha (k-diffusion's DPM2).

    Args:
        eta: share of new noise after every step ("dpm_2_ancestral" in SAMPLERS: 1).
        s_churn, s_tmin, s_tmax, s_noise: new noise before every step, see ``heun``; s_noise is for eta too.
    """
    chart, gamma = Chart(process), s_churn / len(steps_of(times))
    for step, t, here, there, _ in walk(times, process):
        x, t, here = churn(x, t, here, process, gamma, s_tmin, s_tmax, s_noise, partial(draw, noise, step, x))
        d = chart.slope(ask(denoise, x, t, step, callback))
        down, up = ancestral(here, there, eta)
        if down.sigma > 0:
            middle, mid = chart.between(here, down)
            d = chart.slope(ask(denoise, chart.jump(x, d, here, mid), middle))
        x = noised(chart.jump(x, d, here, down), s_noise * up, noise, step)
    return x


def lms(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: int = 4, final_order: int | None = None,
        callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Linear multistep (k-diffusion's LMS; Adams-Bashforth for uneven steps): the polynomial over tau through the last
    ``order`` slopes is integrated over the step, exactly.

    Args:
        final_order: lowest order of the last steps, see ``orders_of``.
    """
    chart, slopes, nodes = Chart(process), [], []
    orders = orders_of(order, final_order, times, process)
    for step, t, here, there, _ in walk(times, process):
        tau, tau_s = chart(here)[1], chart(there)[1]
        slopes = [chart.slope(ask(denoise, x, t, step, callback)), *slopes][: orders[step]]
        nodes = [tau, *nodes][: orders[step]]
        # in units of the step, where the integral runs from 0 to 1
        primitives = (basis.integ() for basis in lagrange([(node - tau) / (tau_s - tau) for node in nodes]))
        d = sum(float(primitive(1.0)) * slope for primitive, slope in zip(primitives, slopes, strict=True))
        x = chart.jump(x, d, here, there)
    return x


def deis(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: int = 3,
         basis: Literal["t", "log_rho"] = "t", final_order: int | None = None, callback: Callback | None = None,
         noise: Noise | None = None) -> Tensor:
    """DEIS, tAB (2204.13902, eq. 14 and 15): as ``lms``, but the polynomial is one in another variable u than tau.

    Args:
        basis: u: the process' time (the paper's tAB), or log(sigma / alpha) (diffusers).
        final_order: lowest order of the last steps, see ``orders_of``; 1: diffusers' lower_order_final.
    """
    chart, slopes, nodes = Chart(process), [], []
    orders = orders_of(order, final_order, times, process)

    def tau(u: Tensor) -> Tensor:
        alpha, sigma = process.exact(u) if basis == "t" else ((-u).exp(), torch.ones_like(u))
        return sigma / (alpha + sigma if process.straight else alpha)

    for step, t, here, there, s in walk(times, process):
        u, u_s = (t, s) if basis == "t" else (-here.log_snr, -there.log_snr)
        slopes = [chart.slope(ask(denoise, x, t, step, callback)), *slopes][: orders[step]]
        nodes = [u, *nodes][: orders[step]]
        known = [node for node in nodes if math.isfinite(node)] if math.isfinite(u_s) else []  # pure noise, clean data
        d, length = slopes[0], chart(there)[1] - chart(here)[1]
        if known:
            d = sum(weight / length * old for weight, old in zip(integrals(known, u_s, tau), slopes, strict=False))
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
        if here.alpha > 0 and down.sigma > 0:
            middle, mid = when(process, (here.log_snr + down.log_snr) / 2)
            data = ask(denoise, move(x, data, here, mid), middle).x0
        x = noised(move(x, data, here, down), s_noise * up, noise, step)
    return x


def dpmpp_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 1.0, s_noise: float = 1.0,
              r: float = 0.5, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++ (2S) with an ancestral step to each of its two points (k-diffusion's DPM-Solver++ SDE).

    Args:
        eta: share of new noise; 0 is DPM-Solver++(2S).
        s_noise: factor of the new noise.
        r: where in the step, in lambda, x0 is asked for a second time.
    """
    if not 0 < r <= 1:
        raise ValueError(f"r: {r}; the second point is a share of the step above 0, up to 1")
    for step, t, here, there, _ in walk(times, process):
        data = ask(denoise, x, t, step, callback).x0
        if here.alpha > 0 and there.sigma > 0:
            middle, mid = when(process, (1 - r) * here.log_snr + r * there.log_snr)
            down, up = ancestral(here, mid, eta)
            x_mid = noised(move(x, data, here, down), s_noise * up, noise, 2 * step)
            data = (1 - 1 / (2 * r)) * data + 1 / (2 * r) * ask(denoise, x_mid, middle).x0
        down, up = ancestral(here, there, eta)
        x = noised(move(x, data, here, down), s_noise * up, noise, 2 * step + 1)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, of: Predicted = "data",
             lower_order_final: bool = False, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M), a multistep method on x0 over lambda = log(alpha / sigma) (2211.01095, algorithm 2).

    Args:
        of: "noise" is the same on eps, diffusers' DPM-Solver of order 2 ("dpm_solver_2m" in SAMPLERS).
        lower_order_final: the last step is of first order even where it does not end at the data.
    """
    before, h_before, n = None, 0.0, len(steps_of(times))
    for step, t, here, there, _ in walk(times, process):
        log_snr, now = believed(ask(denoise, x, t, step, callback), here, of)
        kept, value, *_ = exponential(here, there, of)
        h, f = there.log_snr - log_snr, now
        if before is not None and there.sigma > 0 and not (lower_order_final and step == n - 1):
            r = h_before / h  # inf after a start from pure noise: first order
            f = now + (now - before) / (2 * r)
        x = kept * x + value * f
        before, h_before = now, h
    return x


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 1.0,
                 s_noise: float = 1.0, solver: Literal["midpoint", "heun"] = "midpoint", of: Predicted = "data",
                 lower_order_final: bool = False, callback: Callback | None = None,
                 noise: Noise | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M) (2211.01095, section 5): DPM-Solver++(2M) on the SDE of ``steps.exponential``.

    Args:
        eta, s_noise: factors of the noise; eta = 0, midpoint is DPM-Solver++(2M).
        solver: how the change of x0 since the last step counts: half of it, or its integral (k-diffusion, diffusers).
        of: "noise" is SDE-DPM-Solver(2M), without ++.
        lower_order_final: the last step is of first order even where it does not end at the data.
    """
    before, h_before, n = None, 0.0, len(steps_of(times))
    for step, t, here, there, _ in walk(times, process):
        log_snr, now = believed(ask(denoise, x, t, step, callback), here, of)
        kept, value, slope, _, up = exponential(here, there, of, eta)
        x, h = kept * x + value * now, there.log_snr - log_snr
        if before is not None and there.sigma > 0 and not (lower_order_final and step == n - 1):
            x = x + (value / 2 if solver == "midpoint" else slope) * (h / h_before) * (now - before)
        x = noised(x, s_noise * up, noise, step)
        before, h_before = now, h
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 1.0,
                 s_noise: float = 1.0, order: Literal[1, 2, 3] = 3, curvature: float | Literal["diffusers"] = 0.5,
                 solver: Literal["midpoint", "heun"] = "heun", of: Predicted = "data", lower_order_final: bool = False,
                 callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(3M) SDE (k-diffusion): the parabola through the last three x0 over lambda, integrated.

    Args:
        eta, s_noise: factors of the noise.
        curvature: factor of the parabola's second derivative: 1 makes the method with eta = 0 one of third order
            ("dpmpp_3m" in SAMPLERS); k-diffusion and DPM-Solver's authors take half of it. "diffusers": its SDE form, which
            has -1/2 in the weight where the others have +1/2.
        solver: of the steps of order 2, see ``dpmpp_2m_sde``; diffusers and DPM-Solver's authors take midpoint.
        of: "noise" with eta = 0 is DPM-Solver(3M), without ++.
        lower_order_final: the last steps are of order 2, 1.
    """
    past: list[tuple[float, Tensor]] = []  # (lambda, x0), latest first
    n = len(steps_of(times))
    for step, t, here, there, _ in walk(times, process):
        log_snr, now = believed(ask(denoise, x, t, step, callback), here, of)
        past = [(log_snr, now), *past][: min(order, n - step) if lower_order_final else order]
        kept, value, slope, bend, up = exponential(here, there, of, eta)
        x = kept * x + value * now
        if there.sigma > 0 and len(past) > 1:
            h = there.log_snr - log_snr
            rises = [(new - old) * (h / (a - b)) for (a, new), (b, old) in pairwise(past)]  # 0 from an infinite lambda
            if len(past) == 3:
                r_0, r_1 = (log_snr - past[1][0]) / h, (past[1][0] - past[2][0]) / h
                change = (rises[0] - rises[1]) / (r_0 + r_1)
                weight = bend / 2 - there.alpha if curvature == "diffusers" else curvature * bend
                x = x + slope * (rises[0] + r_0 * change) + weight * change
            else:
                x = x + (value / 2 if solver == "midpoint" else slope) * rises[0]
        x = noised(x, s_noise * up, noise, step)
    return x


def unipc(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: int = 2,
          variant: Literal["bh1", "bh2"] = "bh2", corrector: bool = True, of: Predicted = "data",
          lower_order_final: bool = True, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """UniPC (2302.04867, algorithms 1, UniC, and 2, UniP): a multistep predictor, corrected as soon as the next x0 is known;
    one call of the network, at the predicted x, serves both.

    Args:
        variant: B(h) is h or e^h - 1.
        corrector: False is UniP alone.
        of: "noise" is UniPC on eps (diffusers' predict_x0=False).
        lower_order_final: the last steps are of order 2, 1.
    """
    if order < 1:
        raise ValueError(f"order: {order}; a multistep method looks at one step or more")
    past, before, n = [], None, len(steps_of(times))
    for step, t, here, there, _ in walk(times, process):
        log_snr, now = believed(ask(denoise, x, t, step, callback), here, of)
        if corrector and before is not None:
            x = unified(*before, of, variant, new=now)
        if math.isinf(log_snr) or there.sigma == 0:
            kept, value, *_ = exponential(here, there, of)
            before, x = None, kept * x + value * now
            continue
        past = [(log_snr, now), *past][:order]
        before = x, here, there, past[: n - step] if lower_order_final else past
        x = unified(*before, of, variant)
    return x


def dpm_fast(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, order: Literal[1, 2, 3] = 3,
             of: Predicted = "noise", solver: Literal["paper", "midpoint", "heun"] = "paper",
             lower_order_final: bool = True, callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DPM-Solver-1, -2 and -3 in blocks of one, two and three calls (2206.00927, algorithms 1 and 2; DPM-Solver-fast).

    The network is asked at all of ``times``; inside of a block, every x is found from the block's first. With the times
    "dpm_fast" it is the paper's and k-diffusion's; with others diffusers' DPMSolverSinglestep.

    Args:
        order: length of the blocks, but for the last (see ``ldm.times.blocks``); of: "data" is DPM-Solver++.
        solver: how the change of F over a block counts, see ``steps.single``: "paper" is midpoint in blocks of two.
    """
    steps = list(walk(times, process))
    pure, clean = is_pure(steps[0][2], of), steps[-1][3].sigma == 0
    sizes = [1] * pure + blocks(len(steps) - pure, order, lower_order_final, clean)
    first = dict(zip(accumulate([0, *sizes]), sizes, strict=False))  # number of a block's first step -> its size
    for i, (step, t, here, there, _) in enumerate(steps):
        if i in first:
            begin, start, past, size = x, here, [], first[i]
        past.append(believed(ask(denoise, x, t, step, callback), here, of))
        rule = solver if solver != "paper" else "midpoint" if size == 2 else "slope"
        x = single(begin, start, there, past, of, rule)
    return x


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
        pcoeff, icoeff, dcoeff, accept_safety: of ``steps.Control``.
        eta, s_noise: share of new noise, and its factor.
        joint: one step for all images, by their mean error, as k-diffusion does.
    """
    (t, begin), (t_low, low), (t_high, high), end = finite_ends(times, process)
    x = move(x, ask(denoise, x, t).x0, begin, low) if t_low != t else x
    look, attempt = in_lambda(denoise, process, callback), 0
    control = Control(len(x), h_init, 1.5 if eta else order, pcoeff, icoeff, dcoeff, accept_safety)
    y, before, log_snr = x / low.alpha, x, torch.full((len(x),), low.log_snr, dtype=torch.float64)
    while (active := log_snr < high.log_snr - 1e-5).any():
        aim = torch.where(active, (log_snr + control.h).clamp(max=high.log_snr), log_snr + 1e-3)  # who is done repeats
        down, up = ancestral_lambda(log_snr, aim, eta, high.log_snr)
        lower, higher = pair(look, y, log_snr, look(y, log_snr, attempt), down - log_snr, order)
        alpha_s = wide(process.exact(process.when(aim))[0], y)
        allowed = (rtol * torch.maximum((alpha_s * lower).abs(), before.abs())).clamp(min=atol)
        error = (alpha_s * (lower - higher) / allowed).square().flatten(1).mean(1).cpu().double()
        accept = active & control.judge((error.mean().expand_as(error) if joint else error).sqrt())
        if eta:
            higher = higher + s_noise * wide(up, y) * draw(noise, attempt, y)
        chosen = wide(accept, y).bool()
        y, before = torch.where(chosen, higher, y), torch.where(chosen, alpha_s * lower, before)
        log_snr, attempt = torch.where(accept, aim, log_snr), attempt + 1
    x = high.alpha * y
    return move(x, ask(denoise, x, t_high).x0, high, end) if end != high else x


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
        x = noised(there.alpha * ((0.5 / norm) ** 2 * x + scaled / norm * guess.x0), there.sigma, noise, step)
    return x


def tcd(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, gamma: float = 0.3,
        callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """Strategic stochastic sampling by a trajectory consistency model (2402.19159, algorithm 4): to a time below the next
    along the ODE, and back to the next with new noise.

    Args:
        gamma: how far below, as a share of the next time (to a whole step, where that is one): 0 is DDIM, 1 goes to the
            data, or the first training step, as ``lcm`` does.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: {gamma}; it is a share of the next time, from 0 to 1")
    for step, t, _, there, s in walk(times, process):
        guess = ask(denoise, x, t, step, callback)
        low = (1 - gamma) * s if s > 0 else s
        low = at(process, math.floor(low) if process.t_data < 0 and s == int(s) else low)
        shrink = there.alpha / low.alpha
        x = shrink * (low.alpha * guess.x0 + low.sigma * guess.eps)
        x = noised(x, math.sqrt(max(0.0, there.sigma**2 - (shrink * low.sigma) ** 2)), noise, step)
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
dpm_solver_2m = partial(dpmpp_2m, of="noise")
dpmpp_2m_sde_heun = partial(dpmpp_2m_sde, solver="heun")
dpmpp_3m = partial(dpmpp_3m_sde, eta=0.0, curvature=1.0)
dpm_solver_3m = partial(dpmpp_3m, of="noise")
dpmpp_fast = partial(dpm_fast, of="data")

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm, "ddim": ddim, "plms": plms, "pndm": pndm, "euler": euler, "euler_ancestral": euler_ancestral,
    "heun": heun, "dpm_2": dpm_2, "dpm_2_ancestral": dpm_2_ancestral, "lms": lms, "deis": deis,
    "dpmpp_2s": dpmpp_2s, "dpmpp_2s_ancestral": dpmpp_2s_ancestral, "dpmpp_sde": dpmpp_sde, "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun, "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m_sde, "dpm_solver_2m": dpm_solver_2m, "dpm_solver_3m": dpm_solver_3m, "dpm_fast": dpm_fast,
    "dpmpp_fast": dpmpp_fast, "unipc": unipc, "dpm_adaptive": dpm_adaptive, "lcm": lcm, "tcd": tcd,
    "runge_kutta": runge_kutta, "reverse_sde": reverse_sde,
}  # fmt: skip
