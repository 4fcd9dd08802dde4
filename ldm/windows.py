"""A network that looks at large latents through overlapping windows (MultiDiffusion, 2302.08113).

At every step each window is denoised by itself, under its part of the spatial condition, and what overlaps is blended. So
pictures of any size come from a network that sees no more than it was trained on, in the memory of one window, without seams:
the noise is one, and neighbours agree anew at every step. What spans several windows nobody plans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoencoder.base import blended
from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.parameterization import Prediction


class Windows:
    """The denoiser by windows of ``side`` latent pixels; at once where x_t is no larger."""

    def __init__(self, denoiser: Denoiser, side: int):
        self.denoiser, self.side = denoiser, side
        self.self_conditioning = denoiser.self_conditioning

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, estimate: Tensor | None = None) -> Prediction:
        beside = cond.spatial
        cut = beside is not None and beside.shape[2:] == x_t.shape[2:]  # else the same everywhere
        given = [x_t, *([estimate] if estimate is not None else []), *([beside.to(x_t)] if cut else [])]
        sizes = [part.shape[1] for part in given]

        def seen(window: Tensor) -> Tensor:  # what is cut, by channels -> x0, eps and the variance, by channels
            x, *more = window.split(sizes, dim=1)
            spatial = more.pop() if cut else beside
            here = Cond(cond.tokens, cond.mask, cond.vector, spatial)
            guess = self.denoiser(x, t, here, *more)
            return torch.cat([value for value in (guess.x0, guess.eps, guess.var) if value is not None], dim=1)

        parts = blended(seen, torch.cat(given, dim=1), self.side).chunk(3 if self.denoiser.variance != "fixed" else 2, dim=1)
        return Prediction(*parts)
