"""Painting a part of a picture, or around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.spatial import MaskedImage
from ldm.edit import Sampler, repaint, replace
from ldm.tasks.picture import Prompts, paired, part_of

Method = Literal["auto", "model", "replace", "repaint"]
KNOWN, KEEP = "edit/known", "edit/keep"


def inpaint(bundle: Bundle, image: Tensor, mask: Tensor, prompts: Prompts = None, *, method: Method = "auto", jump: int = 10,
            resample: int = 10, feather: int = 0, tile: int | None = None, **options: Any) -> Tensor:
    """The picture, painted where mask (B,1,H,W) is 1; where it is 0 every pixel is the picture's own.

    Args:
        method: model, trained for it (``MaskedImage``); replace, any model, whose guess of the data is known where the mask is
            0 (``ldm.edit.replace``); repaint, the same, going back again and again so that both parts agree
            (``ldm.edit.repaint``, 2201.09865); auto: model where it can, else replace.
        jump, resample: of repaint: steps that are walked back, times that a stretch is walked.
        feather: pixels beside the mask that are blended with what was painted, and then are no longer the picture's own.
    """
    trained = part_of(bundle, MaskedImage) is not None
    if method not in get_args(Method):
        raise UserError(f"method {method!r}: there are {', '.join(get_args(Method))}")
    if method == "auto":
        method = "model" if trained else "replace"
    if method == "model" and not trained:
        raise UserError("method 'model': this model was not trained to inpaint (it has no MaskedImage condition); take replace "
                        "or repaint, or train configs/tasks/inpainting.yaml")
    if image.shape[2:] != mask.shape[2:] or mask.shape[1] != 1 or not ((mask == 0) | (mask == 1)).all():
        raise UserError(f"mask: expected 0 and 1 (B,1,{image.shape[2]},{image.shape[3]}), 1 where to paint, got "
                        f"{tuple(mask.shape)} from {mask.min():g} to {mask.max():g}")
    batch, more = paired(prompts, image=image, mask=mask.float()), {}
    if method != "model":
        batch |= {KNOWN: bundle.encode(batch["image"], tile), KEEP: kept(batch["mask"], bundle.autoencoder.factor)}
        if method == "repaint":
            more["edit"] = lambda sampler, part: repaint(sampler, part[KNOWN], part[KEEP], jump=jump, resample=resample)
        else:
            more["edit"] = replacing
    painted = bundle.generate(batch, size=image.shape[2:], tile=tile, **more, **options)
    return pasted(painted, batch["image"], batch["mask"], feather)


def replacing(sampler: Sampler, part: Mapping[str, Any]) -> Sampler:
    """The sampler, whose guess of the data is what is known."""
    return lambda denoise, x, times, process, **more: sampler(replace(denoise, part[KNOWN], part[KEEP], process), x, times,
                                                              process, **more)  # fmt: skip


def kept(mask: Tensor, factor: int) -> Tensor:  # (B,1,H,W) -> (B,1,h,w)
    """1 where nothing in a latent pixel's part of the picture is to be painted."""
    return 1 - F.max_pool2d(mask, factor)


def pasted(painted: Tensor, image: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """What was painted over the picture, where mask (B,1,H,W) is 1; with ``feather`` it fades out so many pixels beside it."""
    image, mask = image.to(painted), mask.to(painted)
    if feather < 0:
        raise UserError(f"feather: {feather}; it takes a number of pixels, from 0")
    if feather:
        away = torch.from_numpy(distance_transform_edt((mask == 0).cpu().numpy(), sampling=[1e9, 1, 1, 1])).to(mask)
        mask = (1 - away / (feather + 1)).clamp(0, 1)
    return torch.lerp(image, painted, mask)


def expanded(image: Tensor, left: int, top: int, right: int, bottom: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outpainting: the picture (B,C,H,W), so many pixels larger on each side, its edges repeated there, and the mask that
    ``inpaint`` takes: 1 there, and where `mask` (B,1,H,W) is 1."""
    if min(left, top, right, bottom) < 0:
        raise UserError(f"expand: {left} {top} {right} {bottom}; these are pixels, from 0: left, top, right, bottom")
    mask = torch.zeros(len(image), 1, *image.shape[2:]) if mask is None else mask
    sides = (left, right, top, bottom)
    return F.pad(image, sides, mode="replicate"), F.pad(mask, sides, value=1.0)
