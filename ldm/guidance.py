"""Guidance: functions from denoise functions to one.

Predictions are mixed with weights that sum to one, which commutes with the map from F to (x0, eps): guidance on eps,
on v and on x0 are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.parameterization import Denoise, Prediction


def mix(towards: Prediction, away: Prediction, scale: float) -> Prediction:
    """away + scale * (towards - away)."""
    return Prediction(torch.lerp(away.x0, towards.x0, scale), torch.lerp(away.eps, towards.eps, scale), towards.var)


def cfg(denoise_cond: Denoise, denoise_null: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (2207.12598) in two passes; scale 1 is the plain condition."""
    if scale == 1:
        return denoise_cond
    return lambda x, t: mix(denoise_cond(x, t), denoise_null(x, t), scale)


def cfg_batched(denoiser: nn.Module, cond: Cond, null: Cond, scale: float) -> Denoise:
    """Classifier-free guidance in one pass over a doubled batch: the same result as ``cfg``."""
    if scale == 1:
        return lambda x, t: denoiser(x, t, cond)
    both = Cond.cat([cond, null])

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        double = denoiser(torch.cat([x, x]), torch.cat([t, t]), both)
        n = len(x)
        return mix(Prediction(double.x0[:n], double.eps[:n]), Prediction(double.x0[n:], double.eps[n:]), scale)
    return denoise


def within(low: float, high: float, inside: Denoise, outside: Denoise) -> Denoise:
    """``inside`` where low <= t <= high, ``outside`` elsewhere (2404.07724); all samples share t."""
    return lambda x, t: (inside if low <= float(t[0]) <= high else outside)(x, t)
