"""Samplers: pure functions (denoise, x, times, process) -> x.

``denoise(x (B,C,h,w), t (B,))`` gives a Prediction; ``times`` (N+1,) decrease and end where sigma = 0 (or where one
stops). ``noise(step, shape)`` gives the noise of a step, so that runs can be replayed; ``callback(step, t, x,
prediction)`` sees every step. alpha, sigma are at the current time, alpha_s, sigma_s at the next.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.parameterization import Denoise, Prediction
from ldm.process import Process

Callback = Callable[[int, float, Tensor, Prediction], None]
Noise = Callable[[int, tuple[int, ...]], Tensor]


def _walk(times: Tensor, process: Process):
    """(step, t, (alpha, sigma), (alpha_s, sigma_s), s) for every step, coefficients as fp64 numbers."""
    alphas, sigmas = (c.tolist() for c in process.exact(times.double()))
    for step, (i, j) in enumerate(pairwise(range(len(times)))):
        yield step, float(times[i]), (alphas[i], sigmas[i]), (alphas[j], sigmas[j]), float(times[j])


def _at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.float32)


def _draw(noise: Noise | None, step: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noise is None else noise(step, tuple(x.shape)).to(x)


def ddpm(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, callback: Callback | None = None,
         noise: Noise | None = None) -> Tensor:
    """Ancestral sampling with the posterior's variance (DDPM, 2006.11239, eq. 6 and 7): DDIM with eta = 1."""
    return ddim(denoise, x, times, process, eta=1.0, callback=callback, noise=noise)


def ddim(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, eta: float = 0.0,
         callback: Callback | None = None, noise: Noise | None = None) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16) for any alpha, sigma; eta = 0 is the deterministic one."""
    for step, t, (alpha, sigma), (alpha_s, sigma_s), _ in _walk(times, process):
        guess = denoise(x, _at(t, x))
        if callback is not None:
            callback(step, t, x, guess)
        # variance of q(x_s | x_t, x0): sigma_s^2 (1 - alpha^2 sigma_s^2 / (alpha_s^2 sigma^2))
        ratio = (alpha * sigma_s) / (alpha_s * sigma)
        std = eta * sigma_s * max(0.0, 1.0 - ratio**2) ** 0.5
        x = alpha_s * guess.x0 + max(0.0, sigma_s**2 - std**2) ** 0.5 * guess.eps
        if std > 0:
            x = x + std * _draw(noise, step, x)
    return x


def euler(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, callback: Callback | None = None,
          noise: Noise | None = None) -> Tensor:
    """Euler steps of the probability-flow ODE in x / alpha over sigma / alpha (2206.00364, algorithm 1 without its
    correction); in flow coordinates it is the same step."""
    return ddim(denoise, x, times, process, eta=0.0, callback=callback)


def heun(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, callback: Callback | None = None,
         noise: Noise | None = None) -> Tensor:
    """Heun's second-order steps (EDM, 2206.00364, algorithm 1); the last step, to sigma = 0, is Euler's.

    The ODE is straightened first: y = x / alpha over sigma / alpha, dy = eps; on processes that end in pure noise or
    next to it (``straight``) y = x / (alpha + sigma) over sigma / (alpha + sigma), dy = eps - x0.
    """
    def chart(alpha: float, sigma: float) -> tuple[float, float]:
        unit = alpha + sigma if process.straight else alpha
        return unit, sigma / unit

    def slope(guess: Prediction) -> Tensor:
        return guess.eps - guess.x0 if process.straight else guess.eps

    for step, t, here, there, s in _walk(times, process):
        (unit, tau), (unit_s, tau_s) = chart(*here), chart(*there)
        guess = denoise(x, _at(t, x))
        if callback is not None:
            callback(step, t, x, guess)
        d = slope(guess)
        y = x / unit + (tau_s - tau) * d
        if there[1] > 0:
            d = (d + slope(denoise(unit_s * y, _at(s, x)))) / 2
            y = x / unit + (tau_s - tau) * d
        x = unit_s * y
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *, callback: Callback | None = None,
             noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M), a multistep method on x0 over lambda = log(alpha / sigma) (2211.01095, algorithm 2).

    alpha_s (1 - e^-h) = alpha_s - alpha sigma_s / sigma, so nothing diverges where alpha or sigma is 0. Steps next to
    an infinite lambda are of first order.
    """
    lambdas = process.log_snr(times).tolist()
    before: Prediction | None = None
    for step, t, (alpha, sigma), (alpha_s, sigma_s), _ in _walk(times, process):
        guess = denoise(x, _at(t, x))
        if callback is not None:
            callback(step, t, x, guess)
        h = lambdas[step + 1] - lambdas[step]
        data = guess.x0
        if before is not None and sigma_s > 0:
            r = (lambdas[step] - lambdas[step - 1]) / h  # inf after a start from pure noise: first order
            data = data + (data - before.x0) / (2 * r)
        x = (sigma_s / sigma) * x + (alpha_s - alpha * sigma_s / sigma) * data
        before = guess
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m,
}
