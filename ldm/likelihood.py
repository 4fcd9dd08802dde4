"""How likely data are under a diffusion model: the variational bound, the probability-flow ODE, rate and distortion.

Sums are taken in fp64 and given in nats a sample; ``bits_per_dim`` changes the unit. ``noise(step, shape)`` gives all random
numbers, so that runs can be replayed. Every process: steps are those of a list of times (N+1,) that decreases from t_max to
clean data, as samplers take them; a bound over a list that begins lower is that of the chain which begins there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from ldm.parameterization import Denoise, Prediction
from ldm.process import Process, StepPosterior, Variance, in_double, log_variance

Noise = Callable[[int, tuple[int, ...]], Tensor]
Callback = Callable[[int, float, Tensor, Prediction], None]
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, mean, log of the standard deviation -> log-likelihood of each entry

LEVELS = 0.002, 1000.0  # of noise, sigma/alpha: where processes are cut that go on to 0 and infinity


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) of each entry, in nats; shapes broadcast."""
    return 0.5 * (logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2).square() * torch.exp(-logvar2) - 1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor, bins: int = 256,
                               cdf: Literal["normal", "tanh"] = "normal") -> Tensor:
    """log of the mass that N(mean, e^(2 log_std)) has in the bin of each entry of x, in nats (DDPM, 2006.11239, eq. 13).

    x lies on ``bins`` levels evenly spaced over [-1, 1]; the first and the last bin are open outwards, so that the
    masses of all bins add up to 1. ``cdf="tanh"`` is the approximation of Improved DDPM's code: 0.5 (1 + tanh(...)), no
    mass below 1e-12. Computed in fp64 where the device has it: far from the mean the gradient loses its digits in fp32.
    """
    half, dtype = 1 / (bins - 1), mean.dtype
    exact = dtype if mean.device.type == "mps" or cdf == "tanh" else torch.float64
    low, high = ((x - mean + side).to(exact) * torch.exp(-log_std.to(exact)) for side in (-half, half))
    if cdf == "tanh":
        below, above = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in (low, high))
        first, last, inside = (m.clamp(min=1e-12).log() for m in (above, 1 - below, above - below))
    else:  # where both ends lie above the mean, the mirrored bin below it has the same mass and keeps its digits
        first, last = torch.special.log_ndtr(high), torch.special.log_ndtr(-low)
        mirror = low + high > 0
        near, far = torch.where(mirror, last, first), torch.special.log_ndtr(torch.where(mirror, -high, low))
        inside = near + (-torch.expm1(far - near)).clamp(min=torch.finfo(near.dtype).tiny).log()
    return torch.where(x < -1 + half, first, torch.where(x > 1 - half, last, inside)).to(dtype)


def normal_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mean, e^(2 log_std)) of each entry, in nats."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)


def laplace_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the Laplace density with this mean and standard deviation (sqrt(2) times its scale), in nats."""
    log_scale = log_std - 0.5 * math.log(2)
    return -(x - mean).abs() * torch.exp(-log_scale) - log_scale - math.log(2)


DECODERS: dict[str, Decoder] = {
    "discretized": discretized_log_likelihood, "gaussian": normal_log_density, "laplace": laplace_log_density,
}


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Nats of a whole sample -> bits per dimension."""
    return nats / (dims * math.log(2))


def clamped(denoise: Denoise, low: float | Tensor = -1.0, high: float | Tensor = 1.0) -> Denoise:
    """The same with its x0 inside [low, high], and eps as it was."""
    def inside(x: Tensor, t: Tensor) -> Prediction:
        guess = denoise(x, t)
        return Prediction(guess.x0.clamp(low, high), guess.eps, guess.var)

    return inside


@dataclass(frozen=True)
class Bound:
    """-log p(x0) <= prior + sum of terms, in nats a sample.

    prior (B,): L_T, of the last noise. terms (B,N): L_{t-1} from t_max on downwards, the last is the decoder's L_0.
    times (N,): the t that each term begins at. error (B,N): mean squared error of the x0 that is predicted at that t.
    """

    times: Tensor
    prior: Tensor
    terms: Tensor
    error: Tensor

    @property
    def total(self) -> Tensor:  # (B,)
        return self.prior + self.terms.sum(1)

    @property
    def decoder(self) -> Tensor:  # (B,)
        return self.terms[:, -1]


