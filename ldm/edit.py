"""Posterior sampling: samples of p(x) r(x), the model times a second distribution (1503.03585, section 2.5).

What wraps a denoise function works with every sampler; ``repaint`` wraps a sampler. r(x) may be known pixels
(``replace``, ``repaint``), or any function with a gradient: of x_t itself (``guidance.classifier``), or of the data that
the network sees in x_t (``product``, ``dps``).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise

import torch
from torch import Tensor

from ldm.guidance import coefficients, of_data, shift_mean, step_from, tilt
from ldm.parameterization import Denoise, Prediction
from ldm.process import Process, step_posterior, steps_of

Sampler = Callable[..., Tensor]  # (denoise, x, times, process, *, callback, noise) -> x
LogLikelihood = Callable[[Tensor, Tensor], Tensor]  # (x0 (B,C,h,w), its variance (B,1,1,1)) -> log r, (B,)


def img2img(x0: Tensor, eps: Tensor, times: Tensor, process: Process, strength: float,
            ahead: int = 0) -> tuple[Tensor, Tensor]:
    """SDEdit (2108.01073): data noised part of the way, and the times from there on: what a sampler takes.

    Args:
        x0, eps: (B,C,h,w); eps of unit variance.
        strength: share of the N steps that are walked, in (0, 1]; rounded down, at least one step.
        ahead: steps by which the noise is ahead of the first time; CompVis' img2img is 1 step ahead of what it tells
            the network.
    """
    steps = len(steps_of(times))
    if not 0 < strength <= 1:
        raise ValueError(f"strength: {strength}; it takes a share of the steps above 0, up to 1")
    first = steps - max(1, int(strength * steps + 1e-9))  # 0.7 * 10 is 7
    alpha, sigma = _level(process, steps_of(times)[:, 0], max(0, first - ahead))
    return alpha * x0 + sigma * eps, times[first:]


def _level(process: Process, times: Tensor, i: int) -> tuple[float, float]:
    """alpha and sigma at times[i]."""
    alpha, sigma = process.exact(times[i].double())
    return float(alpha), float(sigma)


def replace(denoise: Denoise, known: Tensor, mask: Tensor, process: Process, *,
            noise: Callable[[int, tuple[int, ...]], Tensor] | None = None, exact: bool = True) -> Denoise:
    """Inpainting by replacement (1503.03585, section 2.5; 2011.13456, appendix I.2): x0 is known where mask = 1.

    The known part of x_t moves as the sampler has it move when x0 is certain, so it is the known data noised to t, and
    it ends as the known data exactly, where ``times`` end at the data.

    Args:
        known: (B,C,h,w); mask (B,1,h,w) or like it, 1: keep.
        noise: (call, shape) -> noise. Given, the network sees the known data under fresh noise at every call, as in
            CompVis' sampler. Not the stream that the sampler draws from.
        exact: False leaves x0 and eps as the network says them for the noised known data: CompVis with ``ddim``, whose
            known part ends as the network sees it.
    """
    calls = 0

    def denoised(x: Tensor, t: Tensor) -> Prediction:
        nonlocal calls
        alpha, sigma = coefficients(process, t, x)
        seen = x
        if noise is not None:
            seen = torch.lerp(x, alpha * known + sigma * noise(calls, tuple(x.shape)).to(x), mask.to(x))
            calls += 1
        guess = denoise(seen, t)
        if not exact:
            return guess
        return of_data(x, torch.lerp(guess.x0, known.to(guess.x0), mask.to(guess.x0)), alpha, sigma, guess.var)
    return denoised


def repaint(sampler: Sampler, known: Tensor, mask: Tensor, *, jump: int = 10, resample: int = 10) -> Sampler:
    """RePaint (2201.09865, algorithm 1 and appendix B): a sampler that inpaints and goes back, so that both parts agree.

    Stretches of ``jump`` steps are walked ``resample`` times each; between two walks x is noised to where the stretch
    began, x_t = alpha / alpha_s x_s + sqrt(beta) eps. As in the authors' list of times, the stretches are laid from one
    step before the data upwards. The paper's sampler is ``ddpm``. ``callback`` and ``noise`` count on through all walks.
    A multistep method begins anew at every stretch.
    """
    if jump < 1 or resample < 1:
        raise ValueError(f"jump {jump}, resample {resample}: both are whole numbers from 1")

    def sample(denoise: Denoise, x: Tensor, times: Tensor, process: Process, *,
               callback: Callable[[int, float, Tensor, Prediction], None] | None = None,
               noise: Callable[[int, tuple[int, ...]], Tensor] | None = None, **options) -> Tensor:
        if times.ndim != 1:
            raise ValueError(f"times {tuple(times.shape)}: repaint walks a list (N+1,) up and down, not pairs of times")
        denoise, steps, draws = replace(denoise, known, mask, process), count(), count()
        options |= {"callback": callback and (lambda _, *rest: callback(next(steps), *rest)),
                    "noise": noise and (lambda _, shape: noise(next(draws), shape))}

        def back(x: Tensor, i: int, j: int) -> Tensor:  # from times[j] to times[i], noisier
            (alpha, sigma), (alpha_s, sigma_s) = _level(process, times, i), _level(process, times, j)
            eps = torch.randn_like(x) if noise is None else noise(next(draws), tuple(x.shape)).to(x)
            return alpha / alpha_s * x + step_posterior(alpha, sigma, alpha_s, sigma_s).beta ** 0.5 * eps

        stops = range(len(times) - 2, jump - 1, -jump)[::-1] if resample > 1 else ()
        for i, j in pairwise([0, *stops, len(times) - 1]):
            x = sampler(denoise, x, times[i:j + 1], process, **options)
            for _ in range(resample - 1 if j in stops else 0):
                x = sampler(denoise, back(x, j - jump, j), times[j - jump:j + 1], process, **options)
        return x
    return sample


def product(denoise: Denoise, log_r: LogLikelihood, process: Process, *, data_std: float = 0.0) -> Denoise:
    """The score of p(x_t) E[r(x0) | x_t], with E[r] at N(x0, variance), the network's x0: for any sampler.

    Its gradient goes through the network. With data_std = 0 the variance is 0: the score of DPS (2209.14687). With the
    standard deviation of the data it is sigma^2 data_std^2 / (alpha^2 data_std^2 + sigma^2), that of x0 given x_t for
    normal data: PiGDM (Song et al., ICLR 2023), exact where data are normal and uncorrelated.
    """
    def denoised(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = coefficients(process, t, x)
        variance = (sigma * data_std) ** 2 / ((alpha * data_std) ** 2 + sigma**2)
        guess, slope = _differentiate(denoise, lambda x0: log_r(x0, variance), x, t)
        return tilt(guess, slope, alpha, sigma)
    return denoised


def measured(y: Tensor, forward: Callable[[Tensor], Tensor], std: float) -> LogLikelihood:
    """log r of a measurement y = forward(x0) + std * noise, for ``product``: -|y - forward(x0)|^2 / 2 (std^2 + variance).

    With a variance, forward is linear with A A^T = 1, such as a mask or a blur that keeps the norm.
    """
    def log_r(x0: Tensor, variance: Tensor) -> Tensor:
        return -(y - forward(x0)).square().flatten(1).sum(1) / (2 * (std**2 + variance.flatten()))
    return log_r


def dps(denoise: Denoise, y: Tensor, forward: Callable[[Tensor], Tensor], process: Process, times: Tensor,
        step: float = 1.0) -> Denoise:
    """DPS with the step length of its algorithm 1 (2209.14687): after each ancestral step, x_s moves by
    -step * gradient of |y - forward(x0)|^2 / |y - forward(x0)| (the norm below is not differentiated). The
    authors' code moves half as far: step = 0.5.

    For ``ddpm`` alone, with the same ``times``. ``forward`` is any differentiable function of x0 (B,C,h,w).
    """
    def denoised(x: Tensor, t: Tensor) -> Prediction:
        def length(x0: Tensor) -> Tensor:  # the gradient of |r|^2 / |r| is twice that of |r|
            return -2 * step * (y - forward(x0)).flatten(1).norm(dim=1)
        guess, shift = _differentiate(denoise, length, x, t)
        return shift_mean(guess, shift, x, step_from(process, times, t, x), *coefficients(process, t, x))
    return denoised


def _differentiate(denoise: Denoise, function: Callable[[Tensor], Tensor], x: Tensor,
                   t: Tensor) -> tuple[Prediction, Tensor]:
    """The prediction at x, and the gradient of function(x0) (B,) with respect to x."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        guess = denoise(x, t.clone())
        slope = torch.autograd.grad(function(guess.x0).sum(), x)[0]
    return Prediction(guess.x0.detach(), guess.eps.detach(), None if guess.var is None else guess.var.detach()), slope
