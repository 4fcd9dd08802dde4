"""Guidance: functions from denoise functions to one, which wrap one another.

    cond, null = batched(denoiser, cond, null)                       # two denoise functions, one pass of the network
    guided = rescale(cfg(cond, null, 7.5), cond, process, 0.7)       # "null" may be a negative prompt
    denoise = within(200, 800, inside=guided, outside=bind(denoiser, cond))

Predictions are mixed with weights that sum to one, which commutes with the map from F to (x0, eps): guidance on eps,
on v and on x0 are the same. What works on one of them (clipping x0, rescaling v) says which, and finds the other from
x_t = alpha x0 + sigma eps; it takes the process. The learned variance is that of the condition.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.networks.layers import inattentive
from ldm.parameterization import PARAMETERIZATIONS, Denoise, Prediction, solve, target
from ldm.process import Process, StepPosterior, Variance, log_variance, steps_of

log = logging.getLogger(__name__)
Parameterization = Literal["noise", "data", "v", "flow"]
LogProbability = Callable[[Tensor, Tensor], Tensor]  # (x_t (B,C,h,w), t (B,)) -> log p(y | x_t), (B,)


def mix(towards: Prediction, away: Prediction, scale: float) -> Prediction:
    """away + scale * (towards - away)."""
    return Prediction(torch.lerp(away.x0, towards.x0, scale), torch.lerp(away.eps, towards.eps, scale), towards.var)


def cfg(denoise_cond: Denoise, denoise_null: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (2207.12598): the score of p_null^(1 - scale) p_cond^scale; scale 1 is the condition.

    ``denoise_null`` is under the empty condition, or under a negative prompt, from which guidance then leads away:
    ``cfg(bind(denoiser, conditioner(batch)), bind(denoiser, conditioner(unwanted)), 7.5)``.
    """
    if scale == 1:
        return denoise_cond
    return lambda x, t: mix(denoise_cond(x, t), denoise_null(x, t), scale)


def auto(denoise: Denoise, denoise_weak: Denoise, scale: float) -> Denoise:
    """Autoguidance (2406.02507): away from a smaller or less trained network under the same condition."""
    return cfg(denoise, denoise_weak, scale)


def perturbed(denoise: Denoise, part: nn.Module) -> Denoise:
    """The weak side of perturbed-attention guidance (2403.17377): ``denoise`` while self-attention in ``part`` of its network,
    such as a UNet's ``middle`` or one of a DiT's ``blocks``, looks at nothing but itself.

    ``auto(cond, perturbed(cond, part), 1 + s)`` needs no empty condition; with classifier-free guidance w it is
    ``compose(null, [(cond, w + s), (perturbed(cond, part), -s)])``.
    """
    def weak(x: Tensor, t: Tensor) -> Prediction:
        with inattentive(part):
            return denoise(x.clone(), t)  # another tensor, to which ``once`` has no answer yet
    return weak


def compose(denoise_null: Denoise, parts: Sequence[tuple[Denoise, float]]) -> Denoise:
    """Several conditions, each with its weight (2206.01714): null + sum of w_i (cond_i - null).

    A negative weight leads away from its condition. The learned variance is that of the first.
    """
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        null, said = denoise_null(x, t), [(part(x, t), weight) for part, weight in parts]
        x0 = null.x0 + sum(weight * (guess.x0 - null.x0) for guess, weight in said)
        eps = null.eps + sum(weight * (guess.eps - null.eps) for guess, weight in said)
        return Prediction(x0, eps, said[0][0].var if said else null.var)
    return denoise


def within(low: float, high: float, inside: Denoise, outside: Denoise) -> Denoise:
    """``inside`` where low <= t <= high, ``outside`` elsewhere (2404.07724); both run where samples differ in that."""
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        chosen = (low <= t) & (t <= high)
        if chosen.all() or not chosen.any():
            return (inside if chosen.any() else outside)(x, t)
        chosen = chosen.view(-1, *[1] * (x.ndim - 1))
        a, b = inside(x, t), outside(x, t)
        var = None if a.var is None or b.var is None else torch.where(chosen, a.var, b.var)
        return Prediction(torch.where(chosen, a.x0, b.x0), torch.where(chosen, a.eps, b.eps), var)
    return denoise