def joined(bounds: list[Bound]) -> Bound:
    """Of several batches, as if they were one."""
    return Bound(bounds[0].times, *(torch.cat([getattr(bound, name) for bound in bounds]) for name in
                                    ("prior", "terms", "error")))


def prior_kl(x0: Tensor, process: Process, prior_std: float | None = None, t: float | None = None) -> Tensor:
    """L_T = KL(q(x_T | x0) || N(0, prior_std^2)) (B,) of data (B,...), at t_max or where else a chain begins (DDPM, 2006.11239,
    eq. 5). prior_std None: that of x_T for data of unit variance."""
    alpha, sigma = process.exact(torch.tensor(process.t_max if t is None else t, dtype=torch.float64))
    std = torch.tensor(prior_std, dtype=torch.float64) if prior_std else torch.hypot(alpha, sigma)
    return _sum(normal_kl(alpha * in_double(x0), 2 * sigma.log(), torch.zeros_like(alpha), 2 * std.log()))


def variance_before(process: Process, times: Tensor) -> float:
    """Improved DDPM's (2102.09672) variance of the last step, whose posterior has none: that of the step before."""
    return float(process.posterior(times[-3], times[-2]).variance)


@torch.no_grad()
def variational_bound(denoise: Denoise, x0: Tensor, times: Tensor, process: Process, *, variance: Variance = "large",
                      decoder: Decoder = discretized_log_likelihood, floor: float | None = None,
                      prior_std: float | None = None, noise: Noise | None = None, callback: Callback | None = None) -> Bound:
    """L = L_T + sum L_{t-1} + L_0 of the chain that walks these times (DDPM, 2006.11239, eq. 5), one x_t for each term.

    L_{t-1} = KL(q(x_s | x_t, x0) || p(x_s | x_t)), L_0 = -log p(x0 | x_t) with the ``decoder``.

    Args:
        x0: (B,...) data; ``noise(step, shape)`` makes the x_t of step 0, 1 ..., from t_max down.
        variance: of p(x_s | x_t); see ``process.log_variance``.
        decoder: mass of a pixel's bin, or a density such as ``normal_log_density`` for latents.
        floor: the decoder's variance. None: that of q(x_t | x0), beta_1 for DDPM (its section 3.3); with learned_range
            ``variance_before``, which is part of how that is trained. Improved DDPM takes it always.
        prior_std: of p(x_T); None: that of the process, for data of unit variance.
    """
    _check_end(times, process)
    if floor is None and variance == "learned_range" and len(times) > 2:
        floor = variance_before(process, times)
    exact, terms, errors = in_double(x0), [], []
    for step, (t, s) in enumerate(pairwise(times.double())):
        x_t, guess = _look(denoise, x0, t, process, step, noise, callback)
        posterior = process.posterior(t, s)
        var = None if guess.var is None else in_double(guess.var)
        log_var = log_variance(posterior, var, variance, posterior.beta if floor is None else floor)
        guessed = in_double(guess.x0)
        mean = _mean(posterior, guessed, x_t)
        if posterior.variance > 0:
            term = normal_kl(_mean(posterior, exact, x_t), posterior.variance.log(), mean, log_var)
        else:
            term = -decoder(exact, mean, 0.5 * log_var)
        terms.append(_sum(term))
        errors.append((guessed - exact).square().flatten(1).mean(1))
    prior = prior_kl(x0, process, prior_std, float(times[0]))  # of the first x_t, which a list may have below t_max
    return Bound(times[:-1], prior, torch.stack(terms, 1), torch.stack(errors, 1))


