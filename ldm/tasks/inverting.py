"""DDIM inversion (2010.02502, section 4.3): the noise that a picture is drawn from, and another prompt's picture from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.edit import Sampler, reversed_times, shortened
from ldm.samplers import ddim_inversion
from ldm.tasks.picture import X0, Prompts, paired, share_of

BOTH = ("steps", "times", "batch_size", "callback", "prompt_weights", "long", "window")  # options of both ways


def invert(bundle: Bundle, image: Tensor, prompts: Prompts = None, *, strength: float = 1.0, refine: int = 0,
           guidance: float = 1.0, tile: int | None = None, **options: Any) -> Tensor:
    """The latents (B,C,h,w) at the first time of sampling (or ``strength`` of the way there) from which ``ddim`` leads to the
    picture, under the prompt that tells what it shows.

    Args:
        refine: rounds of fixed-point iteration a step, which make it exact (2309.04907); 0: as close as the steps are short.
        guidance: the scale under which it is inverted. Above 1 the way back is unstable.
    """
    if not 0 < share_of(strength, "strength"):
        raise UserError("strength: 0 is the picture itself; it takes a share of the steps above 0")
    batch = paired(prompts, image=image)

    def backwards(_: Sampler, part: Mapping[str, Any]) -> Sampler:
        return lambda denoise, x, times, process, callback=None, noise=None: ddim_inversion(
            denoise, part[X0], reversed_times(shortened(times, strength)), process, refine=refine, callback=callback)

    z = bundle.encode(batch["image"], tile)
    return bundle.generate(batch | {X0: z}, size=batch["image"].shape[2:], sampler="ddim", guidance=guidance, edit=backwards,
                           decode=False, **options)  # fmt: skip


def edit(bundle: Bundle, image: Tensor, source: Prompts, target: Prompts, *, strength: float = 1.0, refine: int = 0,
         sampler: Any = "ddim", tile: int | None = None, **options: Any) -> Tensor:
    """The picture inverted under ``source``, which tells what it shows, and drawn from there under ``target``.

    What both prompts share stays, the more, the less is guided: with guidance 1 and source = target this is the picture itself.

    Args:
        strength: how far it is inverted; below 1 more of the picture stays.
        refine: see ``invert``.
        sampler: of the way back.
    """
    both = {key: options[key] for key in BOTH if key in options}
    x = invert(bundle, image, source, strength=strength, refine=refine, tile=tile, **both)
    batch = paired(target, image=image, **{X0: x})
    x = batch.pop(X0)

    def from_there(sampler: Sampler, _: Mapping[str, Any]) -> Sampler:
        return lambda denoise, x, times, process, **more: sampler(denoise, x, shortened(times, strength), process, **more)

    return bundle.generate(batch, x_T=x, sampler=sampler, edit=from_there, tile=tile, **options)
