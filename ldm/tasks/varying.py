"""Other pictures like a given one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.between import slerp
from ldm.conditioners.image import ImageEmbedding
from ldm.edit import Sampler
from ldm.tasks.inverting import BOTH, invert
from ldm.tasks.picture import X0, Prompts, img2img, paired, part_of, share_of

Method = Literal["auto", "embedding", "img2img", "inversion"]


def variations(bundle: Bundle, image: Tensor, prompts: Prompts = None, *, method: Method = "auto", strength: float = 0.6,
               tile: int | None = None, **options: Any) -> Tensor:
    """Pictures like ``image``; see ``way_of`` for how.

    Args:
        method: embedding, from what a frozen encoder sees in it (unCLIP, 2204.06125; ``ImageEmbedding``), so that layout and
            details are new; img2img, from it with noise (``img2img``), so that they stay; inversion, from its own noise
            (``invert``) turned by ``strength`` of a right angle towards new noise.
        strength: of img2img and inversion: 0 its reconstruction, 1 a new picture.
    """
    method = way_of(bundle, method)
    if method == "embedding":
        return bundle.generate(paired(prompts, **{part_of(bundle, ImageEmbedding).key: image}), tile=tile, **options)
    if method == "img2img":
        return img2img(bundle, image, prompts, strength=strength, tile=tile, **options)
    share_of(strength, "strength")
    both = {key: options[key] for key in BOTH if key in options}
    batch = paired(prompts, image=image)
    batch[X0] = invert(bundle, batch["image"], prompts, tile=tile, **both)

    def turned(sampler: Sampler, part: Mapping[str, Any]) -> Sampler:
        def sample(denoise, x, times, process, **more):
            x = slerp(part[X0], x, torch.full((len(x),), strength))
            return sampler(denoise, x, times, process, **more)

        return sample

    return bundle.generate(batch, size=image.shape[2:], edit=turned, tile=tile, **options)


def way_of(bundle: Bundle, method: Method = "auto") -> Method:
    """The method; "auto": embedding where the model reads pictures so, else img2img. UserError where it does not."""
    reads = part_of(bundle, ImageEmbedding)
    if method == "auto":
        return "img2img" if reads is None or reads.encoder is None else "embedding"
    if method == "embedding" and (reads is None or reads.encoder is None):
        raise UserError("method 'embedding': this model does not read pictures by an encoder (ImageEmbedding); take img2img or "
                        "inversion, or train configs/tasks/image_variations.yaml")
    return method