@torch.no_grad()
def continuous_bound(denoise: Denoise, x0: Tensor, process: Process, steps: int = 100, *,
                     decoder: Decoder = discretized_log_likelihood, level: float | None = None,
                     prior_std: float | None = None, noise: Noise | None = None, callback: Callback | None = None) -> Bound:
    """The bound of infinitely many steps: -1/2 times the integral of SNR'(t) E|x0 - x0(x_t)|^2 (VDM, 2107.00630, eq. 17).

    Over lambda = log(alpha / sigma) that is the integral of |eps - eps(x_t)|^2, here by the midpoint rule in ``steps`` equal
    parts. It ends at the noise ``level`` sigma/alpha (None: that of t_min, or 0.002), from where the ``decoder`` says x0:
    N(x0(x_t), level^2). The model's variances have no part in it.
    """
    low, high = _levels(process, level)
    high = min(high, LEVELS[1])  # above, less than high^-2 / 2 nats a dimension is left
    edges = torch.linspace(-math.log(high), -math.log(low), steps + 1, dtype=torch.float64)
    middles = process.when((edges[1:] + edges[:-1]) / 2)
    end = process.when(edges[-1:])
    exact, terms, errors = in_double(x0), [], []
    for step, t in enumerate(torch.cat([middles, end])):
        _, guess = _look(denoise, x0, t, process, step, noise, callback)
        error = (in_double(guess.x0) - exact).square()
        if step < steps:
            terms.append(_sum(torch.exp(2 * process.log_snr(t)) * error) * (edges[1] - edges[0]))
        else:
            terms.append(_sum(-decoder(exact, in_double(guess.x0), torch.tensor(math.log(low), dtype=torch.float64))))
        errors.append(error.flatten(1).mean(1))
    return Bound(torch.cat([middles, end]), prior_kl(x0, process, prior_std), torch.stack(terms, 1), torch.stack(errors, 1))