def on_channels(guided: Denoise, plain: Denoise, channels: int) -> Denoise:
    """``guided`` on the first channels, ``plain`` on the rest: DiT (2212.09748) guides 3 of 4."""
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        first, rest = guided(x, t), plain(x, t)
        x0, eps = (torch.cat([a[:, :channels], b[:, channels:]], dim=1)
                   for a, b in ((first.x0, rest.x0), (first.eps, rest.eps)))
        return Prediction(x0, eps, first.var)
    return denoise


def once(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """Remembers its last answer: a denoise function that several wrappers ask at the same (x, t) runs once."""
    last: list[Any] = []  # x, t, what in-place changes and gradients there were, the answer

    def ask(x: Tensor, t: Tensor) -> Any:
        state = (torch.is_grad_enabled(), *(each.is_inference() or each._version for each in (x, t)))
        if not last or last[0] is not x or last[1] is not t or last[2] != state:
            last[:] = [x, t, state, function(x, t)]
        return last[3]
    return ask


def batched(denoiser: nn.Module, *conds: Cond) -> tuple[Denoise, ...]:
    """One denoise function for each condition (B,); all are answered by one pass over a batch of all of them."""
    every, n = Cond.cat(list(conds)), len(conds)

    def together(x: Tensor, t: Tensor) -> list[Prediction]:
        guess = denoiser(x.repeat(n, *[1] * (x.ndim - 1)), t.repeat(n), every)
        var = [None] * n if guess.var is None else guess.var.chunk(n)
        return [Prediction(*each) for each in zip(guess.x0.chunk(n), guess.eps.chunk(n), var, strict=True)]

    together = once(together)
    return tuple(lambda x, t, i=i: together(x, t)[i] for i in range(n))


def cfg_batched(denoiser: nn.Module, cond: Cond, null: Cond, scale: float) -> Denoise:
    """Classifier-free guidance in one pass over a doubled batch: the same result as ``cfg``."""
    if scale == 1:
        return lambda x, t: denoiser(x, t, cond)
    return cfg(*batched(denoiser, cond, null), scale)


def planned(plain: Denoise, denoiser: nn.Module, cond: Cond, null: Cond, plan: Mapping[str, Any], process: Process,
            others: Sequence[tuple[Cond, float]] = ()) -> Denoise:
    """What ``Bundle.generate`` samples with: null + scale (cond - null + sum of w_i (cond_i - null)).

    Args:
        plain: the denoise function under cond alone.
        plan: "scale"; the times "low" and "high" in between which is guided; the share "rescale"; the first "channels" that are
            guided alone; None: everywhere, not at all, all. Warned of where no time of the process is in between.
        others: further conditions cond_i with their weights.
    """
    towards, *parts, away = batched(denoiser, cond, *(other for other, _ in others), null)
    weighed = [(part, plan["scale"] * weight) for part, (_, weight) in zip(parts, others, strict=True)]
    guided = compose(away, [(towards, plan["scale"]), *weighed]) if others else cfg(towards, away, plan["scale"])
    if plan["rescale"]:
        guided = rescale(guided, towards, process, plan["rescale"])
    if plan["channels"]:
        guided = on_channels(guided, towards, plan["channels"])
    low, high = (math.inf * side if at is None else at for side, at in ((-1, plan["low"]), (1, plan["high"])))
    first, last = max(low, process.t_min), min(high, process.t_max)
    if first > last or (process.t_data < 0 and math.ceil(first) > last):
        log.warning("guidance low %s, high %s: no time of %s is between them: nothing is guided; its t goes from %g to %g",
                    plan["low"], plan["high"], type(process).__name__, process.t_min, process.t_max)
    return within(low, high, guided, plain)


def coefficients(process: Process, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma at t (B,), shaped to broadcast against x (B,C,h,w), in the finer type of the two."""
    alpha, sigma = process.coefficients(t.to(torch.promote_types(t.dtype, x.dtype)))
    return tuple(c.view(-1, *[1] * (x.ndim - 1)) for c in (alpha, sigma))


def of_data(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, var: Tensor | None = None) -> Prediction:
    """The prediction that says x0 of x_t: eps = (x_t - alpha x0) / sigma."""
    return Prediction(x0, (x - alpha * x0) / sigma, var)


def _sum(x: Tensor) -> Tensor:  # (B,C,h,w) -> (B,1,1,1)
    return x.sum(dim=tuple(range(1, x.ndim)), keepdim=True)


def _std(x: Tensor) -> Tensor:  # (B,C,h,w) -> (B,1,1,1); of one number 0
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True, correction=int(math.prod(x.shape[1:]) > 1))


def rescale(denoise: Denoise, denoise_cond: Denoise, process: Process, share: float = 0.7,
            of: Parameterization = "v") -> Denoise:
    """Guided F brought back to the standard deviation of F under the condition (2305.08891, section 3.4).

    Args:
        denoise: the guided one; ``denoise_cond`` is part of it: wrap it in ``once``, or take both from ``batched``.
        share: phi; 0 leaves the guided F, 1 has the condition's deviation in full.
        of: what is rescaled. The paper's network says v; diffusers rescales what its network says, eps in SD 1.
    """
    def rescaled(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = coefficients(process, t, x)
        p, q = PARAMETERIZATIONS[of](alpha, sigma)
        guided, cond = denoise(x, t), denoise_cond(x, t)
        f, f_cond = (target(guess.x0, guess.eps, p, q) for guess in (guided, cond))
        f = share * f * (_std(f_cond) / _std(f).clamp(min=1e-12)) + (1 - share) * f
        found = solve(x, f, alpha, sigma, p, q)
        return Prediction(found.x0, found.eps, guided.var)
    return rescaled


def change_data(denoise: Denoise, process: Process, change: Callable[[Tensor], Tensor],
                eps: Literal["found", "kept"] = "found") -> Denoise:
    """x0 -> change(x0): clipping, or the autoencoder's nearest codes.

    Args:
        eps: found: from x_t and the new x0, so that the ancestral step uses x0 alone (DDPM, ADM, Imagen); kept: as the
            network said it (DDIM of diffusers when it clips, CompVis' quantize_x0).
    """
    def changed(x: Tensor, t: Tensor) -> Prediction:
        guess = denoise(x, t)
        x0 = change(guess.x0)
        return Prediction(x0, guess.eps, guess.var) if eps == "kept" else of_data(
            x, x0, *coefficients(process, t, x), guess.var)
    return changed


def clip(denoise: Denoise, process: Process, bound: float = 1.0, eps: Literal["found", "kept"] = "found") -> Denoise:
    """x0 in [-bound, bound], for pixels (Imagen's static threshold)."""
    return change_data(denoise, process, lambda x0: x0.clamp(-bound, bound), eps)


def dynamic_threshold(denoise: Denoise, process: Process, quantile: float = 0.995, most: float = math.inf,
                      eps: Literal["found", "kept"] = "found") -> Denoise:
    """Imagen, 2205.11487, section 2.3: s, the quantile of each sample's |x0|, if above 1: x0 clipped to [-s, s], over s.

    Args:
        most: the greatest s (sample_max_value of diffusers).
    """
    def change(x0: Tensor) -> Tensor:
        sizes = x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32))
        s = [row.quantile(quantile) for row in sizes]  # row by row: torch takes 2^24 numbers
        s = torch.stack(s) if s else sizes.new_ones(0)
        s = s.clamp(1.0, most).view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        return x0.clamp(-s, s) / s
    return change_data(denoise, process, change, eps)


BOUNDS: dict[str, Callable[..., Denoise]] = {"clip": clip, "dynamic_threshold": dynamic_threshold}  # what keeps x0 in range


def gradient(log_p: LogProbability, x: Tensor, t: Tensor) -> Tensor:
    """d log p(y | x_t) / d x_t, (B,C,h,w)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(log_p(x, t.clone()).sum(), x)[0]


def tilt(guess: Prediction, slope: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """The score -eps / sigma plus a slope (B,C,h,w): eps - sigma slope, and x0 + sigma^2 / alpha slope.

    Where alpha = 0 the slope is 0 and says nothing of x0, which stays: there, begin a little below t_max.
    """
    x0 = guess.x0 + torch.where(alpha > 0, sigma**2 / alpha.clamp(min=torch.finfo(alpha.dtype).tiny), 0.0) * slope
    return Prediction(x0, guess.eps - sigma * slope, guess.var)


def classifier(denoise: Denoise, log_p: LogProbability, scale: float, process: Process) -> Denoise:
    """Classifier guidance, score form (ADM, 2105.05233, algorithm 2): the score plus scale * gradient, for any sampler.

    ``log_p`` may be ``lambda x, t: net(x, t).log_softmax(-1)[range(len(y)), y]``. It wraps clipping, as in ADM: the x0
    found here is not clipped again.
    """
    return lambda x, t: tilt(denoise(x, t), scale * gradient(log_p, x, t), *coefficients(process, t, x))


def shift_mean(guess: Prediction, shift: Tensor, x: Tensor, posterior: StepPosterior, alpha: Tensor,
               sigma: Tensor) -> Prediction:
    """The prediction whose ancestral step, from x_t to posterior.x0 x0 + posterior.xt x_t, goes ``shift`` (B,C,h,w)
    further."""
    return of_data(x, guess.x0 + shift / posterior.x0.to(shift), alpha, sigma, guess.var)


def step_from(process: Process, times: Tensor, t: Tensor, x: Tensor) -> StepPosterior:
    """The step that begins at t (B,) in ``times``: fp64, shaped to broadcast against x."""
    steps = steps_of(times)
    found = steps[(steps[:, 0] - t.cpu().double()[:, None]).abs().argmin(1)]
    return process.posterior(*(end.view(-1, *[1] * (x.ndim - 1)) for end in found.unbind(1)))


def classifier_mean(denoise: Denoise, log_p: LogProbability, scale: float, process: Process, times: Tensor,
                    variance: Variance | float = "small", floor: float = 1e-20) -> Denoise:
    """Classifier guidance, mean form (ADM, algorithm 1): the ancestral step's mean moved by variance * scale * gradient.

    For ``ddpm`` alone: give it and this the same ``times`` and variance. The gradient is taken at x_t.

    Args:
        variance, floor: as in ``process.log_variance``; learned kinds are read from the prediction.
    """
    def denoised(x: Tensor, t: Tensor) -> Prediction:
        guess, posterior = denoise(x, t), step_from(process, times, t, x)
        spread = log_variance(posterior, guess.var, variance, floor).exp().to(guess.x0)
        return shift_mean(guess, scale * spread * gradient(log_p, x, t), x, posterior, *coefficients(process, t, x))
    return denoised


def apg(denoise_cond: Denoise, denoise_null: Denoise, scale: float, process: Process, *, eta: float = 0.0,
        threshold: float = math.inf, momentum: float = 0.0) -> Denoise:
    """Adaptive projected guidance (2410.02416), on x0. Make one for each run: it remembers.

    Args:
        eta: how much is left of the difference's part along the condition's x0, which saturates; 1: all, as ``cfg``.
        threshold: longest difference, r, in the norm over a sample.
        momentum: beta; below 0 the average of the differences leads away from past ones.
    """
    average: Tensor | None = None

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        nonlocal average
        cond, null = denoise_cond(x, t), denoise_null(x, t)
        difference = cond.x0 - null.x0
        if momentum != 0:
            difference = average = difference if average is None else difference + momentum * average
        length = _sum(difference**2).sqrt()
        difference = difference * (threshold / length.clamp(min=1e-12)).clamp(max=1.0)
        along = _sum(difference * cond.x0) / _sum(cond.x0**2).clamp(min=1e-12) * cond.x0
        x0 = cond.x0 + (scale - 1) * (difference - along + eta * along)
        return of_data(x, x0, *coefficients(process, t, x), cond.var)
    return denoise


def still(process: Process) -> Denoise:
    """A flow's velocity eps - x0 = 0: the first steps of CFG-Zero* stand still (2503.18886)."""
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = coefficients(process, t, x)
        return Prediction(x / (alpha + sigma), x / (alpha + sigma))
    return denoise


def cfg_zero(denoise_cond: Denoise, denoise_null: Denoise, scale: float, process: Process,
             of: Parameterization = "flow") -> Denoise:
    """CFG-Zero* (2503.18886): null scaled by s* = <F_cond, F_null> / |F_null|^2, then guidance.

    Its first K steps stand still: ``within(low, high, inside=still(process), outside=cfg_zero(...))`` with low and high
    around times[0] and times[K - 1].

    Args:
        of: what s* is found for; the paper's is the velocity of a flow.
    """
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = coefficients(process, t, x)
        p, q = PARAMETERIZATIONS[of](alpha, sigma)
        cond, null = denoise_cond(x, t), denoise_null(x, t)
        f_cond, f_null = (target(guess.x0, guess.eps, p, q) for guess in (cond, null))
        f_null = f_null * (_sum(f_cond * f_null) / _sum(f_null**2).clamp(min=1e-12))
        found = solve(x, torch.lerp(f_null, f_cond, scale), alpha, sigma, p, q)
        return Prediction(found.x0, found.eps, cond.var)
    return denoise
