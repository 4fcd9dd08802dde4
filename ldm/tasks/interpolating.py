"""Pictures between two: between their conditions, their noises, or two given pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.bundle import Bundle, as_batch
from ldm.common.files import UserError
from ldm.common.random import generator
from ldm.conditioners.between import SHARE, TO, Between, Way, lerp, slerp
from ldm.edit import Sampler
from ldm.tasks.picture import X0, Edit, Prompts, from_picture, repeated, share_of


def interpolate(bundle: Bundle, first: Prompts, second: Prompts, shares: Sequence[float], *, seeds: tuple[int, int] = (0, 0),
                way: Way = "lerp", images: Tensor | None = None, strength: float = 0.6, tile: int | None = None,
                **options: Any) -> Tensor:
    """A picture for each share of the way, (N,C,H,W); at 0 and 1 exactly what ``generate`` draws of either end.

    Args:
        first, second: conditions of one picture each.
        seeds: of both ends. Noise, that of the steps too, goes along the great circle between theirs, so that it stays noise.
        way: of tokens and vectors; spatial conditions go along a straight line.
        images: (2,C,H,W), pictures to go between: their latents are mixed and noised ``strength`` of the way, and drawn from
            there (DDPM, 2006.11239, figure 8, whose mean of two noises is replaced by the noise above, which is no weaker in
            the middle). The ends are then ``img2img``.
    """
    if not shares:
        raise UserError("shares: expected one number or more, from 0 to 1")
    share = torch.tensor([share_of(float(each), "shares") for each in shares])
    n, ends = len(share), [as_batch(1 if prompts is None else prompts) for prompts in (first, second)]
    if any(count != 1 for _, count in ends):
        raise UserError(f"interpolate: the conditions of one picture at either end, got {ends[0][1]} and {ends[1][1]}")
    batch = {SHARE: share}
    for prefix, (own, _), seed in zip(("", TO), ends, seeds, strict=True):
        own = {"position": torch.tensor([seed]), **own}
        batch |= {f"{prefix}{key}": repeated(value, n) for key, value in own.items()}
    edit = noise_between(bundle, seeds)
    if images is not None:
        if len(images) != 2 or not 0 < share_of(strength, "strength"):
            raise UserError(f"images {tuple(images.shape)}, strength {strength}: two pictures, and a share of steps above 0")
        a, b = bundle.encode(images, tile).split(1)
        batch[X0] = lerp(a.expand(n, -1, -1, -1), b.expand(n, -1, -1, -1), share)
        edit = chained(edit, from_picture(bundle, strength))
        options["size"] = images.shape[2:]
    conditioner = None if bundle.conditioner is None else Between(bundle.conditioner, way)
    between = Bundle(bundle.autoencoder, conditioner, bundle.denoiser, bundle.config, bundle.sampling, bundle.about)
    return between.generate(batch, edit=edit, tile=tile, **options)


def noise_between(bundle: Bundle, seeds: tuple[int, int]) -> Edit:
    """What replaces all noise of a sampler by that between two seeds, batch[SHARE] of the way."""

    def edit(sampler: Sampler, batch: Mapping[str, Any]) -> Sampler:
        share = batch[SHARE].cpu()

        def sample(denoise, x, times, process, noise=None, **more):
            sources = [generator(seed) for seed in seeds]

            def draw(shape: Sequence[int]) -> Tensor:  # (B,...)
                a, b = (torch.randn(*shape[1:], generator=source).expand(*shape) for source in sources)
                return slerp(a, b, share)

            start = (draw(x.shape) * bundle.start_std(times)).to(x.device)
            return sampler(denoise, start, times, process, noise=lambda _, shape: draw(shape), **more)

        return sample

    return edit


def chained(outer: Edit, inner: Edit) -> Edit:
    return lambda sampler, batch: outer(inner(sampler, batch), batch)