def rate_distortion(bound: Bound, dims: int, error: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Progressive coding (DDPM, 2006.11239, section 4.3, figure 5): (N,) bits per dimension that were sent when x_t is known,
    and (N,) root mean squared error of the x0 predicted from it, on a scale of 0..255 for data in [-1, 1].

    error: (B,N) mean squared errors to be taken in place of the bound's own, such as those of decoded latents.
    """
    sent = torch.cat([bound.prior[:, None], bound.prior[:, None] + bound.terms[:, :-1].cumsum(1)], 1)
    return bits_per_dim(sent.mean(0), dims), 127.5 * (bound.error if error is None else error).mean(0).sqrt()


@dataclass(frozen=True)
class Flow:
    """Where the probability-flow ODE brings data: log_likelihood (B,) in nats, of which log_prior (B,) at its end."""

    log_likelihood: Tensor
    log_prior: Tensor
    latent: Tensor
    evaluations: int


@torch.inference_mode(False)
def ode_likelihood(denoise: Denoise, x0: Tensor, process: Process, *, probes: int | Literal["exact"] = 1,
                   level: float | None = None, tolerance: float = 1e-5, prior_std: float | None = None,
                   noise: Noise | None = None, callback: Callable[[float], None] | None = None) -> Flow:
    """log p(x0), a density, by the change of variables along the probability-flow ODE (2011.13456, section 4.3, D.2).

    In y = x / (alpha + sigma) over w = sigma / (alpha + sigma) every process has the same ODE, dy/dw = eps - x0, and no
    schedule in it; d log p(y) / dw = -div(eps - x0).

    Args:
        probes: how many random signs v estimate the divergence by v.Jv (Hutchinson); "exact": the D entries of the trace.
        level: sigma/alpha at which the data are put in, as they are: what is measured is the density of data with that much
            noise. None: that of t_min, or 0.002.
        tolerance: of the solver, relative and absolute, for each sample on its own.
        prior_std: of p(x_T); None: that of the process. k-diffusion takes its sigma_max.
        noise: ``noise(k, shape)``, of which probe k takes the signs.
        callback: told the share of the way, 0 to 1, at every step.
    """
    low, high = _levels(process, level)
    x0 = x0.clone()  # of inference mode, a tensor without a gradient
    batch, *shape = x0.shape
    dims = math.prod(shape)
    y = in_double(x0)
    signs = _units(y) if probes == "exact" else [in_double(_draw(noise, k, y)).sign() for k in range(probes)]
    calls = 0

    def field(w: Tensor, state: Tensor) -> Tensor:  # (B,), (B,D+1) -> (B,D+1): dy/dw, and the divergence of it
        nonlocal calls
        calls += 1
        t = process.when(-torch.logit(w))
        alpha, sigma = process.exact(t)
        with torch.enable_grad():
            y = state[:, :-1].reshape(x0.shape).requires_grad_()
            x = (alpha + sigma).view(-1, *[1] * len(shape)) * y
            guess = denoise(x.to(x0.device, x0.dtype), t.to(x0.device, x0.dtype))
            velocity = in_double(guess.eps) - in_double(guess.x0)
            rows = [torch.autograd.grad(velocity, y, v.expand_as(y), retain_graph=True)[0] * v for v in signs]
        return torch.cat([velocity.detach().flatten(1), _sum(sum(rows) / len(signs))[:, None]], 1)

    start, end = low / (1 + low), 1 - 1 / (1 + high)
    y = y.flatten(1) * (1 - start)  # alpha / (alpha + sigma) = 1 - w
    state = dormand_prince(field, torch.cat([y, y.new_zeros(batch, 1)], 1), start, end, tolerance, callback)
    unit = sum(process.exact(torch.tensor(process.t_max, dtype=torch.float64)))
    latent = (unit * state[:, :-1]).reshape(x0.shape)
    std = torch.tensor(prior_std or process.prior_std(), dtype=torch.float64)
    log_prior = _sum(normal_log_density(latent, torch.zeros_like(std), std.log()))
    # from p(x_T) to p(y), y = x_T / unit; along the way; from p(y) to p(x0), y = (1 - start) x0
    log_p = log_prior + dims * unit.log() + state[:, -1] + dims * math.log(1 - start)
    return Flow(log_p, log_prior, latent, calls)


# Dormand and Prince's pair of orders 5 and 4: where the stages are, their weights (the last stage is at the new state), and
# what is wrong with the solution of order 5 by the one of order 4.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
          (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
          (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
          (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))  # fmt: skip
WRONG = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dormand_prince(field: Callable[[Tensor, Tensor], Tensor], state: Tensor, start: float, end: float, tolerance: float,
                   callback: Callable[[float], None] | None = None, most: int = 10_000) -> Tensor:
    """Solve d state / dw = field(w (B,), state (B,K)) from start to end > start, with steps of its own for each sample, so
    that a sample does not depend on its neighbours. The tolerance holds for the last entry as for the rest together.
    ValueError after ``most`` steps."""
    w = torch.full((len(state),), start, dtype=state.dtype, device=state.device)
    h, slope = torch.full_like(w, (end - start) / 20), field(w, state)
    for _ in range(most):
        h = torch.minimum(h, end - w)
        slopes = [slope]
        for node, weights in zip(NODES, STAGES, strict=True):
            new = state + h[:, None] * sum(a * k for a, k in zip(weights, slopes, strict=True))
            slopes.append(field(w + node * h, new))
        wrong = h[:, None] * sum(e * k for e, k in zip(WRONG, slopes, strict=True))
        size = tolerance * (1 + torch.maximum(state.abs(), new.abs()))
        wrong = (wrong / size).abs()
        ratio = torch.maximum(wrong[:, :-1].square().mean(1).sqrt(), wrong[:, -1])
        if ratio.isnan().any():
            raise ValueError(f"the ODE has no numbers left at {float(w.min()):.3g} of {end:.3g}: the network gave nan")
        good = ratio <= 1
        state, slope = (torch.where(good[:, None], a, b) for a, b in ((new, state), (slopes[-1], slope)))
        w = torch.where(good, torch.where(end - w <= h, end, w + h), w)
        h = h * (0.9 * ratio.clamp(min=1e-9) ** -0.2).clamp(0.2, 5.0)
        if callback is not None:
            callback(float((w.min() - start) / (end - start)))
        if (w >= end).all():
            return state
    raise ValueError(f"the ODE is not solved after {most} steps, at {float(w.min()):.3g} of {end:.3g}; take a larger "
                     f"tolerance than {tolerance:g}, and weights in float32")


# Latent models: -log p(x) <= E[-log p(x|z)] - H(q(z|x)) + E[-log p(z)], z ~ q(z|x) (LSGM, 2106.05931, eq. 1), in three terms:
# ``decoder_nats``, the entropy that ``draw_latent`` gives, and -log p(z) by one of the bounds above or the ODE.


@torch.no_grad()
def draw_latent(autoencoder: Autoencoder, x: Tensor, noise: Noise | None = None,
                std: float | None = None) -> tuple[Tensor, Tensor]:
    """z ~ q(z|x) (B,C,h,w) at unit scale, drawn by ``noise(0, shape)``, and the entropy of q(z|x) at that scale, (B,) nats.

    std: of q(z|x), in place of the autoencoder's own; any value gives a bound. Latents that a diffusion model was trained on
        without their noise are far from draws of a wide q(z|x), and likelier with little of it.
    """
    mean, own = autoencoder.posterior(x)
    if own is None and std is None:
        raise ValueError(f"{type(autoencoder).__name__} encodes without noise, so that the entropy of q(z|x) is not finite; "
                         "give the standard deviation of noise to be added to its latents")
    spread = own if std is None else torch.full_like(mean, std)
    entropy = in_double(spread).log() + 0.5 * math.log(2 * math.pi * math.e)
    return mean + spread * _draw(noise, 0, mean), _sum(entropy)


@torch.no_grad()
def decoder_nats(autoencoder: Autoencoder, x: Tensor, z: Tensor, decoder: Decoder, std: float) -> Tensor:  # -> (B,)
    """-log p(x|z): ``decoder`` around the decoded z, with this standard deviation; pictures are in [-1, 1]."""
    log_std = torch.tensor(math.log(std), dtype=torch.float64)
    return -_sum(decoder(in_double(x), in_double(autoencoder.decode(z)), log_std))


def _sum(x: Tensor) -> Tensor:  # (B,...) -> (B,)
    return x.flatten(1).sum(1)


def _draw(noise: Noise | None, step: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noise is None else noise(step, tuple(x.shape)).to(x)


def _mean(posterior: StepPosterior, x0: Tensor, x_t: Tensor) -> Tensor:
    return posterior.x0 * x0 + posterior.xt * x_t


def _look(denoise: Denoise, x0: Tensor, t: Tensor, process: Process, step: int, noise: Noise | None,
          callback: Callback | None) -> tuple[Tensor, Prediction]:
    """x_t ~ q(x_t | x0) in fp64, and what is believed of it."""
    alpha, sigma = process.exact(t)
    x_t = alpha * in_double(x0) + sigma * in_double(_draw(noise, step, x0))
    seen = x_t.to(x0.device, x0.dtype)
    guess = denoise(seen, t.to(x0.device, x0.dtype).expand(len(x0)))
    if callback is not None:
        callback(step, float(t), seen, guess)
    return x_t, guess


def _levels(process: Process, low: float | None) -> tuple[float, float]:
    """The least and the greatest noise level sigma/alpha that is looked at."""
    own, high = (-process.log_snr(torch.tensor([process.t_min, process.t_max], dtype=torch.float64))).exp().tolist()
    return low or own or LEVELS[0], high


def _units(x: Tensor) -> list[Tensor]:
    """D vectors v (D,) whose mean of v.Jv is the trace of J."""
    dims = math.prod(x.shape[1:])
    return list((dims**0.5 * torch.eye(dims, dtype=torch.float64, device=x.device)).view(dims, *x.shape[1:]))


def _check_end(times: Tensor, process: Process) -> None:
    if times.ndim != 1:
        raise ValueError(f"times {tuple(times.shape)}: a bound takes a list (N+1,), not pairs of times")
    if process.exact(times[-1:].double())[1].item() > 0:
        raise ValueError(f"times end at t = {float(times[-1]):g}, where {type(process).__name__} still has noise: a bound "
                         f"takes times that end at clean data (t = {process.t_data:g})")
